"""What this machine is: instruction set, GPUs, versions. Imports nothing heavy, so a cache hit can afford it."""

import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import platform
import re
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

from buildtool.store.errors import SdxlError

_CPUINFO = Path("/proc/cpuinfo")

# Strongest first. The flags are those of the compiler options that Inductor passes for the level; the names are
# the kernel's. Inductor's finer levels (VNNI, AMX, bf16) do not change which machines run fp32 code.
_X86: dict[str, frozenset[str]] = {
    "avx512": frozenset({"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx2", "fma"}),
    "avx2": frozenset({"avx2", "fma", "f16c"}),
    "sse4": frozenset({"sse4_1", "sse4_2"}),
    "x86-64": frozenset(),
}
_ARM: dict[str, frozenset[str]] = {
    "sve256": frozenset({"sve", "bf16"}),
    "sve128": frozenset({"sve", "bf16"}),
    "neon": frozenset({"asimd"}),
    "aarch64": frozenset(),
}
_PR_SVE_GET_VL = 51
_PR_SVE_VL_LEN_MASK = 0xFFFF


@dataclass(frozen=True)
class Gpu:
    """A CUDA device as this process sees it.

    Attributes:
        index: its number among the visible devices, as in ``cuda:<index>``.
        name: the driver's name, such as ``NVIDIA H100 80GB HBM3``.
        target: ``sm<major><minor>`` of its compute capability.
        memory_bytes: all of its memory, in bytes.
        driver: the driver's version; where the kernel doesn't tell, ``CUDA <version that the driver supports>``.
    """

    index: int
    name: str
    target: str
    memory_bytes: int
    driver: str


def cpu_isa() -> str:
    """The instruction set that Inductor vectorises for here: ``avx512``, ``avx2``, ``sse4``, ``sve256``, ``neon``, …

    ``ATEN_CPU_CAPABILITY`` (``avx2``, ``default``) lowers it, as it does in torch.
    """
    levels, flags, vector_bits = _levels(), _cpu_flags(), _sve_bits()
    wanted = os.environ.get("ATEN_CPU_CAPABILITY", "")
    names = [name for name in levels if _has(name, levels[name], flags, vector_bits)]
    if wanted in names:
        return wanted
    if wanted == "default":
        return next((n for n in names if n in ("sse4", "x86-64", "neon", "aarch64")), names[-1])
    return names[0]


def cpu_runs(isa: str) -> bool:
    """Whether this machine can run code compiled for ``isa``, a name that `cpu_isa` gave on another machine."""
    levels = _levels()
    return isa in levels and _has(isa, levels[isa], _cpu_flags(), _sve_bits())


def _levels() -> dict[str, frozenset[str]]:
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        return _X86
    if machine in ("aarch64", "arm64"):
        return _ARM
    return {machine or "unknown": frozenset()}


def _has(name: str, needed: AbstractSet[str], flags: AbstractSet[str], vector_bits: int) -> bool:
    # SVE code is compiled for one vector length, so a wider machine doesn't run it. Inductor takes 128 for a
    # length of 128 bits, and code for 256 otherwise, which only a machine of 256 bits runs.
    if name.startswith("sve") and vector_bits != int(name[3:]):
        return False
    return needed <= flags


@functools.cache
def _cpu_flags() -> frozenset[str]:
    try:
        text = _CPUINFO.read_text(encoding="ascii", errors="replace")
    except OSError:
        return frozenset()
    return parse_cpu_flags(text)


def parse_cpu_flags(cpuinfo: str) -> frozenset[str]:
    """The flags that every core of a /proc/cpuinfo text has (big and little cores may differ)."""
    lines = re.findall(r"^(?:flags|Features)[ \t]*:(.*)$", cpuinfo, flags=re.MULTILINE)
    sets = [frozenset(line.split()) for line in lines]
    return frozenset.intersection(*sets) if sets else frozenset()


@functools.cache
def _sve_bits() -> int:
    if platform.machine().lower() not in ("aarch64", "arm64") or "sve" not in _cpu_flags():
        return 0
    try:
        length = ctypes.CDLL(None).prctl(_PR_SVE_GET_VL, 0, 0, 0, 0)
    except (OSError, AttributeError):
        return 0
    return (length & _PR_SVE_VL_LEN_MASK) * 8 if length > 0 else 0


MIN_DRIVER = {12: 525, 13: 580}
"""First driver branch that runs code of a CUDA major version."""


def require_gpu(index: int = 0) -> Gpu:
    """The visible GPU of that number, if the torch that is installed can use it. Imports no torch.

    Raises:
        SdxlError: there is none, torch is a CPU build, or the driver is too old for torch's CUDA.
    """
    found = gpus()
    if not found:
        raise SdxlError("No GPU was found on this machine.", "See what is there: sdxl-build doctor")
    gpu = next((gpu for gpu in found if gpu.index == index), None)
    if gpu is None:
        there = ", ".join(f"{gpu.index} ({gpu.name})" for gpu in found)
        raise SdxlError(f"There is no GPU {index} here.", f"--gpu-index takes: {there}.")
    torch = torch_version()
    cuda = torch.get("cuda", "none")
    if torch and cuda == "none":
        raise SdxlError(
            f"torch {torch['torch']} is a build for the CPU, and the GPU is to be used.",
            "Install a build for CUDA: https://pytorch.org/get-started/locally",
        )
    needed = needed_driver(gpu.driver, cuda)
    if needed:
        raise SdxlError(
            f"The GPU's driver is {gpu.driver}, and torch {torch['torch']} for CUDA {cuda} needs {needed} or newer.",
            "Update the driver, or install a torch for an older CUDA.",
        )
    return gpu


def needed_driver(driver: str, cuda: str) -> int:
    """The driver branch that a CUDA version needs, if ``driver`` is older; else (or if nobody knows) 0."""
    major = cuda.partition(".")[0]
    branch = driver.partition(".")[0]
    wanted = MIN_DRIVER.get(int(major), 0) if major.isdigit() else 0
    return wanted if branch.isdigit() and int(branch) < wanted else 0


# Attributes of cuDeviceGetAttribute.
_MAJOR, _MINOR = 75, 76


def gpus() -> list[Gpu]:
    """The visible CUDA devices, asked of the driver; empty without a driver or a device.

    libcuda is asked, not NVML: it honours ``CUDA_VISIBLE_DEVICES``, so ``index`` is what torch will use. No
    context is made: nothing is allocated on a device.
    """
    return list(_gpus())


@functools.cache
def _gpus() -> tuple[Gpu, ...]:
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    driver = _driver(cuda)
    found = []
    for index in range(count.value):
        device, memory = ctypes.c_int(), ctypes.c_size_t()
        name = ctypes.create_string_buffer(256)
        major, minor = ctypes.c_int(), ctypes.c_int()
        failed = (
            cuda.cuDeviceGet(ctypes.byref(device), index)
            or cuda.cuDeviceGetName(name, len(name), device)
            or cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
            or cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
            or cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
        )
        if not failed:
            target = f"sm{major.value}{minor.value}"
            found.append(Gpu(index, name.value.decode(errors="replace"), target, memory.value, driver))
    return tuple(found)


def _driver(cuda: ctypes.CDLL) -> str:
    for path in (Path("/sys/module/nvidia/version"), Path("/proc/driver/nvidia/version")):
        try:
            found = re.search(r"\d{3,}\.\d+(?:\.\d+)?", path.read_text(encoding="ascii", errors="replace"))
        except OSError:
            continue
        if found:
            return found.group()
    version = ctypes.c_int()
    if cuda.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return "unknown"
    return f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"


def torch_version() -> dict[str, str]:
    """``{"torch": "2.13.0+cpu", "cuda": "13.0" or "none"}`` from torch's files, without importing it; {} if absent."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return {}
    try:
        text = (Path(next(iter(spec.submodule_search_locations))) / "version.py").read_text(encoding="utf-8")
    except OSError:
        return {}
    found = dict(re.findall(r"^(__version__|cuda)\b[^=\n]*=\s*[\"']([^\"']*)[\"']", text, flags=re.MULTILINE))
    if "__version__" not in found:
        return {}
    return {"torch": found["__version__"], "cuda": found.get("cuda", "none")}


def versions(*dists: str) -> dict[str, str]:
    """The installed version of each distribution, from its metadata; those that aren't installed are left out."""
    found = {}
    for dist in dists:
        try:
            found[dist] = importlib.metadata.version(dist)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def share_cores() -> None:
    """Keeps OpenMP's waiting threads from starving each other on a shared machine; call it before torch is imported.

    By default libgomp's threads spin for milliseconds at every barrier. On two cores that another program shares,
    the tiny model then runs at 0.3 steps/s instead of 33; with this short spin at 9, and at 30 on a quiet machine
    (benchmarks/RESULTS.md). Settings of the user's own are left alone.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "4000")

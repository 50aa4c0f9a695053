"""What this machine has, and what it lacks, for building: one row each, with what to do about it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from buildtool.store import interpreter, machine
from buildtool.store.errors import SdxlError

DIST = "sdxl-build"
MIN_TORCH = (2, 11)
GB = 1_000_000_000
# An fp16 SDXL artifact is 7 GB of weights, and as much again while it is staged; the checkpoint's own 7 GB besides.
DISK_WANTED = 25 * GB
# The UNet in fp32 for the golden tensors is 10 GB; exporting and compiling add to it.
MEMORY_WANTED = 16 * GB

# Backend -> what it needs: each line is one of several distributions that will do.
BACKENDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "torch": (("torch",),),
    "onnx": (("onnx",), ("onnxscript",), ("onnx-graphsurgeon",), ("onnxruntime", "onnxruntime-gpu")),
    "trt": (
        ("tensorrt_rtx", "tensorrt_rtx_cu13", "tensorrt_rtx_cu12", "tensorrt", "tensorrt_cu13", "tensorrt_cu12"),
        ("onnx",),
        ("onnxscript",),
        ("onnx-graphsurgeon",),
    ),
}


@dataclass(frozen=True)
class Row:
    """One finding.

    Attributes:
        name: what was looked at.
        status: ``ok``; ``warn``: something is limited; ``missing``: nothing can be built without it.
        detail: what is there.
        hint: what to do, usually a command; "" where nothing is to be done.
    """

    name: str
    status: Literal["ok", "warn", "missing"]
    detail: str
    hint: str = ""


def report(artifacts: Path | None = None) -> list[Row]:
    """All findings. Compiles a three-line library to try the compiler (a second or two); imports no torch.

    Args:
        artifacts: the folder of artifacts, of which the disk is looked at; $SDXL_ARTIFACTS or ./artifacts by default.
    """
    folder = artifacts or Path(os.environ.get("SDXL_ARTIFACTS") or "artifacts")
    return [
        python(),
        torch(),
        *byte_code(),
        *libraries(),
        compiler(),
        python_headers(),
        *gpus(),
        triton(),
        memory(),
        disk(folder),
        hub_cache(),
        *(backend(name) for name in BACKENDS),
        onediff(),
    ]


def python() -> Row:
    version = ".".join(map(str, sys.version_info[:3]))
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        return Row("Python", "warn", f"{version}; it needs 3.10 to 3.13", "Use one of these.")
    return Row("Python", "ok", version)


def torch() -> Row:
    found = machine.torch_version()
    if not found:
        return Row("torch", "missing", "not installed", "pip install torch")
    build = "CPU build" if found["cuda"] == "none" else f"built for CUDA {found['cuda']}"
    detail = f"{found['torch']} ({build})"
    if _numbers(found["torch"])[:2] < MIN_TORCH:
        return Row("torch", "missing", f"{detail}, too old", f"pip install 'torch>={MIN_TORCH[0]}.{MIN_TORCH[1]}'")
    if found["cuda"] == "none" and machine.gpus():
        hint = "For builds on the GPU, install torch from the CUDA index: https://pytorch.org/get-started/locally"
        return Row("torch", "warn", f"{detail}, and a GPU is here", hint)
    return Row("torch", "ok", detail)


def byte_code() -> list[Row]:
    """Whether Python has to compile torch's sources at every start: pip leaves byte code beside them, uv doesn't."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None or found.cached is None or os.path.exists(found.cached):
        return []
    folder = Path(found.origin).parent
    if not sys.dont_write_bytecode and os.access(folder, os.W_OK):
        return []  # the first start writes it
    return [
        Row(
            "byte code",
            "warn",
            "torch has none, and none is kept: every start compiles its sources, which takes 2 s or more",
            f"python -m compileall -q {folder.parent}",
        )
    ]


def libraries() -> list[Row]:
    """The libraries that this distribution asks for, against the versions it was tested with."""
    from packaging.requirements import Requirement

    try:
        required = [Requirement(text) for text in importlib.metadata.requires(DIST) or ()]
    except importlib.metadata.PackageNotFoundError:
        return [
            Row(
                "libraries",
                "warn",
                f"{DIST} itself is not installed, so nothing names its libraries",
                "pip install -e .",
            )
        ]
    rows = []
    for requirement in required:
        if requirement.name == "torch" or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        rows.append(_library(requirement.name, str(requirement.specifier), requirement.specifier.contains))
    wrong = [row for row in rows if row.status != "ok"]
    shown = [row for row in rows if row.name in ("diffusers", "transformers") and row.status == "ok"]
    return [*shown, *wrong, *([] if wrong else [Row("libraries", "ok", f"all {len(rows)} are in their tested ranges")])]


def _library(name: str, wanted: str, contains: object) -> Row:
    version = machine.versions(name).get(name)
    install = f"pip install '{name}{wanted}'"
    if version is None:
        return Row(name, "missing", "not installed", install)
    if not callable(contains) or not contains(version, prereleases=True):
        return Row(name, "warn", f"{version}, tested are {wanted}", install)
    return Row(name, "ok", version)


_PROBE = """#include <regex>
#include <stdexcept>
#include <string>
extern "C" int probe(const char* s) {
  try {
    if (!std::regex_match(std::string(s), std::regex("[a-z]+"))) throw std::runtime_error(s);
  } catch (const std::exception&) { return 1; }
  return 0;
}
"""


def compiler() -> Row:
    """The C++ compiler that Inductor would use, tried on a library that needs libstdc++."""
    cxx = os.environ.get("CXX") or "g++"
    chosen = f"{cxx} (from $CXX)" if os.environ.get("CXX") else cxx
    name = "C++ compiler"
    if shutil.which(cxx) is None:
        other = _other_compiler(cxx)
        hint = f"export CXX={other}" if other else "Install one, for Debian and Ubuntu: apt-get install g++"
        return Row(name, "missing", f"{chosen} is not there", hint)
    try:
        version = subprocess.run([cxx, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return Row(name, "missing", f"{chosen} does not start: {error}", "Set $CXX to a working g++ or clang++.")
    detail = f"{chosen}: {version.strip().splitlines()[0] if version.strip() else 'of unknown version'}"
    with tempfile.TemporaryDirectory(prefix="sdxl-doctor-") as scratch:
        source, library = Path(scratch) / "probe.cpp", Path(scratch) / "probe.so"
        source.write_text(_PROBE)
        command = [cxx, "-std=c++20", "-O0", "-shared", "-fPIC", str(source), "-o", str(library)]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        except (OSError, subprocess.SubprocessError) as error:
            return Row(name, "missing", f"{detail}; it fails: {error}", "Set $CXX to a working g++ or clang++.")
        if run.returncode or not library.exists():
            said = next((line for line in run.stderr.splitlines() if "error" in line), run.stderr.strip()[:200])
            return Row(
                name, "missing", f"{detail}; it cannot build a C++20 library: {said}", "Set $CXX to a newer one."
            )
        static = not links_dynamically(library.read_bytes())
    if static:
        other = _other_compiler(cxx)
        hint = f"export CXX={other or 'g++-12'} (the system's own g++), then build again."
        return Row(name, "warn", f"{detail}; it links libstdc++ statically: packages crash while loading", hint)
    return Row(name, "ok", detail)


def links_dynamically(library: bytes) -> bool:
    """Whether a shared library names the C++ library that it needs.

    A copy of libstdc++ inside a package meets torch's own: a std::regex that one makes and the other frees ends in
    SIGSEGV. The name stands in the file's dynamic strings, so no readelf is needed to see it.
    """
    return b"\0libstdc++.so." in library or b"\0libc++.so." in library


def _other_compiler(than: str) -> str:
    here = shutil.which(than)
    for name in ("g++-12", "g++-13", "g++-14", "g++-11", "g++", "clang++"):
        path = shutil.which(name)
        if path and (here is None or os.path.realpath(path) != os.path.realpath(here)):
            return name
    return ""


def python_headers() -> Row:
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if header.exists():
        return Row("Python headers", "ok", str(header.parent))
    major, minor = sys.version_info[:2]
    hint = f"For Debian and Ubuntu: apt-get install python{major}.{minor}-dev"
    return Row("Python headers", "warn", f"{header} is not there; builds on a GPU need it (Triton)", hint)


def gpus() -> list[Row]:
    found = machine.gpus()
    if not found:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = f" (CUDA_VISIBLE_DEVICES={hidden!r})" if hidden is not None else ""
        return [Row("GPU", "warn", f"none found{why}", "Build for the CPU with --gpu cpu.")]
    rows = [_driver(found[0].driver)]
    for gpu in found:
        detail = f"{gpu.name}, {gpu.target}, {gpu.memory_bytes / GB:.0f} GB"
        rows.append(Row(f"GPU {gpu.index}", "ok", detail))
    return rows


def _driver(version: str) -> Row:
    cuda = machine.torch_version().get("cuda", "none")
    needed = machine.needed_driver(version, cuda)
    if needed:
        hint = f"Update the driver to {needed} or newer, or install a torch for an older CUDA."
        return Row("driver", "warn", f"{version}, too old for torch's CUDA {cuda}", hint)
    return Row("driver", "ok", version)


def triton() -> Row:
    version = machine.versions("triton").get("triton")
    if version:
        return Row("triton", "ok", version)
    if machine.gpus() and machine.torch_version().get("cuda", "none") != "none":
        return Row("triton", "missing", "not installed; torch compiles for the GPU with it", "pip install triton")
    return Row("triton", "ok", "not installed, and not needed for the CPU")


def memory() -> Row:
    """What may be used: the machine's, or its container's where that is less."""
    limits = [_meminfo("MemTotal")]
    free = _meminfo("MemAvailable")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):
            continue
    total = min((limit for limit in limits if limit), default=0)
    if not total:
        return Row("memory", "warn", "unknown")
    detail = f"{total / GB:.0f} GB, {min(free, total) / GB:.0f} GB of it free"
    if total < MEMORY_WANTED:
        hint = f"Full-size SDXL wants {MEMORY_WANTED // GB} GB; --model tiny builds."
        return Row("memory", "warn", detail, hint)
    return Row("memory", "ok", detail)


def _meminfo(field: str) -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 0


def disk(folder: Path) -> Row:
    """The disk of the folder of artifacts, or of where it would be made."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    detail = f"{free / GB:.0f} GB free for {folder}"
    if not os.access(there, os.W_OK):
        return Row("disk", "warn", f"{there} cannot be written", "Give another folder: --artifacts DIR")
    if free < DISK_WANTED:
        hint = f"A full-size SDXL build wants {DISK_WANTED // GB} GB: sdxl-build prune, or --artifacts DIR elsewhere."
        return Row("disk", "warn", detail, hint)
    return Row("disk", "ok", detail)


def hub_cache() -> Row:
    try:
        from huggingface_hub import constants, try_to_load_from_cache
    except ImportError:
        return Row("hub cache", "missing", "huggingface_hub is not installed", "pip install huggingface_hub")
    from buildtool.checkpoint.hub import BASE

    where = Path(constants.HF_HUB_CACHE)
    has = isinstance(try_to_load_from_cache(BASE, "model_index.json"), str)
    detail = f"{where}, {'with' if has else 'without'} {BASE}{', offline' if constants.HF_HUB_OFFLINE else ''}"
    if not has and constants.HF_HUB_OFFLINE:
        return Row("hub cache", "warn", detail, f"Unset HF_HUB_OFFLINE, or on another machine: hf download {BASE}")
    return Row("hub cache", "ok", detail)


def backend(name: str) -> Row:
    """What a backend needs."""
    absent = [line for line in BACKENDS[name] if not machine.versions(*line)]
    if absent:
        detail = "needs " + ", ".join(" or ".join(line) for line in absent)
        status: Literal["warn", "missing"] = "missing" if name == "torch" else "warn"
        return Row(f"backend {name}", status, detail, f"pip install {' '.join(line[0] for line in absent)}")
    found = {dist: v for line in BACKENDS[name] for dist, v in machine.versions(*line).items()}
    return Row(f"backend {name}", "ok", ", ".join(f"{dist} {version}" for dist, version in found.items()))


def onediff() -> Row:
    """The onediff backend, which needs another Python, and what is in that."""
    name = "backend onediff"
    try:
        python = interpreter.named()
        found = interpreter.versions(python)
    except SdxlError as error:
        return Row(name, "warn", error.message, error.hint)
    problems = {compiler: interpreter.lacks(compiler, found, python) for compiler in interpreter.COMPILERS}
    usable = [compiler for compiler, problem in problems.items() if problem is None]
    first = problems[interpreter.COMPILERS[0]]
    if not usable and first is not None:
        return Row(name, "warn", *first)
    there = ", ".join(f"{dist} {found[dist]}" for dist in ("onediff", *usable, "torch"))
    return Row(name, "ok", f"{python}: Python {found['python']}, {there}")


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: ``2.13.0+cu130`` is (2, 13, 0)."""
    numbers = []
    for part in version.split("+")[0].split("."):
        digits = part[: next((i for i, c in enumerate(part) if not c.isdigit()), len(part))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers) or (0,)


def render(rows: list[Row]) -> str:
    """The findings as people read them, a line each and a hint below where there is one."""
    width = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        lines.append(f"{row.status:<8}{row.name:<{width}}  {row.detail}")
        if row.hint:
            lines.append(f"{'':<8}{'':<{width}}  -> {row.hint}")
    return "\n".join(lines)

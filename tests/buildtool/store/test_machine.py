"""What the machine says of itself, without torch; where torch is there, both agree."""

import ctypes
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from buildtool.store import machine

SKYLAKE = "fpu sse sse2 sse4_1 sse4_2 avx f16c fma avx2 avx512f avx512dq avx512cd avx512bw avx512vl"
KNIGHTS_LANDING = "fpu sse sse2 sse4_1 sse4_2 avx f16c fma avx2 avx512f avx512cd avx512er avx512pf"
ZEN2 = "fpu sse sse2 sse4_1 sse4_2 avx f16c fma avx2"
IVY_BRIDGE = "fpu sse sse2 sse4_1 sse4_2 avx f16c"


def pretend(monkeypatch: pytest.MonkeyPatch, arch: str, flags: str, sve_bits: int = 0) -> None:
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.setattr(machine.platform, "machine", lambda: arch)
    monkeypatch.setattr(machine, "_cpu_flags", lambda: frozenset(flags.split()))
    monkeypatch.setattr(machine, "_sve_bits", lambda: sve_bits)


@pytest.mark.parametrize(
    ("arch", "flags", "sve_bits", "isa"),
    [
        ("x86_64", SKYLAKE, 0, "avx512"),
        ("x86_64", KNIGHTS_LANDING, 0, "avx2"),
        ("x86_64", ZEN2, 0, "avx2"),
        ("x86_64", IVY_BRIDGE, 0, "sse4"),
        ("x86_64", "", 0, "x86-64"),
        ("aarch64", "fp asimd sve bf16", 256, "sve256"),
        ("aarch64", "fp asimd sve bf16", 128, "sve128"),
        ("aarch64", "fp asimd sve bf16", 512, "neon"),
        ("aarch64", "fp asimd", 0, "neon"),
        ("riscv64", "", 0, "riscv64"),
    ],
)
def test_instruction_set(monkeypatch: pytest.MonkeyPatch, arch: str, flags: str, sve_bits: int, isa: str) -> None:
    pretend(monkeypatch, arch, flags, sve_bits)
    assert machine.cpu_isa() == isa
    assert machine.cpu_runs(isa)


def test_a_weaker_machine_does_not_run_stronger_code(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "x86_64", ZEN2)
    assert not machine.cpu_runs("avx512")
    assert machine.cpu_runs("avx2") and machine.cpu_runs("sse4")
    assert not machine.cpu_runs("neon") and not machine.cpu_runs("sve256") and not machine.cpu_runs("mmx")
    pretend(monkeypatch, "aarch64", "fp asimd sve bf16", 128)
    assert machine.cpu_runs("neon") and not machine.cpu_runs("sve256") and not machine.cpu_runs("avx2")


def test_torchs_own_setting_lowers_what_is_built_but_not_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "x86_64", SKYLAKE)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert machine.cpu_isa() == "avx2" and machine.cpu_runs("avx512")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    assert machine.cpu_isa() == "sse4"
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "nonsense")
    assert machine.cpu_isa() == "avx512"


def test_flags_are_those_that_all_cores_have() -> None:
    big, little = "processor : 0\nFeatures\t: fp asimd sve bf16\n", "processor : 1\nFeatures\t: fp asimd\n"
    assert machine.parse_cpu_flags(big + "\n" + little) == {"fp", "asimd"}
    assert machine.parse_cpu_flags("flags\t\t: avx avx2\nvmx flags\t: ept\n") == {"avx", "avx2"}
    assert machine.parse_cpu_flags("") == frozenset()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="Inductor's list is of x86 levels")
def test_agrees_with_inductor_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    from torch._inductor import cpu_vec_isa

    theirs = cpu_vec_isa.x86_isa_checker()
    assert machine.cpu_isa() == next((isa for isa in ("avx512", "avx2") if isa in theirs), "sse4")


class StandInCuda:
    """Stands in for libcuda: two devices, or none, or a failing start."""

    def __init__(self, count: int = 2, init: int = 0) -> None:
        self.count, self.init = count, init

    def cuInit(self, flags: int) -> int:
        return self.init

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.count
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:
        name.value = [b"NVIDIA H100 80GB HBM3", b"NVIDIA RTX PRO 6000"][device.value]
        return 0

    def cuDeviceTotalMem_v2(self, memory: Any, device: Any) -> int:
        memory._obj.value = 85 * 10**9
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        value._obj.value = {75: [9, 12], 76: [0, 0]}[attribute][device.value]
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = 13020
        return 0


def use(monkeypatch: pytest.MonkeyPatch, cuda: StandInCuda | None) -> None:
    def load(name: str) -> StandInCuda:
        if cuda is None:
            raise OSError(name)
        return cuda

    machine._gpus.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", load)


def test_gpus_as_the_driver_tells_them(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, StandInCuda())
    found = machine.gpus()
    machine._gpus.cache_clear()
    assert [(g.index, g.name, g.target) for g in found] == [
        (0, "NVIDIA H100 80GB HBM3", "sm90"),
        (1, "NVIDIA RTX PRO 6000", "sm120"),
    ]
    assert found[0].memory_bytes == 85 * 10**9
    assert found[0].driver


def test_no_driver_no_device_and_a_broken_driver_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda in (None, StandInCuda(count=0), StandInCuda(init=999)):
        use(monkeypatch, cuda)
        assert machine.gpus() == []
    machine._gpus.cache_clear()


def test_torchs_version_without_importing_it() -> None:
    import torch

    assert machine.torch_version() == {"torch": str(torch.__version__), "cuda": torch.version.cuda or "none"}
    code = "import sys; from buildtool.store import machine as m; m.torch_version(); m.cpu_isa(); m.gpus()"
    subprocess.run([sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"], check=True)


def test_torchs_version_of_a_cuda_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    text = "__version__ = '2.11.0+cu130'\ndebug = False\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n"
    (tmp_path / "torch" / "version.py").write_text(text)
    code = "from buildtool.store import machine; print(machine.torch_version())"
    environment = {"PYTHONPATH": f"{tmp_path}:{Path(machine.__file__).parents[2]}"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "{'torch': '2.11.0+cu130', 'cuda': '13.0'}"


def test_versions_of_what_is_installed() -> None:
    assert machine.versions("msgspec", "no-such-thing") == {"msgspec": importlib.metadata.version("msgspec")}


@pytest.mark.parametrize(
    ("set_by_user", "left"), [({}, "4000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_share_cores_shortens_the_spin_unless_the_user_chose(
    monkeypatch: pytest.MonkeyPatch, set_by_user: dict[str, str], left: str | None
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in set_by_user.items():
        monkeypatch.setenv(name, value)
    machine.share_cores()
    assert os.environ.get("GOMP_SPINCOUNT") == left

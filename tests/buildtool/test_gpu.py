"""``--gpu`` becomes a target, or one line that says what to give instead."""

import pytest

from buildtool import gpu
from buildtool.gpu import Target
from buildtool.store import machine
from buildtool.store.errors import SdxlError
from buildtool.store.machine import Gpu

A10 = Gpu(0, "NVIDIA A10", "sm86", 24 << 30, "580.159")
H100 = Gpu(1, "NVIDIA H100 80GB HBM3", "sm90", 80 << 30, "580.159")


def present(monkeypatch: pytest.MonkeyPatch, *gpus: Gpu, cuda: str = "13.0") -> None:
    monkeypatch.setattr(machine, "gpus", lambda: list(gpus))
    monkeypatch.setattr(machine, "torch_version", lambda: {"torch": "2.13.0", "cuda": cuda})


def test_auto_is_the_first_visible_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    present(monkeypatch, A10, H100)
    assert gpu.resolve_target("auto") == Target("sm86", "NVIDIA A10", "cuda", 0)


def test_auto_without_a_gpu_names_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    present(monkeypatch)
    with pytest.raises(SdxlError, match="--gpu cpu"):
        gpu.resolve_target("auto")


def test_cpu_carries_its_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpu_isa", lambda: "avx2")
    target = gpu.resolve_target("cpu")
    assert target == Target("cpu-avx2", "any", "cpu", 0)
    assert target.torch_device == "cpu"


def test_a_target_that_is_present_brings_its_name_and_index(monkeypatch: pytest.MonkeyPatch) -> None:
    present(monkeypatch, A10, H100)
    target = gpu.resolve_target("SM90")
    assert target == Target("sm90", H100.name, "cuda", 1)
    assert target.torch_device == "cuda:1"
    gpu.require_present(target, "torch")


def test_an_index_chooses_among_several(monkeypatch: pytest.MonkeyPatch) -> None:
    present(monkeypatch, A10, H100)
    assert gpu.resolve_target("auto", 1) == Target("sm90", H100.name, "cuda", 1)
    assert gpu.resolve_target("sm90", 1).index == 1
    with pytest.raises(SdxlError, match=r"no GPU 7 here.*0 \(NVIDIA A10\), 1 \(NVIDIA H100 80GB HBM3\)"):
        gpu.resolve_target("auto", 7)
    with pytest.raises(SdxlError, match=r"GPU 1 is NVIDIA H100 80GB HBM3 \(sm90\), not sm86.*--gpu sm90"):
        gpu.resolve_target("sm86", 1)
    with pytest.raises(SdxlError, match="contradict"):
        gpu.resolve_target("cpu", 0)


def test_torch_and_driver_must_be_fit_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    present(monkeypatch, H100, cuda="none")
    with pytest.raises(SdxlError, match="is a build for the CPU"):
        gpu.require_present(gpu.resolve_target("sm90"), "torch")
    present(monkeypatch, Gpu(0, "NVIDIA A10", "sm86", 24 << 30, "535.54.03"))
    with pytest.raises(SdxlError, match=r"driver is 535\.54\.03, and torch 2\.13\.0 for CUDA 13\.0 needs 580 or newer"):
        gpu.require_present(gpu.resolve_target("auto"), "torch")
    present(monkeypatch, Gpu(0, "NVIDIA A10", "sm86", 24 << 30, "535.54.03"), cuda="12.8")
    gpu.require_present(gpu.resolve_target("auto"), "torch")


def test_a_target_that_is_not_present_is_known_but_cannot_be_built_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    present(monkeypatch, A10)
    target = gpu.resolve_target("sm90")
    assert target == Target("sm90", "any", "cuda", 0)
    with pytest.raises(SdxlError, match=r"sm90 was asked for.*NVIDIA A10 \(sm86\).*--gpu sm86"):
        gpu.require_present(target, "torch")
    present(monkeypatch)
    with pytest.raises(SdxlError, match="this machine has none"):
        gpu.require_present(target, "torch")


def test_lists_are_one_target_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    present(monkeypatch)
    target = gpu.resolve_target("sm120, sm86,sm86")
    assert target.name == "sm86+sm120" and target.names == ("sm86", "sm120")
    assert gpu.resolve_target("sm86,sm120") == target
    with pytest.raises(SdxlError, match="one target"):
        gpu.require_present(target, "torch")


@pytest.mark.parametrize("asked", ["sm99", "", ",", "cuda", "sm86,sm99", "sm86,cpu", "auto,sm86", "sm86;sm89"])
def test_unknown_targets_list_the_known_ones(asked: str) -> None:
    with pytest.raises(SdxlError, match="sm75, sm80, sm86, sm87, sm89, sm90, sm100, sm103, sm120, sm121"):
        gpu.resolve_target(asked)


def test_the_cpu_is_always_present(monkeypatch: pytest.MonkeyPatch) -> None:
    present(monkeypatch)
    gpu.require_present(gpu.resolve_target("cpu"), "torch")

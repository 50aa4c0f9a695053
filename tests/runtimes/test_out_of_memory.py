"""A GPU that is full while compiled code runs, told without one: torch's allocator is a stand-in."""

import os

import pytest
import torch

from buildtool.store.errors import SdxlError
from runtimes.torch_package import held_stderr, out_of_memory_told


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    stats = {"num_ooms": 3}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 8 << 30))
    return stats


def test_frames_of_compiled_code_are_left_out(allocator: dict[str, int], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SdxlError, match="no room for what unet"), out_of_memory_told("unet.cfg", "cuda"):
        os.write(2, b"[E1127 c_shim_cuda.cpp:770] frame #0\nframe #1\n")
        allocator["num_ooms"] += 1
        raise RuntimeError("run_func_ failed")
    assert capfd.readouterr().err == ""


def test_another_failure_keeps_its_words(allocator: dict[str, int], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="run_func_ failed"), out_of_memory_told("unet.cfg", "cuda"):
        os.write(2, b"an illegal memory access\n")
        raise RuntimeError("run_func_ failed")
    assert capfd.readouterr().err == "an illegal memory access\n"


def test_what_is_said_without_a_failure_comes_through(capfd: pytest.CaptureFixture[str]) -> None:
    with held_stderr():
        os.write(2, b"a warning\n")
    assert capfd.readouterr().err == "a warning\n"

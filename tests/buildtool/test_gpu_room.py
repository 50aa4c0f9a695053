"""What a build takes of a GPU's memory decides who runs where."""

import pytest

from buildtool import compiler, gpu_room
from exporters.base import Request

SDXL = {"text_encoder": 123_060_480, "text_encoder_2": 694_659_840, "unet": 2_567_463_684, "vae": 83_653_863}
REQUEST = Request(1024, 1024, 1, "fp16", "cuda:0", "sm90")


@pytest.mark.parametrize(
    ("free", "reference", "at_once"),
    [(80e9, True, 10), (24e9, True, 1), (16e9, False, 2), (8e9, False, 1), (4e9, False, 1)],
)
def test_what_fits_a_card(monkeypatch: pytest.MonkeyPatch, free: float, reference: bool, at_once: int) -> None:
    monkeypatch.setattr(gpu_room, "free_bytes", lambda request: int(free))
    assert gpu_room.reference_fits(SDXL, REQUEST) is reference
    assert gpu_room.compilers(SDXL, REQUEST, reference) == at_once


def test_compilers_of_segments_take_less() -> None:
    parts = Request(1024, 1024, 1, "fp16", "cuda:0", "sm90", {"segments": 8})
    assert gpu_room.compiler_bytes(SDXL, parts) < gpu_room.compiler_bytes(SDXL, REQUEST) / 2
    assert gpu_room.reference_bytes(SDXL, parts) == gpu_room.reference_bytes(SDXL, REQUEST)


def test_fp32_and_larger_pictures_take_more() -> None:
    wide = Request(2048, 1024, 1, "fp32", "cuda:0", "sm90")
    assert gpu_room.compiler_bytes(SDXL, wide) > gpu_room.compiler_bytes(SDXL, REQUEST)
    assert gpu_room.reference_bytes(SDXL, wide) > gpu_room.reference_bytes(SDXL, REQUEST)


@pytest.mark.parametrize(
    ("visible", "index", "chosen"), [(None, 1, "1"), ("2,5", 1, "5"), ("GPU-ab, GPU-cd", 0, "GPU-ab")]
)
def test_a_compiler_sees_only_the_gpu_that_was_chosen(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, index: int, chosen: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert compiler.visible_device(index) == chosen

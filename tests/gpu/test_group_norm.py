"""Our GroupNorm's kernels on the GPU: by themselves, and inside compiled code."""

from pathlib import Path

import pytest
import torch

from exporters import group_norm
from tests.exporters.test_group_norm import Block, a_view, agree, inputs, one_value

pytestmark = pytest.mark.gpu

SHAPES = [
    (2, 320, 128, 128, 32),
    (2, 2560, 32, 32, 32),
    (1, 320, 9, 7, 32),
    (2, 40, 13, 11, 8),
    (1, 128, 1024, 1024, 32),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_agree_with_float64(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    agree(*shape, dtype, "cuda", True, True)
    agree(*shape, dtype, "cuda", False, False)


def test_one_value_and_views() -> None:
    with torch._library.triton.set_wrap_triton_enabled(False):
        one_value("cuda")
        a_view("cuda")


def test_maps_of_more_numbers_than_32_bits_count() -> None:
    """3072x3072 pixels of 256 channels, of 64 equal bands: each is normed as one alone."""
    band = torch.randn(1, 256, 48, 3072, device="cuda", dtype=torch.float16) * 2 + 1
    x = torch.empty(1, 256, 64 * 48, 3072, device="cuda", dtype=torch.float16, memory_format=torch.channels_last)
    for part in x.split(48, dim=2):
        part.copy_(band)
    weight, bias = torch.randn(2, 256, device="cuda").half()
    with torch._library.triton.set_wrap_triton_enabled(False):
        wanted, made = (group_norm._by_kernels(each, None, weight, bias, 32, 1e-5, True) for each in (band, x))
    assert max((part - wanted).abs().max().item() for part in made.split(48, dim=2)) < 0.02


@torch.no_grad()
def test_compiled_code_has_them(tmp_path: Path) -> None:
    given = [tensor.cuda().half() for tensor in inputs(64, 32, 48)]
    module = Block(64).eval().cuda().half().to(memory_format=torch.channels_last)
    program = torch.export.export(module, tuple(given), strict=False)
    assert group_norm.fuse(program.graph) == 3
    file = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "block.pt2"))
    for got, wanted in zip(torch._inductor.aoti_load_package(file)(*given), module(*given), strict=True):
        assert (got.float() - wanted.float()).norm() / wanted.float().norm() < 2e-3

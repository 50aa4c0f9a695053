"""GroupNorms by channels: what the graph becomes, and the kernels where Triton is installed."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from exporters import group_norm


class Block(nn.Module):
    """Norms of a map that others read too, of a convolution and the time, and without SiLU."""

    def __init__(self, channels: int = 24) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.GroupNorm(8, channels, eps=e) for e in (1e-5, 1e-5, 1e-6))
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.plain = nn.GroupNorm(4, channels)

    def forward(self, x: torch.Tensor, time: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = self.conv1(F.silu(self.norm1(x))) + time[:, :, None, None]
        h = F.silu(self.norm2(h))
        made = x + self.conv2(h)
        return self.norm3(self.conv2(made)), made, self.plain(tokens)


def inputs(channels: int = 24, height: int = 6, width: int = 10) -> tuple[torch.Tensor, ...]:
    maps = torch.randn(2, channels, height, width).to(memory_format=torch.channels_last)
    return maps * 2 + 1, torch.randn(2, channels), torch.randn(2, channels, 7)


@torch.no_grad()
def test_what_is_added_before_and_the_silu_after_are_part_of_the_norm() -> None:
    given = inputs()
    module = Block().eval().to(memory_format=torch.channels_last)
    program = torch.export.export(module, given, strict=False)
    assert group_norm.fuse(program.graph) == 3
    program.graph.lint()
    program.graph_module.recompile()
    for got, wanted in zip(program.module()(*given), module(*given), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    aten, found = (
        torch.ops.aten,
        list(program.graph.find_nodes(op="call_function", target=torch.ops.sdxl.group_norm.default)),
    )
    assert [(node.args[1] is not None, node.args[6]) for node in found] == [(False, True), (True, True), (True, False)]
    assert not program.graph.find_nodes(op="call_function", target=aten.silu.default)
    assert len(program.graph.find_nodes(op="call_function", target=aten.group_norm.default)) == 1, "that of tokens"
    biases = [node.args[2] for node in program.graph.find_nodes(op="call_function", target=aten.conv2d.default)]
    assert [bias is None for bias in biases] == [True, False, True], "the second one's sum is read by others too"


@torch.no_grad()
@pytest.mark.parametrize("in_place", [False, True])
def test_an_addend_is_added_once(in_place: bool) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.GroupNorm(4, 8), nn.Conv2d(8, 8, 1, bias=False)

        def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            moved = x.add_(time[:, :, None, None]) if in_place else x + time[:, :, None, None]
            return F.silu(self.norm(moved), inplace=in_place)

    given = torch.randn(2, 8, 5, 5), torch.randn(2, 8) * 5
    module = Sum().eval()
    program = torch.export.export(module, given, strict=False)
    assert group_norm.fuse(program.graph) == 1
    program.graph.lint()
    program.graph_module.recompile()
    torch.testing.assert_close(program.module()(*given), module(*given), rtol=1e-4, atol=1e-5)


def test_maps_are_cut_into_parts_that_fill_a_gpu() -> None:
    for batch, channels, side in (
        (2, 320, 128),
        (2, 2560, 32),
        (1, 512, 128),
        (1, 128, 1024),
        (8, 1280, 32),
        (1, 4, 3),
    ):
        count = group_norm.rows_in_parts(side * side, channels, batch)
        assert count & (count - 1) == 0 and side * side // count >= min(64, side * side)
        if side >= 128:
            assert 320 <= batch * count * channels / group_norm.COLUMNS <= 1280


@pytest.mark.slow
def test_the_kernels_under_tritons_interpreter() -> None:
    """In a process of its own: Triton reads the variable when it is imported."""
    pytest.importorskip("triton")
    subprocess.run(
        [sys.executable, "-c", INTERPRETED], check=True, env=os.environ | {"TRITON_INTERPRET": "1"}, timeout=300
    )


INTERPRETED = """
import torch
from tests.exporters.test_group_norm import a_view, agree, one_value
for case in ((2, 320, 16, 16, 32), (1, 320, 9, 7, 32), (2, 40, 13, 11, 8)):
    agree(*case, torch.float16, "cpu", True, True)
    agree(*case, torch.float32, "cpu", False, False)
with torch._library.triton.set_wrap_triton_enabled(False):
    one_value("cpu")
    a_view("cpu")
"""


def one_value(device: str) -> None:
    """A map whose channels are constant: their variance is 0, whatever their size rounds to."""
    ones = torch.ones(32, device=device)
    for value in torch.linspace(100, 300, 7).tolist():
        x = torch.full((1, 32, 9, 7), value, device=device)
        made = group_norm._by_kernels(x, None, ones, ones, 8, 1e-6, True)
        assert (made - F.silu(torch.ones_like(made))).abs().max() < 0.2, value  # NaN isn't


def a_view(device: str) -> None:
    """An addend that is some columns of a wider tensor."""
    x, wide = torch.randn(2, 32, 9, 7, device=device), torch.randn(2, 96, device=device)
    weight, bias = torch.randn(2, 32, device=device)
    made, wanted = (
        group_norm._by_kernels(x, addend, weight, bias, 8, 1e-5, False)
        for addend in (wide[:, 32:64], wide[:, 32:64].clone())
    )
    assert torch.equal(made, wanted)


def agree(
    batch: int,
    channels: int,
    height: int,
    width: int,
    groups: int,
    dtype: torch.dtype,
    device: str,
    adds: bool,
    silu: bool,
) -> None:
    """Holds the kernels against PyTorch's own norm in float64, on fresh random numbers."""
    x = (torch.randn(batch, channels, height, width, device=device) * 2 + 1).to(
        dtype, memory_format=torch.channels_last
    )
    addend = torch.randn(batch, channels, device=device).to(dtype) if adds else None
    weight, bias = (torch.randn(channels, device=device).to(dtype) for _ in range(2))
    with torch._library.triton.set_wrap_triton_enabled(False):
        made = group_norm._by_kernels(x, addend, weight, bias, groups, 1e-5, silu)
    exact = x.double() + (0 if addend is None else addend.double()[:, :, None, None])
    wanted = F.group_norm(exact, groups, weight.double(), bias.double(), 1e-5)
    wanted = F.silu(wanted) if silu else wanted
    error = ((made.double() - wanted).norm() / wanted.norm()).item()
    assert error < {torch.float16: 4e-4, torch.bfloat16: 4e-3, torch.float32: 2e-6}[dtype], (error, x.shape)
    assert made.is_contiguous(memory_format=torch.channels_last) and made.dtype == dtype


def test_a_build_for_the_cpu_hears_nothing_of_triton() -> None:
    done = subprocess.run([sys.executable, "-c", "import exporters.torch_package"], capture_output=True, check=True)
    assert done.stderr == b""

"""GEGLU inside its product: what the graph becomes. The kernel itself is tested on a GPU."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from exporters import geglu


class FeedForward(nn.Module):
    """A transformer's, and others that only look like one."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.LayerNorm(64)
        self.proj = nn.Linear(64, 256, bias=kind != "no bias")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = self.norm(x)
        made = self.proj(given)
        if self.kind == "input changed":
            given.add_(1)
        value, gate = made.chunk(2, dim=-1)
        if self.kind == "turned":
            value, gate = gate, value
        if self.kind == "tanh":
            return value * F.gelu(gate, approximate="tanh")
        out = F.gelu(gate) * value if self.kind == "other way round" else value * F.gelu(gate)
        if self.kind == "read elsewhere":
            return out + made.mean()
        return out + gate if self.kind == "gate read elsewhere" else out


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("plain", 1),
        ("input changed", 1),
        ("other way round", 1),
        ("turned", 0),
        ("tanh", 0),
        ("no bias", 0),
        ("read elsewhere", 0),
        ("gate read elsewhere", 0),
    ],
)
def test_only_a_product_that_its_geglu_alone_reads_is_fused(kind: str, count: int) -> None:
    module, x = FeedForward(kind).eval().half(), torch.randn(2, 64, 64).half()
    program = torch.export.export(module, (x,), strict=False)
    assert geglu.fuse(program.graph) == count
    program.graph.lint()
    program.graph_module.recompile()
    assert len(list(program.graph.find_nodes(op="call_function", target=torch.ops.sdxl.geglu.default))) == count
    assert len(list(program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default))) == 1 - count
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "dtype", "fits"),
    [
        (2048, 1280, 5120, torch.float16, True),
        (2304, 640, 2560, torch.bfloat16, True),
        (2080, 640, 2560, torch.float16, True),  # the last rows of a tile stay empty
        (64, 640, 2560, torch.float16, False),
        (2048, 640, 2500, torch.float16, False),
        (2048, 650, 2560, torch.float16, False),
        (2048, 640, 2560, torch.float32, False),
    ],
)
def test_what_the_kernel_takes(rows: int, inputs: int, outputs: int, dtype: torch.dtype, fits: bool) -> None:
    assert geglu.fits(rows, inputs, outputs, dtype) is fits

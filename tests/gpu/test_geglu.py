"""GEGLU inside its product, on a GPU: by itself, and inside compiled code."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from exporters import geglu, inductor
from tests.exporters.test_geglu import FeedForward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="a kernel for sm90"
    ),
]


def compiled(rows: tuple[int, ...], inputs: int, outputs: int, dtype: torch.dtype, folder: Path) -> float:
    """Its error against float64, as ||out - wanted|| / ||wanted||."""
    module = FeedForward()
    module.norm, module.proj = torch.nn.LayerNorm(inputs), torch.nn.Linear(inputs, 2 * outputs)
    module = module.eval().cuda().to(dtype)
    x = torch.randn(*rows, inputs, device="cuda", dtype=dtype)
    program = torch.export.export(module, (x,), strict=False)
    assert geglu.fuse(program.graph) == 1
    with inductor.scratch_for_all():
        file = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "geglu.pt2"))
    made = torch._inductor.aoti_load_package(file)(x)
    normed = module.norm(x).double()  # rounded, as the product reads it
    value, gate = F.linear(normed, module.proj.weight.double(), module.proj.bias.double()).chunk(2, -1)
    wanted = value * F.gelu(gate)
    return ((made.double() - wanted).norm() / wanted.norm()).item()


@torch.no_grad()
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [((2, 1024), 1280, 5120), ((2, 4096), 640, 2560), ((1, 1009), 1280, 5120), ((3, 77), 128, 384)],
)
def test_compiled_code_agrees_with_float64(rows: tuple[int, ...], inputs: int, outputs: int, tmp_path: Path) -> None:
    assert compiled(rows, inputs, outputs, torch.float16, tmp_path) < 6e-4


@torch.no_grad()
def test_bfloat16(tmp_path: Path) -> None:
    assert compiled((2, 1024), 640, 2560, torch.bfloat16, tmp_path) < 6e-3

"""The torch backend's packages: free of weights, and every tensor of a checkpoint reaches them."""

import importlib.util
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import runtimes
from exporters import sdxl, torch_package
from exporters.base import ExportError, Request
from exporters.torch_package import GPU_IMPORTS, IMPORTS, TorchExporter
from tests.exporters import perturbation

CPU = Request(width=64, height=64, batch=1, precision="fp32", device="cpu", target="cpu-avx2")


def attach(engine: Any, constants: Mapping[str, Tensor]) -> Any:
    """Writes constants into the engine's own, in place, as their memory lies."""
    for name, tensor in constants.items():
        engine.constants[name].copy_(tensor)
    return engine


@pytest.mark.slow
@pytest.mark.parametrize("component", [c.name for c in sdxl.COMPONENTS])
def test_perturbing_any_single_tensor_gives_eagers_result(
    component: str, micro_encoder_artifact: Path, micro_model: Path
) -> None:
    perturbation.check(component, micro_encoder_artifact, micro_model, attach)


def unpacked(package: Path) -> bytes:
    """All that a package holds, as it is after unpacking."""
    with zipfile.ZipFile(package) as files:
        return b"".join(files.read(name) for name in files.namelist())


@pytest.mark.slow
def test_packages_hold_what_runs_and_nothing_else(tiny_artifact: Path) -> None:
    for path in sorted(tiny_artifact.glob("*.pt2")):
        with zipfile.ZipFile(path) as package:
            names = package.namelist()
            library = package.read(next(name for name in names if name.endswith(".so")))
            sources = [package.getinfo(name).file_size for name in names if name.endswith(".cpp")]
        assert sources and not any(sources)  # torch 2.11 finds the metadata by their names
        assert not [name for name in names if name.endswith(".o")]
        assert b"libstdc++.so" in library and b".debug_info" not in library and b"\0.symtab\0" not in library
        assert path.stat().st_size < 1e6, path.name  # 4.6 MB with sources and symbols, uncompressed


@pytest.mark.slow
def test_packages_hold_no_weights(micro_artifact: Path, tiny_artifact: Path) -> None:
    artifact = runtimes.load(tiny_artifact).artifacts[0]
    for name, described in artifact.manifest.components.items():
        for variant in described.variants.values():
            package = unpacked(tiny_artifact / variant.file)
            engine = artifact.engine(name, next(v for v, d in described.variants.items() if d is variant))
            for constant, tensor in engine.constants.items():  # type: ignore[attr-defined]
                flat = tensor.as_strided((tensor.numel(),), (1,)) if tensor.is_contiguous() else tensor.flatten()
                if flat.numel() >= 16 and float(flat[:16].std()) > 0:  # ones and zeros are anywhere
                    assert flat[:16].contiguous().numpy().tobytes() not in package, constant


@pytest.mark.slow
def test_small_tensors_are_stored_padded(micro_artifact: Path) -> None:
    described = runtimes.load(micro_artifact).artifacts[0].manifest.components
    shapes = {n: t.shape for c in described.values() for n, t in c.tensors.items()}
    assert shapes["model.conv_out.parametrizations.bias.original"] == (16,)
    assert all(torch.Size(shape).numel() > 8 for shape in shapes.values())


def test_a_half_precision_cpu_build_is_refused() -> None:
    request = Request(width=64, height=64, batch=1, precision="fp16", device="cpu", target="cpu-avx2")
    with pytest.raises(ExportError, match="fp32 on a CPU, not in fp16"):
        TorchExporter().check_request(request)


def test_no_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ExportError, match="'no-such-compiler' is not on the path"):
        TorchExporter().check_request(CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_told() -> None:
    request = Request(width=64, height=64, batch=1, precision="fp16", device="cuda:0", target="sm90")
    with pytest.raises(ExportError, match="sees none here"):
        TorchExporter().check_request(request)


def test_what_compilers_import_is_there_and_imported_for_them() -> None:
    own = "exporters."  # those want Triton
    missing = [n for n in (*IMPORTS, *GPU_IMPORTS) if not n.startswith(own) and importlib.util.find_spec(n) is None]
    assert missing == [], "another torch may lack some, the tested ones have all"
    program = "import sys; from exporters.torch_package import *; TorchExporter().prepare('cpu'); "
    program += "assert {*IMPORTS} <= sys.modules.keys(); import os; assert len(os.listdir('/proc/self/task')) == 1"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_weights_of_what_leads_to_no_output_are_not_read() -> None:
    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            self.unused(x)
            return (self.used(x),)

    program = torch.export.export(Both(), (torch.zeros(1, 2),), strict=False)
    assert torch_package._constants(program, "both") == {"used.weight", "used.bias"}

"""The torch backend's packages: free of weights, and every tensor of a checkpoint reaches them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import runtimes
from buildtool import models
from exporters import sdxl, weights
from exporters.base import ExportError, Request, StoredTensor
from exporters.torch_package import TorchExporter

CPU = Request(width=64, height=64, batch=1, precision="fp32", device="cpu", target="cpu-avx2")


def attach(engine: Any, described: Any, source: Mapping[str, Tensor], changed: str) -> None:
    """Writes the stored tensors that hold ``changed`` into the engine's constants, in place."""
    for constant, stored in engine_constants(engine, described):
        plan = described.tensors[stored]
        if changed in plan.sources:
            layout = StoredTensor(plan.shape, plan.dtype, plan.stride, plan.sources)
            data = weights.physical(stored, layout, source)
            engine.constants[constant].as_strided((data.numel(),), (1,)).copy_(data)


def engine_constants(engine: Any, described: Any) -> list[tuple[str, str]]:
    (variant,) = [v for v in described.variants.values() if v.inputs == engine.inputs]
    return list(variant.constants.items())


@pytest.mark.slow
@pytest.mark.parametrize("component", [c.name for c in sdxl.COMPONENTS])
@torch.no_grad()
def test_perturbing_any_single_tensor_gives_eagers_result(
    component: str, micro_artifact: Path, micro_model: Path
) -> None:
    row = sdxl.component(component)
    source = models.resolve(str(micro_model))
    tensors = {name: t.clone() for name, t in source.tensors(row.source).items()}
    reference = row.reference(source.configs[row.source], {n: t.clone() for n, t in tensors.items()}, "cpu")
    parameters = dict(reference.named_parameters())
    artifact = runtimes.load(micro_artifact).artifacts[0]
    engine = artifact.unchecked_engine(component, row.variants[-1])
    described = artifact.manifest.components[component]
    inputs = sdxl.example_inputs(row, source.configs, CPU, row.variants[-1], seed=1)
    generator = torch.Generator().manual_seed(0)

    base = [t.clone() for t in reference(**inputs)]
    mattered = 0
    for name, original in tensors.items():
        changed = original + 0.5 * original.std().clamp(min=0.1) * torch.randn(original.shape, generator=generator)
        spelled = next(n for n in (f"model.{name}", f"model.{name.removeprefix('text_model.')}") if n in parameters)
        parameters[spelled].copy_(changed)
        attach(engine, described, {**tensors, name: changed}, name)
        wanted, made = reference(**inputs), engine(**inputs)
        for before, want, got in zip(base, wanted, made, strict=True):
            assert float((got - want).norm() / want.norm()) < 1e-4, name
            mattered += float((want - before).norm() / before.norm()) > 1e-3
        parameters[spelled].copy_(original)
        attach(engine, described, tensors, name)
    for before, got in zip(base, engine(**inputs), strict=True):
        assert float((got - before).norm() / before.norm()) < 1e-4
    assert mattered > len(tensors) * 0.4  # the rest: an encoder nobody asked, biases that softmax cancels


@pytest.mark.slow
def test_packages_hold_no_weights(micro_artifact: Path, tiny_artifact: Path) -> None:
    artifact = runtimes.load(tiny_artifact).artifacts[0]
    for name, described in artifact.manifest.components.items():
        for variant in described.variants.values():
            package = (tiny_artifact / variant.file).read_bytes()
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

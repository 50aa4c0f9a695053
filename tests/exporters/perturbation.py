"""Every tensor of a checkpoint reaches the engine: each is changed in turn and compared with eager."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import runtimes
from buildtool import models
from exporters import sdxl, weights
from exporters.base import Request, StoredTensor

REQUEST = Request(width=64, height=64, batch=1, precision="fp32", device="cpu", target="cpu-avx2")
Attach = Callable[[Any, Mapping[str, Tensor]], Any]
"""(engine, changed constants by the code's names) -> an engine that has them."""


@torch.no_grad()
def check(component: str, artifact_folder: Path, model: Path, attach: Attach) -> None:
    """The last variant of a component of the micro model, for each of its source tensors."""
    row = sdxl.component(component)
    source = models.resolve(str(model))
    tensors = {name: t.clone() for name, t in source.tensors(row.source).items()}
    reference = row.reference(source.configs[row.source], {n: t.clone() for n, t in tensors.items()}, "cpu")
    parameters = dict(reference.named_parameters())
    artifact = runtimes.load(artifact_folder).artifacts[0]
    engine = artifact.unchecked_engine(component, row.variants[-1])
    described = artifact.manifest.components[component]
    inputs = sdxl.example_inputs(row, source.configs, REQUEST, row.variants[-1], seed=1)
    generator = torch.Generator().manual_seed(0)

    base = [t.clone() for t in reference(**inputs)]
    mattered = 0
    restored: dict[str, Tensor] = {}  # of the tensor before: an engine that is made anew is made once for both
    for name, original in tensors.items():
        changed = original + 0.5 * original.std().clamp(min=0.1) * torch.randn(original.shape, generator=generator)
        spelled = next(n for n in (f"model.{name}", f"model.{name.removeprefix('text_model.')}") if n in parameters)
        parameters[spelled].copy_(changed)
        holding = _holding(described, row.variants[-1], name, {**tensors, name: changed})
        engine = attach(engine, {**restored, **holding})
        wanted, made = reference(**inputs), engine(**inputs)
        for before, want, got in zip(base, wanted, made, strict=True):
            assert float((got - want).norm() / want.norm()) < 1e-4, name
            mattered += float((want - before).norm() / before.norm()) > 1e-3
        parameters[spelled].copy_(original)
        restored = _holding(described, row.variants[-1], name, tensors)
    engine = attach(engine, restored)
    for before, got in zip(base, engine(**inputs), strict=True):
        assert float((got - before).norm() / before.norm()) < 1e-4
    assert mattered > len(tensors) * 0.4  # the rest: an encoder nobody asked, biases that softmax cancels


def _holding(described: Any, variant: str, changed: str, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The constants that hold a source tensor, as the weights file would give them."""
    found = {}
    for constant, stored in described.variants[variant].constants.items():
        plan = described.tensors[stored]
        if changed in plan.sources:
            layout = StoredTensor(plan.shape, plan.dtype, plan.stride, plan.sources)
            found[constant] = weights.physical(stored, layout, source).as_strided(plan.shape, plan.stride)
    return found

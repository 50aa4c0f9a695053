"""What several of the GPU's tests need."""

import subprocess
from typing import Any

import torch
from torch import Tensor

DEVICE = torch.device("cuda", 0)


def random_inputs(engine: Any, seed: int = 0) -> dict[str, Tensor]:
    """Unit-normal numbers and small token ids, the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for spec in engine.inputs:
        dtype = getattr(torch, spec.dtype)
        if dtype.is_floating_point:
            tensor = torch.randn(spec.shape, generator=generator).to(dtype)
        else:
            tensor = torch.randint(0, 100, spec.shape, generator=generator, dtype=dtype)
        made[spec.name] = tensor.to(engine.device)
    return made


def outputs(engine: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Copies of what an engine makes of some inputs."""
    return [out.clone() for out in engine(**inputs)]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def all_engines(artifact: Any) -> list[Any]:
    names = [(name, variant) for name, c in artifact.manifest.components.items() for variant in c.variants]
    return [artifact.engine(*name) for name in names]


def held_weights(pipeline: Any) -> int:
    """Bytes of weights on the device, as the runtime counts them; artifacts of one pipeline share the count."""
    stores = {id(artifact._weights): artifact._weights for artifact in pipeline.artifacts}
    return sum(int(store.bytes) for store in stores.values())


def stored(artifact: Any, component: str) -> dict[str, Tensor]:
    """A component's tensors on the device, those that its engines read."""
    found: dict[str, Tensor] = artifact._weights.tensors(artifact.folder, artifact.manifest, component)
    return found


def psnr(one: Tensor, two: Tensor) -> float:
    """Decibels between pictures in 0…1; at 50 they differ by 0.8 of 255 grey levels (root mean square)."""
    error = (one.double().cpu() - two.double().cpu()).square().mean()
    return float(-10 * torch.log10(error)) if error > 0 else float("inf")


def relative(one: Tensor, two: Tensor) -> float:
    """||one - two|| / ||two||"""
    one, two = one.double().cpu(), two.double().cpu()
    return float((one - two).norm() / two.norm())


def only_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line with which a command refused."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1, done.stderr
    assert len(lines) == 1 and lines[0].startswith("Error: "), done.stderr
    return lines[0]

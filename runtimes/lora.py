"""LoRA at run time: low-rank products added to weights where they lie, and taken out again bit by bit.

Compiled code and CUDA graphs hold the weights' addresses, so all variants and resolutions see the change at their
next call. The original bits come from the artifact's weights file, which the page cache has: nothing is kept.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from buildtool.store.lora import Lora
from runtimes import lora_names
from runtimes.artifact import Artifact

Place = tuple[str, str, str]
"""Digest of a weights file, component, stored tensor."""


@dataclass(frozen=True)
class _Addition:
    """``factor * up @ down`` for some rows of a stored tensor."""

    start: int
    up: Tensor
    down: Tensor
    factor: float


class Loras:
    """The LoRAs that are in the weights of some artifacts, which share them.

    Args:
        artifacts: of one pipeline.
    """

    def __init__(self, artifacts: Sequence[Artifact]) -> None:
        self._artifacts = artifacts
        self._changed: set[Place] = set()
        self.active: tuple[Lora, ...] | None = ()
        """What is in the weights; None where a change was cut off."""

    @torch.inference_mode()  # the weights may have been loaded in it, and then only it may change them
    def use(self, loras: Sequence[Lora]) -> None:
        """Puts exactly these LoRAs into the weights; what was in them before is taken out first.

        Every changed tensor is computed anew, in fp32 from its original bits, and rounded once.

        Raises:
            SdxlError: a file is no LoRA of this model, or the artifact's weights can't be changed. Nothing is then.
        """
        wanted = tuple(loras)
        additions = self._additions(wanted)
        for artifact in self._artifacts:  # a check compares with the weights that the artifact was built with
            _check_deferred(artifact)
        places = self._changed | additions.keys()
        tensors: dict[Place, Tensor] = {}
        for artifact, component, here in self._components(places):
            stored = artifact.tensors(component)
            tensors |= {place: stored[place[2]] for place in here}
        self.active = None
        for artifact, component, here in self._components(self._changed):
            artifact.restore(component, [name for _, _, name in here])
        self._changed |= additions.keys()
        for place, some in additions.items():
            _add(tensors[place], some)
        if self._artifacts[0].device.type == "cuda":
            torch.cuda.synchronize(self._artifacts[0].device)
        self._changed, self.active = set(additions), wanted

    def _additions(self, loras: Sequence[Lora]) -> dict[Place, list[_Addition]]:
        from safetensors import safe_open

        found: dict[Place, list[_Addition]] = {}
        for lora in loras:
            opened: Any = safe_open(lora.path, framework="pt", device="cpu")
            done: set[Place] = set()
            for artifact in self._artifacts:
                manifest, device = artifact.manifest, artifact.device
                for component, rows in lora_names.places(lora.path, manifest).items():
                    digest = manifest.files[manifest.components[component].weights].sha256
                    fresh = [row for row in rows if (digest, component, row.stored) not in done]
                    for row in fresh:
                        up, down = (opened.get_tensor(n).to(device) for n in (row.product.up, row.product.down))
                        addition = _Addition(row.start, up, down, lora.scale * row.product.factor)
                        found.setdefault((digest, component, row.stored), []).append(addition)
                    done |= {(digest, component, row.stored) for row in fresh}
        return found

    def _components(self, places: Collection[Place]) -> Iterator[tuple[Artifact, str, list[Place]]]:
        """Each weights file of some places once: an artifact and its component, and the places there."""
        seen = set()
        for artifact in self._artifacts:
            for component, described in artifact.manifest.components.items():
                digest = artifact.manifest.files[described.weights].sha256 if described.weights else ""
                here = [place for place in places if place[:2] == (digest, component)]
                if here and (digest, component) not in seen:
                    seen.add((digest, component))
                    yield artifact, component, here


def _add(stored: Tensor, additions: Sequence[_Addition]) -> None:
    """Adds products to a tensor's rows, in place: in fp32, rounded once.

    Only those rows are held in fp32: a stored tensor may join the weights of every block.
    """
    parts: dict[tuple[int, int], list[_Addition]] = {}
    for addition in additions:
        parts.setdefault((addition.start, addition.up.shape[0]), []).append(addition)
    for (start, count), some in parts.items():
        rows = stored[start : start + count]
        exact = rows.float()  # itself, if it is fp32 already
        for addition in some:
            product = addition.up.flatten(1).float() @ addition.down.flatten(1).float()
            exact.add_(product.view(rows.shape), alpha=addition.factor)
        if exact is not rows:
            rows.copy_(exact)


def _check_deferred(artifact: Artifact) -> None:
    for name, component in artifact.manifest.components.items():
        for variant, form in component.variants.items():
            if form.check.status == "deferred":
                artifact.engine(name, variant)

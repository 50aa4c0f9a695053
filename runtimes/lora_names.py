"""Where a LoRA's products go in an artifact's weights. Read before torch is imported."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from buildtool.store import lora
from buildtool.store.errors import SdxlError
from buildtool.store.lora import Lora, Product
from buildtool.store.manifest import Component, Manifest, StoredTensor
from runtimes.gpu_upload import LOADERS


@dataclass(frozen=True)
class Rows:
    """A product, and the stored tensor and its first row that it is added to."""

    stored: str
    start: int
    product: Product


def check(loras: Sequence[Lora], manifest: Manifest) -> None:
    """Raises:
    SdxlError: the artifact's weights can't be changed, or a file is no LoRA of its model.
    """
    for each in loras:
        places(each.path, manifest, f" --lora {shlex.quote(str(each))}")


def places(path: Path, manifest: Manifest, option: str = " --lora FILE[:SCALE]") -> dict[str, list[Rows]]:
    """Where a LoRA's products go: component -> rows of its stored tensors.

    Args:
        option: the build's option for it, for the message.

    Raises:
        SdxlError: the artifact's weights can't be changed, or the file is no LoRA of its model.
    """
    fixed = [c.loader for n, c in manifest.components.items() if n in lora.COMPONENTS and c.loader not in LOADERS]
    if fixed:
        raise SdxlError(
            f"A LoRA can't go into an artifact of the {manifest.key.backend} backend: its engines hold their weights.",
            f"Build it in: {shlex.join(manifest.command)}{option}",
        )
    if any(stored.recipe for c in manifest.components.values() for stored in c.tensors.values()):
        raise SdxlError(
            "A LoRA can't go into an fp8 artifact: its weights are rounded, and would not come back.",
            f"Build it in: {shlex.join(manifest.command)}{option}",
        )
    rows = {n: stored_rows(c) for n, c in manifest.components.items() if n in lora.COMPONENTS}
    sizes = {name: {source: size for source, (_, _, size) in some.items()} for name, some in rows.items()}
    layers = manifest.key.configs.get("unet", {}).get("layers_per_block", 2)
    found = lora.products(path, sizes, layers, _unread(sizes, manifest))
    return {
        component: [Rows(*rows[component][source][:2], product) for source, product in products.items()]
        for component, products in found.items()
    }


def _unread(sizes: lora.Sizes, manifest: Manifest) -> dict[str, list[str]]:
    """The first text encoder's last layer: SDXL reads what goes into it."""
    if "text_encoder" not in sizes:
        return {}
    first, last = "text_model.encoder.layers.0.", manifest.key.configs["text_encoder"]["num_hidden_layers"] - 1
    layer = [name.removeprefix(first) for name in sizes["text_encoder"] if name.startswith(first)]
    return {"text_encoder": [f"text_model.encoder.layers.{last}.{name}" for name in layer]}


def stored_rows(component: Component) -> dict[str, tuple[str, int, tuple[int, int]]]:
    """Matrix or convolution of the checkpoint -> the stored tensor that holds it, its first row there, its size."""
    whose = {source: stored for stored in component.tensors.values() for source in stored.sources}
    found = {}
    for name, stored in component.tensors.items():
        if len(stored.shape) < 2:
            continue
        start, columns = 0, math.prod(stored.shape[1:])
        for source in stored.sources:
            count = _count(source, stored, whose)
            found[source] = (name, start, (count, columns))
            start += count
        if start != stored.shape[0]:
            raise RuntimeError(f"the sources of {name} have {start} rows, it has {stored.shape[0]}")
    return found


def _count(source: str, stored: StoredTensor, whose: Mapping[str, StoredTensor]) -> int:
    """Rows of one of the sources that a stored tensor joins. Those of different sizes are told by a neighbour:
    a residual block's time projection is as wide as its first convolution, k and v as wide as q.
    """
    for ending, neighbour in (
        ("time_emb_proj.weight", "conv1.weight"),
        ("attn2.to_k.weight", "attn2.to_q.weight"),
        ("attn2.to_v.weight", "attn2.to_q.weight"),
    ):
        other = whose.get(source.removesuffix(ending) + neighbour) if source.endswith(ending) else None
        if other is not None and len(other.sources) == 1:
            return other.shape[0]
    return stored.shape[0] // len(stored.sources)

"""Where a LoRA's products go in an artifact's weights. Read before torch is imported."""

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
            f"A LoRA can't go into an artifact of the {manifest.key.backend} backend, whose engines hold their weights.",
            f"Build it in: {shlex.join(manifest.command)}{option}",
        )
    components = {name: c for name, c in manifest.components.items() if name in lora.COMPONENTS}
    names = {name: [s for t in c.tensors.values() for s in t.sources] for name, c in components.items()}
    layers = manifest.key.configs.get("unet", {}).get("layers_per_block", 2)
    found = lora.products(path, names, layers, _unread(names, manifest))
    return {name: _rows(path, components[name], products) for name, products in found.items()}


def _unread(names: Mapping[str, Sequence[str]], manifest: Manifest) -> dict[str, list[str]]:
    """The first text encoder's last layer: SDXL reads what goes into it."""
    if "text_encoder" not in names:
        return {}
    first, last = "text_model.encoder.layers.0.", manifest.key.configs["text_encoder"]["num_hidden_layers"] - 1
    layer = [name.removeprefix(first) for name in names["text_encoder"] if name.startswith(first)]
    return {"text_encoder": [f"text_model.encoder.layers.{last}.{name}" for name in layer]}


def _rows(path: Path, component: Component, products: Mapping[str, Product]) -> list[Rows]:
    whose = {source: tensor for stored in component.tensors.values() for source in stored.sources for tensor in [stored]}
    found = []
    for name, stored in component.tensors.items():
        if not products.keys() & set(stored.sources):
            continue
        start, columns = 0, _numel(stored) // stored.shape[0]
        for source in stored.sources:
            count = _count(source, stored, whose)
            product = products.get(source)
            if product is not None:
                if (product.rows, product.columns) != (count, columns) or len(stored.shape) < 2:
                    raise SdxlError(
                        f"{path}: {product.up} and {product.down} make ({product.rows}, {product.columns}); "
                        f"{source} is ({count}, {columns}).",
                        "It was made for another model.",
                    )
                found.append(Rows(name, start, product))
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


def _numel(stored: StoredTensor) -> int:
    count = 1
    for size in stored.shape:
        count *= size
    return count

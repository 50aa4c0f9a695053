"""``--lora``: low-rank products added to a checkpoint's weights as they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from buildtool.checkpoint import digests
from buildtool.checkpoint.folder import Loader
from buildtool.models import Source
from buildtool.store import lora
from buildtool.store.errors import SdxlError
from buildtool.store.key import digest_of

if TYPE_CHECKING:
    import torch

    from buildtool.store.lora import Lora, Product


def fuse(source: Source, texts: Sequence[str], progress: digests.Progress | None = None) -> tuple[Source, list[Any]]:
    """A checkpoint with LoRAs added to its weights, and what the artifact's key says of them.

    Reads headers and digests alone: the products are computed when a tensor is asked for. The digests of the
    components that change are new ones; the others' weights are shared with artifacts that have no LoRA.

    Args:
        texts: ``FILE`` or ``FILE:SCALE`` each.

    Raises:
        SdxlError: there is no such file, or it is no LoRA.
    """
    loras = [lora.parse(text) for text in texts]
    for each in loras:
        if absent := lora.touched(each.path) - source.weights.keys():
            raise SdxlError(
                f"The LoRA {each.path} is for a {', '.join(sorted(absent))}, which {source.model} doesn't have.",
                "Leave it out.",
            )
    told = [{"sha256": digests.of_file(each.path, progress), "scale": each.scale} for each in loras]
    weights, parts = dict(source.weights), dict(source._parts)

    @cache
    def products() -> list[dict[str, dict[str, Product]]]:
        return [_products(source, each) for each in loras]

    for component in {name for each in loras for name in lora.touched(each.path)}:
        weights[component] = digest_of({"weights": weights[component], "loras": told})
        parts[component] = replace(
            parts[component], digest=weights[component], load=_loader(parts[component].load, component, loras, products)
        )
    return replace(source, weights=weights, _parts=parts), told


def check(source: Source, texts: Sequence[str]) -> None:
    """Raises:
    SdxlError: a file has keys that are for no tensor of the checkpoint, or of other shapes.
    """
    for text in texts:
        _products(source, lora.parse(text))


def _products(source: Source, of: Lora) -> dict[str, dict[str, Product]]:
    from buildtool.checkpoint.tensors import module_shapes

    sizes = {}
    for component in [name for name in lora.COMPONENTS if name in source.configs]:
        shapes = module_shapes(component, source.configs[component])
        sizes[component] = {n: (s[0], math.prod(s[1:])) for n, s in shapes.items() if len(s) > 1}
    return lora.products(of.path, sizes, source.configs["unet"]["layers_per_block"])


def _loader(base: Loader, component: str, loras: Sequence[Lora], products: Any) -> Loader:
    def load() -> Mapping[str, torch.Tensor]:
        from safetensors import safe_open

        from buildtool.checkpoint.tensors import LazyTensors

        tensors = base()
        opened: list[Any] = [safe_open(each.path, framework="pt", device="cpu") for each in loras]

        def get(name: str) -> torch.Tensor:
            weight = tensors[name]
            for each, file, found in zip(loras, opened, products(), strict=True):
                product = found.get(component, {}).get(name)
                if product is not None:
                    up, down = (file.get_tensor(n).flatten(1).float() for n in (product.up, product.down))
                    weight = weight.float().add((up @ down).view(weight.shape), alpha=each.scale * product.factor)
            return weight

        return LazyTensors({name: partial(get, name) for name in tensors})

    return load

"""Which sizes artifacts make: each its own, and those of trt's ``--dynamic`` any of a range. Imports no torch."""

import shlex
from collections.abc import Sequence
from typing import Any

import msgspec

from buildtool.store.manifest import Manifest, TensorSpec, Variant

Size = tuple[int, int]
SIZED = ("unet", "vae_decoder")


def own(manifest: Manifest) -> Size:
    """(width, height) that the artifact was built at."""
    return manifest.key.width, manifest.key.height


def step(manifest: Manifest) -> int:
    """Pixels that the sides of a range's sizes are a multiple of: the UNet halves latents between its blocks."""
    halvings = len(manifest.key.configs["unet"]["block_out_channels"]) - 1
    return int(manifest.pipeline.vae_scale_factor * 2**halvings)


def makes(manifest: Manifest, size: Size) -> bool:
    """Whether an artifact makes (width, height)."""
    if size == own(manifest):
        return True
    limits = _limits(manifest)
    if limits is None:
        return False
    each = step(manifest)
    return all(
        low <= side <= high and side % each == 0 for low, side, high in zip(limits[0], size, limits[1], strict=True)
    )


def find(manifests: Sequence[Manifest], size: Size) -> int | None:
    """Which of some artifacts makes (width, height): one that was built at it before one whose range holds it."""
    fitting = [i for i, manifest in enumerate(manifests) if makes(manifest, size)]
    return next((i for i in fitting if own(manifests[i]) == size), fitting[0] if fitting else None)


def described(manifests: Sequence[Manifest]) -> str:
    """What some artifacts make, for messages: ``1024x1024, 768x768..1344x1344 in steps of 32``."""
    return ", ".join(_described(manifest) for manifest in manifests)


def _described(manifest: Manifest) -> str:
    limits = _limits(manifest)
    if limits is None:
        return "{}x{}".format(*own(manifest))
    (low, high), each = limits, step(manifest)
    return f"{low[0]}x{low[1]}..{high[0]}x{high[1]} in steps of {each}"


def build_command(manifest: Manifest, size: Size) -> str:
    """The command that built an artifact, for another (width, height) and no range."""
    words = list(manifest.command)
    for option in ("--resolution", "--dynamic"):
        while option in words:
            i = words.index(option)
            del words[i : i + 2]
    return shlex.join([*words, "--resolution", "{}x{}".format(*size)])


def resized(manifest: Manifest, size: Size) -> Manifest:
    """The manifest as if the artifact had been built at another size of its range."""
    key = msgspec.structs.replace(manifest.key, width=size[0], height=size[1])
    components = dict(manifest.components)
    for name in SIZED:
        variants = {n: _resized(form, own(manifest), size) for n, form in components[name].variants.items()}
        components[name] = msgspec.structs.replace(components[name], variants=variants)
    return msgspec.structs.replace(manifest, key=key, components=components)


def _limits(manifest: Manifest) -> tuple[Size, Size] | None:
    sizes: Any = manifest.key.options.get("dynamic")
    return None if sizes is None else (tuple(sizes["min"]), tuple(sizes["max"]))


def _resized(form: Variant, before: Size, size: Size) -> Variant:
    inputs, outputs = (
        tuple(_scaled(spec, before, size) if len(spec.shape) == 4 else spec for spec in specs)
        for specs in (form.inputs, form.outputs)
    )
    return msgspec.structs.replace(form, inputs=inputs, outputs=outputs)


def _scaled(spec: TensorSpec, before: Size, size: Size) -> TensorSpec:
    """A contiguous (B, C, H, W) of pictures of one size, for another."""
    batch, channels, rows, columns = spec.shape
    rows, columns = rows * size[1] // before[1], columns * size[0] // before[0]
    strides = (channels * rows * columns, rows * columns, columns, 1)
    return msgspec.structs.replace(spec, shape=(batch, channels, rows, columns), stride=strides)

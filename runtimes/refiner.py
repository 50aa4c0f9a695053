"""A refiner, and what it needs of the model that it goes on from. Read before torch is imported."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from buildtool.store import lora
from buildtool.store.errors import SdxlError
from buildtool.store.lora import Lora
from buildtool.store.manifest import Manifest
from runtimes import sizes

STRENGTH = 0.3
"""Of a refinement that isn't told another one: that of diffusers' image to image."""


def is_refiner(manifest: Manifest) -> bool:
    """Whether an artifact's model is a refiner: it has the second text encoder alone, and reads an aesthetic score
    in place of the target size."""
    configs = manifest.key.configs
    return "text_encoder_2" in configs and "text_encoder" not in configs


def require_start(manifest: Manifest, image: Any) -> None:
    """Raises:
    SdxlError: the artifact is a refiner, which draws nothing from a prompt alone, and there is no picture.
    """
    if image is None and is_refiner(manifest):
        raise SdxlError(
            f"{manifest.key.model} is a refiner: it goes on from a picture, and draws none from a prompt alone.",
            "Beside a base model: sdxl-run --engine BASE --refiner DIR. From a picture: --image FILE (Python: image=).",
        )


def find(refiners: Sequence[Manifest], base: Manifest, size: sizes.Size) -> Manifest:
    """The refiner's artifact that goes on from what ``base`` makes of (width, height).

    Raises:
        SdxlError: none makes that size, or its latents are of another shape.
    """
    number = sizes.find(refiners, size)
    if number is None:
        raise SdxlError(
            f"No --refiner makes {size[0]}x{size[1]}; those given make {sizes.described(refiners)}.",
            f"Build one: {sizes.build_command(refiners[0], size)}",
        )
    found = refiners[number]
    ours, theirs = found.pipeline, base.pipeline
    if (ours.latent_channels, ours.vae_scale_factor) != (theirs.latent_channels, theirs.vae_scale_factor):
        raise SdxlError(
            f"{found.key.model} can't refine what {base.key.model} makes: its latents have {ours.latent_channels} "
            f"channels, one for {ours.vae_scale_factor} pixels, those {theirs.latent_channels}, one for "
            f"{theirs.vae_scale_factor}."
        )
    return found


def check_start(at: float | None, strength: float | None) -> None:
    """Raises:
    SdxlError: a picture to start from comes into the schedule (``strength``) after the base model leaves it (``at``).
    """
    if at is not None and strength is not None and strength <= 1 - at:
        raise SdxlError(
            f"With --strength {strength:g} a picture starts where --refine-at {at:g} has ended the base model's steps.",
            f"Take a --strength above {1 - at:g}, or leave --refiner out.",
        )


def check_loras(loras: Sequence[Lora], manifests: Sequence[Manifest], others: Sequence[Manifest]) -> None:
    """Raises:
    SdxlError: a LoRA changes weights in place that another model in memory reads too: a base and its refiner may share
        ``text_encoder_2``.
    """
    shared = _weights(manifests).items() & _weights(others).items()
    names = {component for component, _ in shared}
    for each in loras:
        if found := sorted(lora.touched(each.path) & names):
            raise SdxlError(
                f"The LoRA {each.path} changes {', '.join(found)}, whose weights the refiner reads too.",
                f"Build it in: {shlex.join(manifests[0].command)} --lora {shlex.quote(str(each))}",
            )


def _weights(manifests: Sequence[Manifest]) -> dict[str, str]:
    """Component -> digest of its weights file."""
    return {
        name: manifest.files[component.weights].sha256
        for manifest in manifests
        for name, component in manifest.components.items()
        if component.weights
    }


def split(arguments: Mapping[str, Any], at: float | None, strength: float | None) -> tuple[dict[str, Any], ...]:
    """The arguments of a base model's call as those of two: the base's, which leaves latents, and the refiner's, which
    gets them as ``image``.

    Args:
        at: fraction of the schedule where the refiner goes on from the base's latents.
        strength: instead of ``at``, how much of the base's picture the refiner makes anew.
    """
    first = {**arguments, "output_type": "latent"}
    kept = {name: value for name, value in arguments.items() if name not in ("image", "strength")}
    if at is None:
        return first, {**kept, "strength": strength}
    return {**first, "denoising_end": at}, {**kept, "denoising_start": at}

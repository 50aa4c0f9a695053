"""A picture as a run's start, as ``StableDiffusionXLImg2ImgPipeline`` prepares it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from runtimes import images, noise
from runtimes.artifact import Artifact


def pixels(image: Any, width: int, height: int) -> Tensor:
    """Pictures (N, 3, H, W) in -1…1, float32, on the CPU.

    Args:
        image: a PIL image, a list of them, or a tensor (N, 3, H, W) in 0…1. PIL images of another size are
            resized (Lanczos, without regard to their proportions).

    Raises:
        ValueError: something else, or a tensor of another shape.
    """
    if isinstance(image, Tensor):
        if image.ndim != 4 or tuple(image.shape[1:]) != (3, height, width):
            raise ValueError(f"image has shape {tuple(image.shape)}; {width}x{height} takes (N, 3, {height}, {width}).")
        return 2.0 * image.float().cpu() - 1.0
    from PIL import Image

    pictures = list(image) if isinstance(image, Sequence) else [image]
    if not pictures or not all(isinstance(picture, Image.Image) for picture in pictures):
        raise ValueError("image is a PIL image, a list of them, or a tensor (N, 3, H, W) in 0…1.")
    import numpy as np

    sized = [p.resize((width, height), Image.Resampling.LANCZOS).convert("RGB") for p in pictures]
    array = np.stack([np.array(picture).astype(np.float32) / 255.0 for picture in sized])
    return 2.0 * torch.from_numpy(array.transpose(0, 3, 1, 2)) - 1.0


def encode(artifact: Artifact, pictures: Tensor, count: int, generator: noise.Generators, dtype: torch.dtype) -> Tensor:
    """The loop's latents (count, C, h, w) of pictures (N, 3, H, W) in -1…1, on the artifact's device.

    N divides count; pictures are repeated. A list of generators draws each image's noise, one generator
    that of the N pictures, as in diffusers.
    """
    config = artifact.manifest.pipeline
    given = _moments(artifact, pictures.to(dtype))
    if isinstance(generator, Sequence):
        given = _repeated(given, count)
    if given.shape[1] == config.latent_channels:  # a tiny VAE answers with the latents themselves
        latents = given
    else:
        mean, logvar = given.chunk(2, dim=1)
        drawn = noise.randn(mean.shape, generator, given.device, given.dtype)
        latents = mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * drawn
    latents = latents.to(dtype)
    if config.latents_mean is not None and config.latents_std is not None:
        centre, spread = (
            torch.tensor(values, device=latents.device, dtype=dtype).view(1, -1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        latents = (latents - centre) * config.scaling_factor / spread
    else:
        latents = config.scaling_factor * latents
    return _repeated(latents, count)


def are_latents(artifact: Artifact, image: Any) -> bool:
    """Whether an image is one already encoded: a tensor with the latents' channels."""
    return (
        isinstance(image, Tensor) and image.ndim == 4 and image.shape[1] == artifact.manifest.pipeline.latent_channels
    )


def latents(artifact: Artifact, image: Any, count: int, generator: noise.Generators, dtype: torch.dtype) -> Tensor:
    """The loop's latents (count, C, h, w) of what a run starts from: pictures, or latents as they are."""
    width, height = artifact.size
    if not are_latents(artifact, image):
        return encode(artifact, pixels(image, width, height), count, generator, dtype)
    factor = artifact.manifest.pipeline.vae_scale_factor
    if tuple(image.shape[2:]) != (height // factor, width // factor):
        raise ValueError(f"image holds latents {tuple(image.shape)}; {width}x{height} takes another size.")
    return _repeated(image.to(device=artifact.device, dtype=dtype), count)


def _moments(artifact: Artifact, pictures: Tensor) -> Tensor:
    """The encoder's answer, in chunks of the artifact's batch."""
    engine = artifact.engine("vae_encoder")
    dtype = getattr(torch, engine.inputs[0].dtype)
    return images.in_batches(engine, pictures.to(device=artifact.device, dtype=dtype))


def _repeated(rows: Tensor, count: int) -> Tensor:
    """All rows again and again, up to ``count``.

    Raises:
        ValueError: they don't divide it.
    """
    if count % rows.shape[0]:
        raise ValueError(f"{rows.shape[0]} pictures to start from don't divide {count} images.")
    return torch.cat([rows] * (count // rows.shape[0]))

"""Latents to pictures: decoding in chunks, and diffusers' ``VaeImageProcessor.postprocess``."""

from typing import Any, Literal

import torch
from torch import Tensor

from runtimes import tiling
from runtimes.artifact import Artifact
from runtimes.base import Engine

OutputType = Literal["pil", "np", "pt", "latent"]


def decode(artifact: Artifact, latents: Tensor) -> Tensor:
    """Pixels (N, 3, H, W) in about -1…1 of the loop's latents (N, C, h, w), in chunks of the batch.

    Latents larger than the decoder's are decoded in tiles of its size.

    Raises:
        ValueError: not latents, or smaller than the artifact's in a direction.
    """
    config = artifact.manifest.pipeline
    engine = artifact.engine("vae_decoder")
    want = engine.inputs[0]
    tile = (want.shape[2], want.shape[3])
    if (
        latents.ndim != 4
        or latents.shape[1] != want.shape[1]
        or any(n < t for n, t in zip(latents.shape[2:], tile, strict=True))
    ):
        raise ValueError(
            f"latents have shape {tuple(latents.shape)}; this decoder takes (N, {want.shape[1]}, h, w) "
            f"from {tile[0]}x{tile[1]} on."
        )
    latents = latents.to(getattr(torch, want.dtype))
    if config.latents_mean is not None and config.latents_std is not None:
        mean, std = (
            torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        latents = latents * std / config.scaling_factor + mean
    else:
        latents = latents / config.scaling_factor
    return in_tiles(engine, latents, config.vae_scale_factor)


def in_tiles(engine: Engine, latents: Tensor, factor: int) -> Tensor:
    """Scaled latents (N, C, h, w) through a decoder, in tiles where they are larger than it takes."""
    height, width = engine.inputs[0].shape[2:]
    if tuple(latents.shape[2:]) == (height, width):
        return in_batches(engine, latents)
    return tiling.decode(lambda part: in_batches(engine, part), latents, (height, width), factor)


def in_batches(engine: Engine, rows: Tensor) -> Tensor:
    """Rows (N, …) through an engine of one input and one output, in chunks of its batch, the last one padded."""
    want, made = engine.inputs[0], []
    for part in torch.split(rows, want.shape[0]):
        count = part.shape[0]
        full = torch.cat([part, part[-1:].expand(want.shape[0] - count, *part.shape[1:])]).contiguous()
        made.append(engine(**{want.name: full})[0][:count].clone())
    return torch.cat(made)


def postprocess(pixels: Tensor, output_type: OutputType) -> Any:
    """Pixels (N, 3, H, W) in -1…1 to ``pt`` (N, 3, H, W) in 0…1, ``np`` (N, H, W, 3) or a list of PIL images."""
    pixels = (pixels * 0.5 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return pixels
    rows = pixels.permute(0, 2, 3, 1).float()
    if output_type == "np":
        return rows.cpu().numpy()
    from PIL import Image

    # Rounded where the pixels are: a quarter of the bytes comes to the host, and no core is busy with them.
    made = (rows * 255).round().to(torch.uint8).contiguous()  # channels last: Pillow copies anything else byte by byte
    return [Image.fromarray(picture) for picture in made.cpu().numpy()]

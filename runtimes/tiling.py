"""Latents larger than an artifact's through its VAE decoder: overlapping tiles of its full size, blended."""

from collections.abc import Callable

import torch
from torch import Tensor

OVERLAP = 0.25
"""Part of a tile that its neighbour covers too, at least; diffusers' ``tile_overlap_factor`` is the same."""


def starts(length: int, tile: int) -> list[int]:
    """Where tiles begin so that they cover ``length``: the first at 0, the last at ``length - tile``.

    They are as few as overlap by ``OVERLAP``, and evenly spaced, so that all overlap about equally.
    """
    steps = -(-(length - tile) // max(1, int(tile * (1 - OVERLAP))))
    return [i * (length - tile) // steps for i in range(steps + 1)] if steps else [0]


def decode(decode_tile: Callable[[Tensor], Tensor], latents: Tensor, tile: tuple[int, int], factor: int) -> Tensor:
    """Pixels (N, 3, H, W) of latents (N, C, h, w), float32.

    Every pixel is the mean of the tiles that cover it, weighted by its distances to their edges: no tile
    ends abruptly, so no seam shows.

    Args:
        decode_tile: latents (N, C, *tile) to pixels (N, 3, *tile times factor).
        tile: (height, width) of a tile in latents, at most those of ``latents``.
        factor: pixels to a latent in each direction.
    """
    height, width = (n * factor for n in tile)
    weight = torch.outer(_tent(height), _tent(width)).to(latents.device)
    count, _, rows, columns = latents.shape
    total = torch.zeros(1, 1, rows * factor, columns * factor, device=latents.device)
    pixels = torch.zeros(count, 3, rows * factor, columns * factor, device=latents.device)
    for y in starts(rows, tile[0]):
        for x in starts(columns, tile[1]):
            made = decode_tile(latents[:, :, y : y + tile[0], x : x + tile[1]])
            here = (..., slice(y * factor, y * factor + height), slice(x * factor, x * factor + width))
            pixels[here] += made.float() * weight
            total[here] += weight
    return pixels.div_(total)


def _tent(length: int) -> Tensor:
    """Pixels' distances to the nearer end, above 0 and at most 1."""
    at = torch.arange(length) + 0.5
    return torch.minimum(at, length - at) * 2 / length

"""Latents larger than an artifact's through its VAE decoder: overlapping tiles of its full size, blended.

A tile is normalised by its own statistics and not by those of the whole, so its colours are off: nine tenths of
the error of a bad picture is of low frequency. One more call decodes the whole latents, reduced to a tile: that picture
has the colours, the tiles have the details.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

OVERLAP = 0.25
"""Part of a tile that its neighbour covers too, at least; diffusers' ``tile_overlap_factor`` is the same."""

CELL = 2
"""Latents to a cell in each direction. Colours are compared as means of cells."""

REACH = 2
"""Cells to each side of one that its gain and offset come from."""

GUIDE_ERROR = 0.015
"""Standard deviation that the reduced picture's cells are taken to be wrong by, of pixels in -1…1."""


def starts(length: int, tile: int) -> list[int]:
    """Where tiles begin so that they cover ``length``: the first at 0, the last at ``length - tile``.

    They are as few as overlap by ``OVERLAP``, and evenly spaced, so that all overlap about equally.
    """
    steps = -(-(length - tile) // max(1, int(tile * (1 - OVERLAP))))
    return [i * (length - tile) // steps for i in range(steps + 1)] if steps else [0]


def decode(decode_tile: Callable[[Tensor], Tensor], latents: Tensor, tile: tuple[int, int], factor: int) -> Tensor:
    """Pixels (N, 3, H, W) of latents (N, C, h, w), float32.

    The tiles' colours are drawn towards those of the reduced whole, by as much as the tiles disagree where
    they overlap: tiles that agree give exactly the whole.

    Args:
        decode_tile: latents (N, C, *tile) to pixels (N, 3, *tile times factor).
        tile: (height, width) of a tile in latents, at most those of ``latents``.
        factor: pixels to a latent in each direction.
    """
    pixels, disagreement = _blend(decode_tile, latents, tile, factor)
    guide = decode_tile(_reduced(latents, tile)).float()
    gain, offset = _correction(pixels, guide, disagreement, CELL * factor)
    size = pixels.shape[2:]
    pixels *= functional.interpolate(gain, size, mode="bilinear")
    return pixels.add_(functional.interpolate(offset, size, mode="bilinear"))


def _blend(
    decode_tile: Callable[[Tensor], Tensor], latents: Tensor, tile: tuple[int, int], factor: int
) -> tuple[Tensor, Tensor]:
    """Tiles' mean at every pixel, and their disagreement (N, 3, 1, 1).

    Weights are distances to a tile's edges: no tile ends abruptly, so no seam shows. The disagreement is the root
    mean square difference of two tiles' colours (means over a latent's pixels) where tiles overlap.
    """
    height, width = (n * factor for n in tile)
    weight = torch.outer(_tent(height), _tent(width)).to(latents.device)
    count, _, rows, columns = latents.shape
    total = torch.zeros(1, 1, rows * factor, columns * factor, device=latents.device)
    pixels = torch.zeros(count, 3, rows * factor, columns * factor, device=latents.device)
    tiles = torch.zeros(1, 1, rows, columns, device=latents.device)
    colours = []
    for y in starts(rows, tile[0]):
        for x in starts(columns, tile[1]):
            made = decode_tile(latents[:, :, y : y + tile[0], x : x + tile[1]]).float()
            here = (..., slice(y * factor, y * factor + height), slice(x * factor, x * factor + width))
            pixels[here] += made * weight
            total[here] += weight
            place = (..., slice(y, y + tile[0]), slice(x, x + tile[1]))
            tiles[place] += 1
            colours.append((place, functional.avg_pool2d(made, factor)))
    pixels /= total
    mean, coarse = (functional.avg_pool2d(values, factor) for values in (pixels, total))
    share = functional.avg_pool2d(weight[None, None], factor)
    variance = torch.zeros_like(mean)
    for place, colour in colours:
        variance[place] += share / coarse[place] * (colour - mean[place]) ** 2
    # Two tiles that differ by d and fade into each other have the variance w (1 - w) d², d²/6 in the mean.
    overlaps = (tiles > 1).float()
    squared = 6 * (variance * overlaps).sum(dim=(2, 3), keepdim=True) / overlaps.sum().clamp(min=1)
    return pixels, squared.sqrt()


def _reduced(latents: Tensor, tile: tuple[int, int]) -> Tensor:
    """Whole latents in a tile's size. Means of latents vary less than latents: their deviation is made the whole's."""
    full = latents.float()
    small = functional.interpolate(full, tile, mode="area")
    (std, mean), (small_std, small_mean) = (
        torch.std_mean(values, dim=(2, 3), correction=0, keepdim=True) for values in (full, small)
    )
    return ((small - small_mean) * (std / small_std.clamp(min=1e-6)) + mean).to(latents.dtype)


def _correction(pixels: Tensor, guide: Tensor, disagreement: Tensor, cell: int) -> tuple[Tensor, Tensor]:
    """Gain and offset (N, 3, rows, columns) that bring ``pixels`` near ``guide`` around each cell.

    This is the guided filter (He, Sun and Tang, 2010) of the reduced picture with the blended one as its guide:
    colours change by colour, so an object's correction ends at its edge. A gain departs from 1 by about as much as
    tiles disagree, which makes the ridge (error of a cell / disagreement)². Of the correction that part is made which
    is expected to be right when cells are off by the disagreement and the guide by its error; its root mean square is
    at most the disagreement.
    """
    grid = (max(1, pixels.shape[2] // cell), max(1, pixels.shape[3] // cell))
    have, want = (functional.adaptive_avg_pool2d(values, grid) for values in (pixels, guide))
    source, target = _mean(have, 1), _mean(want, 1)
    at, to = _mean(source, REACH), _mean(target, REACH)
    trust = disagreement**2
    variance = _mean(source**2, REACH) - at**2
    covariance = _mean(source * target, REACH) - at * to
    gain = (covariance * trust + GUIDE_ERROR**2) / (variance * trust + GUIDE_ERROR**2)
    offset = _mean(to - gain * at, REACH)
    gain = _mean(gain, REACH)
    change = ((gain - 1) * have + offset).square().mean(dim=(2, 3), keepdim=True).sqrt()
    part = trust / (trust + GUIDE_ERROR**2) * (disagreement / change.clamp(min=1e-12)).clamp(max=1)
    return 1 + part * (gain - 1), part * offset


def _mean(values: Tensor, reach: int) -> Tensor:
    """Each cell's mean with those up to ``reach`` away, of those that there are."""
    return functional.avg_pool2d(values, 2 * reach + 1, stride=1, padding=reach, count_include_pad=False)


def _tent(length: int) -> Tensor:
    """Pixels' distances to the nearer end, above 0 and at most 1."""
    at = torch.arange(length) + 0.5
    return torch.minimum(at, length - at) * 2 / length

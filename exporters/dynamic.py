"""Engines for a range of sizes: what ``--dynamic`` says, and the shapes that follow from it. Imports nothing heavy."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from exporters.base import ExportError, TensorSpec

SIZED = ("sample", "latents")
"""Inputs whose last two dimensions are the picture's height and width, in latents."""
Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Smallest, best and largest shape of an input: TensorRT's optimization profile."""


def step(vae_scale_factor: int, unet: Mapping[str, Any]) -> int:
    """Pixels that both sides are a multiple of: the UNet halves its latents once less than it has blocks."""
    return int(vae_scale_factor * 2 ** (len(unet["block_out_channels"]) - 1))


def parse(text: str, step: int) -> dict[str, list[int]]:
    """``512x512..1024x1024`` as an artifact's key has it: ``{"min": [width, height], "max": [width, height]}``.

    Raises:
        ExportError: it is malformed, no range, or not of multiples of ``step``.
    """
    found = re.fullmatch(r"(\d+)x(\d+)\.\.(\d+)x(\d+)", text.strip().lower())
    if not found:
        raise ExportError(
            f"--dynamic {text!r} is no range of sizes; write MINxMIN..MAXxMAX in pixels.",
            "For example: --dynamic 768x768..1344x1344",
        )
    numbers = [int(each) for each in found.groups()]
    low, high = numbers[:2], numbers[2:]
    if any(number < 2 * step or number % step for number in numbers):  # of 1 torch would make a graph of its own
        raise ExportError(
            f"--dynamic {text}: every side has to be a multiple of {step}, and {2 * step} at least.",
            f"Try --dynamic {_size(_rounded(low, step))}..{_size(_rounded(high, step))}",
        )
    if any(least > most for least, most in zip(low, high, strict=True)) or low == high:
        raise ExportError(
            f"--dynamic {text}: {_size(low)} is not smaller than {_size(high)}.",
            f"For one size: --resolution {_size(high)}" if low == high else "Write the smaller size first.",
        )
    return {"min": low, "max": high}


def check_holds(sizes: Mapping[str, Sequence[int]], width: int, height: int, step: int) -> None:
    """Refuses a resolution that an engine is to be best at and can't make.

    Raises:
        ExportError: it is outside of the range, or no multiple of ``step``.
    """
    low, high = sizes["min"], sizes["max"]
    inside = low[0] <= width <= high[0] and low[1] <= height <= high[1]
    if inside and width % step == 0 and height % step == 0:
        return
    what = f"it has to be of multiples of {step}" if inside else "it has to lie in the range"
    raise ExportError(
        f"--dynamic {_size(low)}..{_size(high)} is built to be best at --resolution, and {width}x{height} can't be: "
        f"{what}.",
        f"Try --resolution {_size(high)}",
    )


def shapes(spec: TensorSpec, sizes: Mapping[str, Sequence[int]], width: int, height: int) -> Shapes:
    """The shapes of an input of :data:`SIZED`.

    Args:
        spec: at ``width`` x ``height`` pixels.
        sizes: as :func:`parse` gives it.
    """
    batch, channels, rows, columns = spec.shape

    def at(size: Sequence[int]) -> tuple[int, ...]:
        return (batch, channels, size[1] * rows // height, size[0] * columns // width)

    return at(sizes["min"]), spec.shape, at(sizes["max"])


def _rounded(size: Sequence[int], step: int) -> list[int]:
    return [max(2, round(number / step)) * step for number in size]


def _size(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"

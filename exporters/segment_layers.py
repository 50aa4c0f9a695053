"""The layers of SDXL's UNet by its config, and where a list of them is cut. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CROSS = "CrossAttn"


@dataclass(frozen=True)
class Layer:
    """What a UNet is cut between."""

    kind: str
    """``conv_in``, ``resnet``, ``attention``, ``downsampler`` or ``out``."""
    modules: tuple[str, ...]
    """Paths in the UNet, in the order in which they run; before a residual block, the upsampler that leads to it."""
    reads: tuple[int, ...]
    """Numbers of the layers whose output it takes: the one before it, then ``skip``."""
    channels: int
    level: int
    """How often its output's height and width are halved."""

    @property
    def skip(self) -> int | None:
        """The layer that it has a skip connection to."""
        return self.reads[1] if len(self.reads) > 1 else None


def layers(unet: Mapping[str, Any]) -> tuple[Layer, ...]:
    """A UNet's layers in the order in which they run, by its config."""
    made: list[Layer] = []

    def add(kind: str, *modules: str, channels: int, level: int, skip: int | None = None) -> int:
        number = len(made)
        reads = (*((number - 1,) if number else ()), *(() if skip is None else (skip,)))
        made.append(Layer(kind, modules, reads, channels, level))
        return number

    widths, per = unet["block_out_channels"], unet["layers_per_block"]
    skips = [add("conv_in", "conv_in", channels=widths[0], level=0)]
    for i, kind in enumerate(unet["down_block_types"]):
        here = {"channels": widths[i], "level": i}
        for j in range(per):
            number = add("resnet", f"down_blocks.{i}.resnets.{j}", **here)
            if kind.startswith(CROSS):
                number = add("attention", f"down_blocks.{i}.attentions.{j}", **here)
            skips.append(number)
        if i < len(widths) - 1:
            skips.append(add("downsampler", f"down_blocks.{i}.downsamplers.0", channels=widths[i], level=i + 1))
    deepest = {"channels": widths[-1], "level": len(widths) - 1}
    add("resnet", "mid_block.resnets.0", **deepest)
    add("attention", "mid_block.attentions.0", **deepest)
    add("resnet", "mid_block.resnets.1", **deepest)
    for i, kind in enumerate(unet["up_block_types"]):
        here = {"channels": widths[-1 - i], "level": len(widths) - 1 - i}
        for j in range(per + 1):
            upsampler = [f"up_blocks.{i - 1}.upsamplers.0"] if i and j == 0 else []
            add("resnet", *upsampler, f"up_blocks.{i}.resnets.{j}", skip=skips.pop(), **here)
            if kind.startswith(CROSS):
                add("attention", f"up_blocks.{i}.attentions.{j}", **here)
    add("out", "conv_norm_out", "conv_out", channels=unet["out_channels"], level=0)
    return tuple(made)


def cut(sizes: Sequence[int], count: int) -> list[int]:
    """Where ``count`` consecutive parts of a list end, the largest of which is as small as can be.

    Args:
        sizes: of the list's members, at least ``count``.
    """
    total = [0]
    for size in sizes:
        total.append(total[-1] + size)
    # best[end]: (largest part, sum of the parts' squares, where they end) for the members before `end`.
    best: dict[int, tuple[int, int, list[int]]] = {0: (0, 0, [])}
    for number in range(1, count + 1):
        last = len(sizes) if number == count else len(sizes) - (count - number)
        ends = range(last if number == count else number, last + 1)
        best = {end: min(_longer(best, total, start, end) for start in best if start < end) for end in ends}
    return best[len(sizes)][2]


def _longer(
    best: Mapping[int, tuple[int, int, list[int]]], total: Sequence[int], start: int, end: int
) -> tuple[int, int, list[int]]:
    largest, squares, ends = best[start]
    size = total[end] - total[start]
    return max(largest, size), squares + size * size, [*ends, end]

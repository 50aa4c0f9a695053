"""``--freeu``, ``--deepcache``, ``--segments``, ``--no-negative-prompt``: what they say, and if it can be done."""

import math
from collections.abc import Mapping
from typing import Any

from buildtool.store.errors import SdxlError
from exporters import segment_layers

FREEU = ("s1", "s2", "b1", "b2")
"""The values' order, and the names of diffusers' ``enable_freeu``."""
DOWN = ("DownBlock2D", "CrossAttnDownBlock2D")
MID = "UNetMidBlock2DCrossAttn"
UP = ("UpBlock2D", "CrossAttnUpBlock2D")


def freeu(text: str, unet: Mapping[str, Any]) -> dict[str, float]:
    """``s1,s2,b1,b2`` -> the four values by name.

    Args:
        unet: the UNet's config.

    Raises:
        SdxlError: it says something else, or FreeU doesn't apply to such a UNet.
    """
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) != len(FREEU) or not all(0 < value < math.inf for value in values):
        raise SdxlError(
            f"--freeu takes {','.join(FREEU)}, four numbers above 0; {text!r} was given.",
            "For example: --freeu 0.6,0.4,1.1,1.2",
        )
    scaled = list(unet.get("up_block_types", ()))[:2]
    if len(scaled) < 2 or any(kind not in UP for kind in scaled):
        raise SdxlError(
            f"--freeu scales what goes into a UNet's first two up blocks, of the kinds {' and '.join(UP)}; "
            f"this checkpoint's are {', '.join(scaled) or 'none'}.",
            "Leave --freeu out.",
        )
    return dict(zip(FREEU, values, strict=True))


def deepcache(text: str, unet: Mapping[str, Any]) -> dict[str, int]:
    """``INTERVAL`` or ``INTERVAL:BRANCH`` -> ``interval`` and ``branch``, which is 0 if left out.

    Raises:
        SdxlError: it says something else, or the UNet has no such branch.
    """
    interval, colon, branch = text.partition(":")
    if not (interval.isdecimal() and int(interval) >= 2 and (branch.isdecimal() if colon else True)):
        raise SdxlError(
            f"--deepcache takes INTERVAL or INTERVAL:BRANCH, an interval of 2 steps or more; {text!r} was given.",
            "Try --deepcache 3",
        )
    layers = _layers("--deepcache", unet)
    skips = len(unet["down_block_types"]) * (layers + 1)
    chosen = int(branch or 0)
    if chosen >= skips:
        raise SdxlError(
            f"--deepcache {text} names branch {chosen}; this UNet's are 0, the outermost, to {skips - 1}.",
            f"Try --deepcache {int(interval)}",
        )
    return {"interval": int(interval), "branch": chosen}


def no_negative_prompt(segments: int | None, pipeline: Mapping[str, Any]) -> bool:
    """True, if guided steps can do without a text for the negative prompt.

    Args:
        segments: what ``--segments`` says.
        pipeline: what model_index.json says.

    Raises:
        SdxlError: they can't.
    """
    if not pipeline.get("force_zeros_for_empty_prompt", True):
        raise SdxlError(
            "--no-negative-prompt is for models whose missing negative prompt is zeros; this one's is an empty text.",
            "Leave it out.",
        )
    if segments is not None:
        raise SdxlError("--no-negative-prompt and --segments don't go together.", "Leave one of them out.")
    return True


def segments(count: int, unet: Mapping[str, Any]) -> int:
    """``--segments N``, for a UNet that can be cut into so many.

    Raises:
        SdxlError: it can't.
    """
    _layers("--segments", unet)
    most = len(segment_layers.layers(unet))
    if not 2 <= count <= most:
        raise SdxlError(
            f"--segments {count} was asked for; this UNet can be cut into 2 to {most} parts.", "Try --segments 8"
        )
    return count


def _layers(option: str, unet: Mapping[str, Any]) -> int:
    """How many layers the blocks of a UNet of SDXL's kind have, for options that take its blocks apart.

    Raises:
        SdxlError: it is of another kind.
    """
    down, up = unet.get("down_block_types", ()), unet.get("up_block_types", ())
    others = [kind for kind in down if kind not in DOWN] + [kind for kind in up if kind not in UP]
    others += [unet["mid_block_type"]] if unet.get("mid_block_type", MID) != MID else []
    layers = unet.get("layers_per_block", 2)
    if others or not isinstance(layers, int):
        what = f"has {', '.join(others)}" if others else f"has blocks of {layers} layers"
        raise SdxlError(f"{option} knows SDXL's blocks; this checkpoint's UNet {what}.", f"Leave {option} out.")
    return layers

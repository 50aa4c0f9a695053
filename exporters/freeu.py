"""FreeU (arXiv 2309.11497) as part of a UNet, in real arithmetic: compilers and ONNX know no complex tensors."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def enable(unet: Any, values: Mapping[str, float]) -> None:
    """What diffusers' ``unet.enable_freeu(**values)`` does, in place, in a form that can be compiled.

    In the first two up blocks, what comes from below (its first half of channels) is scaled by b1 or b2, and the low
    frequencies of what comes from the down blocks by s1 or s2, before a residual block sees both.

    Args:
        unet: a UNet2DConditionModel.
        values: ``s1``, ``s2``, ``b1``, ``b2``.
    """
    channels = unet.mid_block.resnets[-1].out_channels
    for stage, block in enumerate(unet.up_blocks[:2], start=1):
        for resnet in block.resnets:
            resnet.register_forward_pre_hook(_Scaled(channels, values[f"b{stage}"], values[f"s{stage}"]))
            channels = resnet.out_channels


class _Scaled:
    """A hook that scales a residual block's input, (B, backbone + skip channels, H, W)."""

    def __init__(self, backbone: int, b: float, s: float) -> None:
        self.backbone, self.b, self.s = backbone, b, s

    def __call__(self, module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        joined, *rest = given
        half = self.backbone // 2
        scaled, kept, skip = torch.split(joined, [half, self.backbone - half, joined.shape[1] - self.backbone], dim=1)
        return torch.cat([scaled * self.b, kept, scale_low_frequencies(skip, self.s)], dim=1), *rest


def scale_low_frequencies(x: Tensor, scale: float) -> Tensor:
    """diffusers' ``fourier_filter(x, threshold=1, scale=scale)`` of maps (B, C, H, W), computed in fp32.

    That scales the frequencies 0 and -1 of each direction and takes the real part: x + (scale - 1) Re(P x Qᵀ), where
    P (H x H) and Q (W x W) project on those two frequencies. P = (E Eᵀ - i T Eᵀ) / H for the columns E = [1, cos, sin]
    and T = [0, sin, -cos] of the phase, Q likewise.
    """
    height, width = x.shape[-2:]
    rows, turned_rows = _waves(height, x.device)
    columns, turned_columns = _waves(width, x.device)
    exact = x.float()
    found = rows.T @ exact @ columns / (height * width)
    low = rows @ found @ columns.T - turned_rows @ found @ turned_columns.T
    return (exact + (scale - 1) * low).to(x.dtype)


def _waves(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """[1, cos, sin] and [0, sin, -cos] of the phase of frequency 1 at each of ``size`` places, (size, 3) each.

    A single place has no frequency but 0.
    """
    phase = torch.arange(size, device=device) * (2 * math.pi / size)
    cos, sin = phase.cos() * (size > 1), phase.sin()
    one = torch.ones_like(cos)
    return torch.stack([one, cos, sin], dim=1), torch.stack([one - one, sin, -cos], dim=1)

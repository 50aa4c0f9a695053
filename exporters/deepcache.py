"""DeepCache (arXiv 2312.00858): a UNet whose deep layers run in some steps only, and are remembered in between.

A UNet's n skip connections are numbered from the outermost, which is ``conv_in``'s output. At branch b the deep part
is all that lies below skip connection b; what it computes is the feature: the hidden states, (B, C, h, w), that meet
that skip connection on the way up. With as many skip connections a block as SDXL has, 3, b is the ``cache_branch_id``
of DeepCache's own package.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

Layer = Callable[[Tensor], Tensor]
SHALLOW = "_shallow"
"""What the names of variants end in that take the feature and run only the layers above it."""


def feature_shape(unet: Mapping[str, Any], branch: int, sample: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """The feature's shape by the UNet's config, for latents of shape ``sample``."""
    batch, _, height, width = sample
    widths = list(reversed(unet["block_out_channels"]))
    a_block = unet["layers_per_block"] + 1
    block, layer = divmod(len(widths) * a_block - 1 - branch, a_block)  # of the way up
    for _ in range(branch // a_block):
        height, width = (height + 1) // 2, (width + 1) // 2
    return batch, widths[block if layer else max(block - 1, 0)], height, width


def run(
    unet: Any,
    branch: int,
    sample: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    added_cond_kwargs: dict[str, Tensor],
    feature: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """A step of a UNet2DConditionModel of SDXL's kind.

    Args:
        unet, sample, timestep, encoder_hidden_states, added_cond_kwargs: as in diffusers.
        branch: number of the skip connection that the deep part lies below.
        feature: of an earlier step; None runs the whole UNet.

    Returns:
        The predicted noise; behind it the feature, if it was computed.
    """
    embedding = unet.time_embedding(unet.get_time_embed(sample, timestep))
    embedding = embedding + unet.get_aug_embed(embedding, encoder_hidden_states, added_cond_kwargs)
    if unet.time_embed_act is not None:
        embedding = unet.time_embed_act(embedding)

    def layers(block: Any) -> list[Layer]:
        """A block's residual blocks, each with its attention."""
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        return [partial(layer, *both) for both in zip(block.resnets, attentions, strict=True)]

    def layer(resnet: Any, attention: Any, x: Tensor) -> Tensor:
        x = resnet(x, embedding)
        if attention is None:
            return x
        attended: Tensor = attention(x, encoder_hidden_states=encoder_hidden_states, return_dict=False)[0]
        return attended

    # Down: each layer makes a skip connection. Up: each takes one, the last first; blocks end in an upsampler.
    down = [step for block in unet.down_blocks for step in (*layers(block), *(block.downsamplers or ()))]
    up: list[tuple[Layer, Any]] = []
    for block in unet.up_blocks:
        *others, last = layers(block)
        up += [*((step, None) for step in others), (last, block.upsamplers[0] if block.upsamplers else None)]

    skips = [unet.conv_in(sample)]
    for step in down if feature is None else down[:branch]:
        skips.append(step(skips[-1]))
    x = feature
    if x is None:
        x = unet.mid_block(skips[-1], embedding, encoder_hidden_states=encoder_hidden_states)
    deep = x
    for number in reversed(range(len(skips))):
        deep = x if number == branch else deep
        step, upsampler = up[-1 - number]
        x = step(torch.cat([x, skips[number]], dim=1))
        if upsampler is not None:
            height, width = skips[number - 1].shape[2:]
            doubled = (2 * x.shape[2], 2 * x.shape[3]) == (height, width)
            x = upsampler(x, None if doubled else (height, width))
    noise: Tensor = unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))
    return (noise, deep) if feature is None else (noise,)

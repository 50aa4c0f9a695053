"""Products of the UNet that share their input, joined: q, k and v; every k and v of the text; every use of the time."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Joined = dict[str, tuple[str, ...]]
"""A fused parameter's name -> the checkpoint's tensors that it joins along their first dimension."""


class FusedAttention:
    """A diffusers attention processor for attentions that :func:`join_attention` has changed.

    Hidden states (B, L, C) and, for cross-attention, every block's k and v of the text (B, T, sum of 2C), of which
    this attention takes its own columns; gives (B, L, C). Of fewer texts than B, they are those of the last rows: the
    first ones have a text of zeros. Its k and v are zeros, and so is what is attended to.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if attention_mask is not None or kwargs:
            raise NotImplementedError(f"attention with a mask or {sorted(kwargs)} can't be fused")
        batch, length, _ = hidden_states.shape

        def heads(x: Tensor) -> Tensor:
            return x.view(x.shape[0], -1, attn.heads, x.shape[-1] // attn.heads).transpose(1, 2)

        without = 0
        if encoder_hidden_states is None:
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            without = batch - encoder_hidden_states.shape[0]
            q = attn.to_q(hidden_states[without:])
            k, v = attn.to_kv(encoder_hidden_states).chunk(2, dim=-1)
        out = F.scaled_dot_product_attention(heads(q), heads(k), heads(v))
        out = attn.to_out[0](out.transpose(1, 2).reshape(batch - without, length, -1))
        return torch.cat([attn.to_out[0].bias.expand(without, length, -1), out]) if without else out


class Columns(nn.Module):
    """A layer's part of what one product computed for many: columns ``start`` to ``end`` of the last dimension."""

    def __init__(self, start: int, end: int) -> None:
        super().__init__()
        self.start, self.end = start, end

    def forward(self, joined: Tensor) -> Tensor:
        return joined[..., self.start : self.end]


def join_attention(unet: nn.Module) -> Joined:
    """Joins the projections of every attention in place.

    q, k and v of a self-attention become one product. k and v of all cross-attentions, which read the same text,
    become one of the whole UNet, ``unet.to_kv``: what calls the UNet gives it ``to_kv(text)`` for its text.

    Returns:
        The new parameters' names, each with the checkpoint's tensors that it joins.
    """
    joined: Joined = {}
    texts: list[tuple[str, nn.Linear]] = []
    for path, block in list(unet.named_modules()):
        if hasattr(block, "attn1"):
            attn = block.attn1
            own = [(f"{path}.attn1.{name}", getattr(attn, name)) for name in ("to_q", "to_k", "to_v")]
            attn.to_qkv = join(f"{path}.attn1.to_qkv", own, joined)
            for name in ("to_q", "to_k", "to_v"):
                delattr(attn, name)
            attn.processor = FusedAttention()
        if getattr(block, "attn2", None) is not None:
            attn = block.attn2
            own = [(f"{path}.attn2.{name}", getattr(attn, name)) for name in ("to_k", "to_v")]
            start = sum(layer.out_features for _, layer in texts)
            attn.to_kv = Columns(start, start + sum(layer.out_features for _, layer in own))
            texts += own
            for name in ("to_k", "to_v"):
                delattr(attn, name)
            attn.processor = FusedAttention()
    unet.to_kv = join("to_kv", texts, joined)
    return joined


def join_time_projections(unet: Any) -> Joined:
    """Makes one product of what every residual block computes of the time embedding, in place.

    diffusers applies ``time_embed_act`` to the embedding before any block sees it: the blocks' shared activation and
    all their projections move there, and each block takes its columns.

    Returns:
        The new parameters' names, each with the checkpoint's tensors that it joins.
    """
    joined: Joined = {}
    projections: list[tuple[str, nn.Linear]] = []
    activation: nn.Module = nn.Identity()
    for path, block in list(unet.named_modules()):
        projection = getattr(block, "time_emb_proj", None)
        if projection is None:
            continue
        start = sum(layer.out_features for _, layer in projections)
        projections.append((f"{path}.time_emb_proj", projection))
        block.time_emb_proj = Columns(start, start + projection.out_features)
        if not block.skip_time_act:
            activation = block.nonlinearity
            block.skip_time_act = True
    product = join("time_embed_act.1", projections, joined)
    unet.time_embed_act = nn.Sequential(activation, product)
    return joined


def join(name: str, layers: list[tuple[str, nn.Linear]], joined: Joined) -> nn.Linear:
    """One layer that computes what several of the same input do, side by side; ``joined`` notes its parameters."""
    weight = torch.cat([layer.weight for _, layer in layers])
    bias = layers[0][1].bias is not None
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, device="meta")
    for kind in ("weight", "bias") if bias else ("weight",):
        parts = torch.cat([getattr(layer, kind) for _, layer in layers])
        setattr(linear, kind, nn.Parameter(parts, requires_grad=False))
        joined[f"{name}.{kind}"] = tuple(f"{path}.{kind}" for path, _ in layers)
    return linear

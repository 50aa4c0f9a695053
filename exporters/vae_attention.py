"""The VAE's one attention, whose head is as wide as its feature maps, in parts of its rows.

No fused kernel takes a head of 512 but the memory-efficient one, which needs 17 ms of a decoding in fp32 and 4.5 in
fp16 (1024x1024, 16,384 tokens, an H100). Ordinary products with a softmax between them take 2.6 in fp16.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LARGEST = 1 << 25
"""Scores at a time: 134 MB."""
MOST_PARTS = 64
"""Where there would be more, the fused kernel does it: each part is compiled code of its own."""


class InParts:
    """A diffusers attention processor for maps (B, C, H, W), of one head, without mask or condition.

    Scores are in fp32 whatever the maps are (TF32 products, where those are allowed, lose nothing of fp16 factors).
    """

    def __call__(self, attn: Any, hidden_states: Tensor, temb: Tensor | None = None, **others: Any) -> Tensor:
        if any(other is not None for other in others.values()):  # a condition or a mask
            raise NotImplementedError(f"a VAE's attention with {sorted(others)}")
        batch, channels, height, width = hidden_states.shape
        normed = hidden_states if attn.group_norm is None else attn.group_norm(hidden_states)
        tokens = normed.flatten(2).transpose(1, 2)
        out = attn.to_out[0](attention(attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)))
        out = out.transpose(1, 2).reshape(batch, channels, height, width)
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V of one head, all (B, L, D)."""
    batch, length, width = query.shape
    rows = max(LARGEST // (batch * length), 1)
    if -(-length // rows) > MOST_PARTS:
        return F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]
    keys = key.float().transpose(1, 2)
    made = []
    for part in torch.split(query, rows, dim=1):
        scores = torch.bmm(part.float(), keys) * width**-0.5
        made.append(torch.bmm(scores.softmax(dim=-1).to(value.dtype), value))
    return torch.cat(made, dim=1)


def in_parts(vae: nn.Module) -> int:
    """Lets the attentions of a VAE's middle blocks work so, in place; how many there are."""
    count = 0
    for module in vae.modules():
        attn: Any = module
        if type(module).__name__ == "Attention" and attn.heads == 1 and attn.spatial_norm is None:
            attn.processor = InParts()
            count += 1
    return count

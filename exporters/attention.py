"""The UNet's attention with its projections fused: one product for q, k and v, or for k and v."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FusedAttention:
    """A diffusers attention processor for attentions that :func:`fuse` has changed.

    Hidden states (B, L, C) and, for cross-attention, the text (B, T, D); gives (B, L, C).
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
            return x.view(batch, -1, attn.heads, x.shape[-1] // attn.heads).transpose(1, 2)

        if encoder_hidden_states is None:
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q = attn.to_q(hidden_states)
            k, v = attn.to_kv(encoder_hidden_states).chunk(2, dim=-1)
        out = F.scaled_dot_product_attention(heads(q), heads(k), heads(v))
        out = out.transpose(1, 2).reshape(batch, length, -1)
        return attn.to_out[0](out)


def fuse(unet: nn.Module) -> dict[str, tuple[str, ...]]:
    """Fuses the projections of every attention in place.

    Returns:
        The new parameters' names, each with the checkpoint's tensors that it joins.
    """
    joined: dict[str, tuple[str, ...]] = {}
    for path, block in list(unet.named_modules()):
        for name, parts in (("attn1", ("to_q", "to_k", "to_v")), ("attn2", ("to_k", "to_v"))):
            attn: Any = getattr(block, name, None)
            if attn is None:
                continue
            fused = "to_" + "".join(p[-1] for p in parts)
            layers = [getattr(attn, p) for p in parts]
            bias = layers[0].bias is not None
            weight = torch.cat([layer.weight for layer in layers])
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            joined[f"{path}.{name}.{fused}.weight"] = tuple(f"{path}.{name}.{p}.weight" for p in parts)
            if bias:
                linear.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)
                joined[f"{path}.{name}.{fused}.bias"] = tuple(f"{path}.{name}.{p}.bias" for p in parts)
            for p in parts:
                delattr(attn, p)
            setattr(attn, fused, linear)
            attn.processor = FusedAttention()
    return joined

"""The UNet's transformer blocks in fp8 (e4m3): which products, and how their weights follow from a checkpoint's.

Four products of each block read what a LayerNorm or a GEGLU has just made: q/k/v, the cross-attention's q, and both of
the feed-forward. Their inputs are quantized where they are made, at no cost, by scales that need no calibration
and no maximum at run time:

- A LayerNorm of C channels gives at most sqrt(C) |w_c| + |b_c| in channel c, whatever goes in. Dividing w_c and b_c by
  that bound over 448 (e4m3's largest number) makes a LayerNorm that never overflows, and the product's weights take the
  factor, channel by channel.
- A GEGLU gives at most the product of what its two halves can be, by the same LayerNorm and Cauchy and Schwarz.

fp8 is a floating format: that such bounds lie far above usual values costs exponents, of which there are
enough, not digits. Weights have one scale a tensor. Outputs are fp16.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exporters.fusion import Joined

TYPE = torch.float8_e4m3fn
LARGEST = 448.0
SCALES = 16
"""Numbers in a scale's tensor: fewer would be written into the code. The first is the weights', the fifth is 1."""
_ONE = 4

Recipes = dict[str, tuple[str, tuple[str, ...]]]
"""A parameter's name -> how it is computed (:data:`RECIPES`) and of which of the checkpoint's tensors."""


class Fp8Linear(nn.Module):
    """x (…, K), which fits into fp8 as it is -> x W^T + bias (…, N) in fp16; W is ``weight`` times its scale."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.to(TYPE), requires_grad=False)
        scale = torch.ones(SCALES, device=weight.device)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = bias if bias is None else nn.Parameter(bias.to(torch.float16), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.to(TYPE).reshape(-1, x.shape[-1])
        out = torch._scaled_mm(
            rows,
            self.weight.t(),
            scale_a=self.scale[_ONE : _ONE + 1],
            scale_b=self.scale[:1],
            bias=self.bias,
            out_dtype=torch.float16,
            use_fast_accum=True,  # the error of the inputs' four bits hides that of the sums
        )
        return out.view(*x.shape[:-1], out.shape[-1])


class Fp8FeedForward(nn.Module):
    """diffusers' ``FeedForward`` with GEGLU: (B, L, C) -> (B, L, C)."""

    def __init__(self, proj: nn.Linear, out: nn.Linear) -> None:
        super().__init__()
        self.proj = Fp8Linear(proj.weight, proj.bias)
        self.out = Fp8Linear(out.weight, out.bias)
        self.inverse = nn.Parameter(torch.ones(out.in_features, device=out.weight.device), requires_grad=False)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        value, gate = self.proj(hidden_states).chunk(2, dim=-1)
        return self.out(value.float() * F.gelu(gate.float()) * self.inverse)


def quantize(unet: nn.Module, joined: Joined) -> Recipes:
    """Puts the blocks' four products into fp8, in place, after :func:`exporters.fusion.join_attention`.

    Their weights have no meaning yet: the recipes say how each follows from a checkpoint.

    Args:
        joined: what was joined so far; names that go leave it.

    Returns:
        The parameters that are no plain copy of the checkpoint's.
    """
    recipes: Recipes = {}
    for path, block in list(unet.named_modules()):
        if not hasattr(block, "attn1"):
            continue
        feed: Any = block.ff
        if type(feed.net[0]).__name__ != "GEGLU" or block.attn2 is None or block.norm2 is None:
            raise NotImplementedError(f"{path} is no block of SDXL's")
        first, second, third = ((f"{path}.norm{i}.weight", f"{path}.norm{i}.bias") for i in (1, 2, 3))
        for norm in (first, second, third):
            recipes |= {name: (f"norm.{name.rpartition('.')[2]}", norm) for name in norm}
        qkv = joined.pop(f"{path}.attn1.to_qkv.weight")
        recipes |= _linear(f"{path}.attn1.to_qkv", "product", (*first, *qkv))
        recipes |= _linear(f"{path}.attn2.to_q", "product", (*second, f"{path}.attn2.to_q.weight"))
        proj, out = (f"{path}.ff.net.0.proj", f"{path}.ff.net.2")
        recipes |= _linear(f"{path}.ff.proj", "product", (*third, f"{proj}.weight"))
        made = (*third, f"{proj}.weight", f"{proj}.bias")
        recipes |= _linear(f"{path}.ff.out", "geglu", (*made, f"{out}.weight"))
        recipes[f"{path}.ff.inverse"] = ("geglu.inverse", made)
        joined |= {f"{path}.ff.proj.bias": (f"{proj}.bias",), f"{path}.ff.out.bias": (f"{out}.bias",)}
        block.attn1.to_qkv = Fp8Linear(block.attn1.to_qkv.weight, block.attn1.to_qkv.bias)
        block.attn2.to_q = Fp8Linear(block.attn2.to_q.weight, block.attn2.to_q.bias)
        block.ff = Fp8FeedForward(feed.net[0].proj, feed.net[2])
    return recipes


def _linear(name: str, recipe: str, sources: tuple[str, ...]) -> Recipes:
    return {f"{name}.{kind}": (f"{recipe}.{kind}", sources) for kind in ("weight", "scale")}


def derive(recipe: str, tensors: Sequence[Tensor]) -> Tensor:
    """What a recipe makes of a checkpoint's tensors, in fp32 (weights: within e4m3's range)."""
    return RECIPES[recipe](*(tensor.float() for tensor in tensors))


def norm_steps(weight: Tensor, bias: Tensor) -> Tensor:
    """Each channel's scale (C,): what the LayerNorm of these can't exceed, over e4m3's largest number."""
    bound = math.sqrt(weight.numel()) * weight.abs() + bias.abs()
    return bound.clamp(min=1e-6) / LARGEST


def geglu_steps(weight: Tensor, bias: Tensor, proj: Tensor, proj_bias: Tensor) -> Tensor:
    """The same of the GEGLU (inner,) behind that LayerNorm (C,), by its projection (2 inner, C) and bias (2 inner,)."""
    bound = math.sqrt(weight.numel()) * (proj * weight).norm(dim=1) + (proj @ bias + proj_bias).abs()
    value, gate = bound.chunk(2)
    return (value * gate.clamp(min=0.2)).clamp(min=1e-6) / LARGEST  # gelu(x) <= max(|x|, 0.17)


def _scaled(weight: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """(weights in e4m3's range, their scale as it is stored)."""
    taken = weight * steps
    scale = taken.abs().amax().clamp(min=1e-12) / LARGEST
    stored = torch.ones(SCALES)
    stored[0] = scale
    return taken / scale, stored


def _product(weight: Tensor, bias: Tensor, *linear: Tensor) -> tuple[Tensor, Tensor]:
    return _scaled(torch.cat(linear), norm_steps(weight, bias))


def _geglu(weight: Tensor, bias: Tensor, proj: Tensor, proj_bias: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    return _scaled(out, geglu_steps(weight, bias, proj, proj_bias))


RECIPES: dict[str, Callable[..., Tensor]] = {
    "norm.weight": lambda weight, bias: weight / norm_steps(weight, bias),
    "norm.bias": lambda weight, bias: bias / norm_steps(weight, bias),
    "product.weight": lambda *tensors: _product(*tensors)[0],
    "product.scale": lambda *tensors: _product(*tensors)[1],
    "geglu.weight": lambda *tensors: _geglu(*tensors)[0],
    "geglu.scale": lambda *tensors: _geglu(*tensors)[1],
    "geglu.inverse": lambda *tensors: 1 / geglu_steps(*tensors),
}

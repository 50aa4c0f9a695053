"""LoRA files of random numbers, in the spellings that are about, and what they make of diffusers' own weights."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from buildtool.store.lora import COMPONENTS, original

Pairs = dict[tuple[str, str], tuple[Tensor, Tensor]]
"""(component, tensor) -> (up, down)."""
RANK = 3
ALPHA = 1.5


def random_pairs(tensors: Mapping[str, Mapping[str, Tensor]], seed: int, only: Iterable[str] = ("",)) -> Pairs:
    """A product of rank 3 for every matrix and convolution whose name holds one of ``only``."""
    generator = torch.Generator().manual_seed(seed)
    pairs: Pairs = {}
    for component, own in tensors.items():
        for name, weight in own.items():
            if weight.ndim < 2 or "embedding.weight" in name or not any(word in name for word in only):
                continue
            up = torch.randn(weight.shape[0], RANK, generator=generator) * 0.1
            down = torch.randn(RANK, *weight.shape[1:], generator=generator) * 0.1
            pairs[component, name] = (up[..., None, None] if weight.ndim == 4 else up, down)
    return pairs


def fused(weight: Tensor, pair: tuple[Tensor, Tensor], scale: float, alpha: float = ALPHA) -> Tensor:
    """W + scale * alpha / rank * up @ down."""
    up, down = (each.flatten(1) for each in pair)
    return weight + scale * alpha / RANK * (up @ down).view(weight.shape)


def write(path: Path, pairs: Pairs, spelling: str, layers: int = 1) -> Path:
    """``kohya``, ``original`` (kohya's with the original code's block numbers), ``peft`` or ``diffusers``."""
    unet = [name for component, name in pairs if component == "unet"]
    made: dict[str, Tensor] = {}
    for (component, name), (up, down) in pairs.items():
        module = name.removesuffix(".weight")
        kohya, prefix = COMPONENTS[component]
        if spelling in ("kohya", "original"):
            if spelling == "original" and component == "unet":
                module = original(module, layers, unet)
            base = kohya + module.replace(".", "_")
            made |= {f"{base}.lora_up.weight": up, f"{base}.lora_down.weight": down}
        elif spelling == "peft":
            base = prefix + module
            made |= {f"{base}.lora_B.weight": up, f"{base}.lora_A.weight": down}
        else:
            base = prefix + module
            kind = ".lora" if component == "unet" else ".lora_linear_layer"
            made |= {f"{base}{kind}.up.weight": up, f"{base}{kind}.down.weight": down}
        if spelling in ("kohya", "original"):
            made[f"{base}.alpha"] = torch.tensor(ALPHA)
    save_file({name: tensor.contiguous() for name, tensor in made.items()}, path)
    return path

"""How a graph's weights lie in memory: which tensors are padded, and the plan of the weights file."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from exporters.base import StoredTensor

INLINED = 8
"""Inductor writes constants of up to this many elements into the code as literals."""
PADDED = 16
"""So tensors that small are exported as slices of a buffer of this many."""


class Slice(nn.Module):
    """Parametrization: the first elements of a longer buffer, in their own shape."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, padded: Tensor) -> Tensor:
        return padded[: self.shape.numel()].view(self.shape)

    def right_inverse(self, tensor: Tensor) -> Tensor:
        padded = torch.zeros(PADDED, dtype=tensor.dtype, device=tensor.device)
        padded[: tensor.numel()] = tensor.flatten()
        return padded


def pad_small(module: nn.Module) -> dict[str, str]:
    """Replaces every parameter that Inductor would inline by a slice of a longer one, in place.

    Returns:
        New parameter name -> its former name.
    """
    renamed: dict[str, str] = {}
    for name, parameter in list(module.named_parameters()):
        if parameter.numel() > INLINED:
            continue
        parent, _, leaf = name.rpartition(".")
        owner = module.get_submodule(parent)
        parametrize.register_parametrization(owner, leaf, Slice(parameter.shape), unsafe=True)
        prefix = f"{parent}." if parent else ""
        renamed[f"{prefix}parametrizations.{leaf}.original"] = name
    module.requires_grad_(False)
    return renamed


def plan(
    parameters: Mapping[str, Tensor],
    sources: Mapping[str, tuple[str, ...]],
    renamed: Mapping[str, str],
    recipes: Mapping[str, str] = {},
) -> dict[str, StoredTensor]:
    """The weights file's plan: parameter name -> how it lies there and which source tensors it holds."""
    return {
        name: StoredTensor(
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            stride=tuple(tensor.stride()),
            sources=sources[renamed.get(name, name)],
            recipe=recipes.get(name, ""),
        )
        for name, tensor in parameters.items()
    }

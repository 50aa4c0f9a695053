"""A UNet cut into parts that run one after the other: what ``--segments`` compiles.

A UNet's layers are numbered in the order in which they run. What layer i computes is called ``hidden_i``; a layer of
the way up reads, besides the one before it, the layer of the way down that it has a skip connection to. A part is
some consecutive layers. It takes what they read of earlier parts, and gives what later ones read, so that parts hand
over hidden states, skip connections and the embedding of time and size. Each has its own products of the text
(k and v) and of the time, so that no two parts share weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from exporters import fp8, fusion
from exporters.base import TensorSpec
from exporters.segment_layers import Layer, cut, layers

EMBEDDING = "embedding"
TEXT = "encoder_hidden_states"
NOISE = "noise_pred"


@dataclass(frozen=True)
class Part:
    """Layers ``start`` to ``end`` of a UNet: what they are called, take and give."""

    number: int
    """From 1."""
    start: int
    end: int
    layers: tuple[Layer, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def own(self) -> tuple[Layer, ...]:
        return self.layers[self.start : self.end]


def parts(unet: nn.Module, config: Mapping[str, Any], count: int) -> list[Part]:
    """A UNet's ``count`` parts, the largest of which has as few weights as can be.

    Args:
        unet: a UNet2DConditionModel of SDXL's kind as diffusers makes it, on any device.
        config: its config.
    """
    found = layers(config)
    sizes = [sum(_numbers(unet.get_submodule(path)) for path in layer.modules) for layer in found]
    sizes[0] += sum(_numbers(unet.get_submodule(name)) for name in FIRST)
    ends = cut(sizes, count)
    return [
        _part(found, number, start, end)
        for number, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True), 1)
    ]


FIRST = ("time_embedding", "add_embedding")
"""What only the first part needs."""


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _part(found: tuple[Layer, ...], number: int, start: int, end: int) -> Part:
    own, later = found[start:end], found[end:]
    reads = [i for layer in own for i in layer.reads if i < start]
    gives = {i for layer in later for i in layer.reads if start <= i < end}
    inputs = ["sample", "timestep", "text_embeds", "time_ids"] if start == 0 else []
    inputs += [hidden(i) for i in dict.fromkeys(reads)]
    inputs += [EMBEDDING] if start > 0 and any(layer.kind == "resnet" for layer in own) else []
    inputs += [TEXT] if any(layer.kind == "attention" for layer in own) else []
    outputs = [hidden(i) for i in sorted(gives)] if later else [NOISE]
    outputs += [EMBEDDING] if start == 0 and any(layer.kind == "resnet" for layer in later) else []
    return Part(number, start, end, found, tuple(inputs), tuple(outputs))


def hidden(number: int) -> str:
    """The name of what a layer computes."""
    return f"hidden_{number}"


def inputs(part: Part, whole: Sequence[TensorSpec], config: Mapping[str, Any], dtype: torch.dtype) -> list[TensorSpec]:
    """A part's inputs: those of the whole UNet that it reads, and what earlier parts hand over.

    Hidden states lie channels-last, (B, C, h, w): convolutions compute so, and attention reads them so.
    """
    given = {spec.name: spec for spec in whole}
    batch, _, height, width = given["sample"].shape
    name = str(dtype).removeprefix("torch.")
    columns = config.get("time_embedding_dim") or config["block_out_channels"][0] * 4
    given[EMBEDDING] = TensorSpec(EMBEDDING, (batch, columns), name, (columns, 1))
    for i, layer in enumerate(part.layers):
        h, w = (_halved(side, layer.level) for side in (height, width))
        strides = (layer.channels * h * w, 1, w * layer.channels, layer.channels)
        given[hidden(i)] = TensorSpec(hidden(i), (batch, layer.channels, h, w), name, strides)
    return [given[each] for each in part.inputs]


def _halved(side: int, times: int) -> int:
    for _ in range(times):
        side = (side + 1) // 2
    return side


class SegmentGraph(nn.Module):
    """A part with plain tensors in and out, as it is compiled.

    The UNet is named after the part: the tensors of a part then lie side by side in the weights file.
    """

    def __init__(self, unet: nn.Module, part: Part) -> None:
        super().__init__()
        self.part = part
        self.name = f"segment{part.number}"
        setattr(self, self.name, unet)

    def forward(self, **given: Tensor) -> tuple[Tensor, ...]:
        unet: Any = getattr(self, self.name)
        known = dict(given)
        if self.part.start == 0:
            conditions = {"text_embeds": known["text_embeds"], "time_ids": known["time_ids"]}
            embedding = unet.time_embedding(unet.get_time_embed(known["sample"], known["timestep"]))
            known[EMBEDDING] = embedding + unet.get_aug_embed(embedding, None, conditions)
        kinds = {layer.kind for layer in self.part.own}
        # One product of a part's own: of the time for its residual blocks, of the text for its attentions.
        time = unet.time_embed_act(known[EMBEDDING]) if "resnet" in kinds else None
        text = unet.to_kv(known[TEXT]) if "attention" in kinds else None
        for i, layer in enumerate(self.part.own, self.part.start):
            before = known["sample"] if i == 0 else known[hidden(i - 1)]
            skip = None if layer.skip is None else known[hidden(layer.skip)]
            known[hidden(i)] = known[NOISE] = _run(unet, layer, before, skip, time, text)
        return tuple(_laid_out(name, known[name]) for name in self.part.outputs)


def _run(unet: Any, layer: Layer, x: Tensor, skip: Tensor | None, time: Tensor | None, text: Tensor | None) -> Tensor:
    *before, last = (unet.get_submodule(path) for path in layer.modules)
    made: Tensor
    if layer.kind == "out":
        made = last(unet.conv_act(before[0](x)))
    elif layer.kind == "attention":
        made = last(x, encoder_hidden_states=text, return_dict=False)[0]
    elif layer.kind == "resnet":
        if skip is not None:
            for upsampler in before:
                size = tuple(skip.shape[2:])
                x = upsampler(x, None if (2 * x.shape[2], 2 * x.shape[3]) == size else size)
            x = torch.cat([x, skip], dim=1)
        made = last(x, time)
    else:
        made = last(x)
    return made


def _laid_out(name: str, tensor: Tensor) -> Tensor:
    channels_last = tensor.ndim == 4 and name != NOISE
    return tensor.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def prune(unet: Any, part: Part) -> None:
    """Takes everything out of a UNet that a part doesn't need, in place; what stays keeps its name."""
    kept = {path for layer in part.own for path in layer.modules} | (set(FIRST) if part.start == 0 else set())
    every = {path for layer in part.layers for path in layer.modules} | set(FIRST)
    for path in every - kept:
        unet.set_submodule(path, nn.Identity())


def join(unet: nn.Module, part: Part) -> fusion.Joined:
    """Joins the products of what a part has: :mod:`exporters.fusion`."""
    kinds = {layer.kind for layer in part.own}
    joined = fusion.join_attention(unet) if "attention" in kinds else {}
    return {**joined, **(fusion.join_time_projections(unet) if "resnet" in kinds else {})}


def graph(unet: nn.Module, part: Part, in_fp8: bool) -> tuple[SegmentGraph, dict[str, tuple[str, ...]], dict[str, str]]:
    """What is compiled of a part, the checkpoint's tensors behind each of its parameters, and recipes for some.

    Args:
        unet: pruned to this part, with weights.
        in_fp8: whether its transformers' products are: :mod:`exporters.fp8`.
    """
    joined = join(unet, part)
    recipes = fp8.quantize(unet, joined) if in_fp8 else {}
    known = joined | {name: sources for name, (_, sources) in recipes.items()}
    module = SegmentGraph(unet, part)
    sources = {f"{module.name}.{name}": known.get(name, (name,)) for name in unet.state_dict()}
    return module.eval(), sources, {f"{module.name}.{name}": recipe for name, (recipe, _) in recipes.items()}

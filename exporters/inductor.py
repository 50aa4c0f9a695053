"""Where torch's compiler, left to itself, makes slow kernels of SDXL's UNet on a GPU: each with its measured reason."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

WIDEST_ROW = 2048
"""Rows of up to this many elements are reduced in one go: LayerNorms of SDXL have 640 and 1,280."""


@contextlib.contextmanager
def choices() -> Iterator[None]:
    """Makes a LayerNorm of 1,280 channels read its row once.

    Inductor holds rows of up to 1,024 elements in registers; it reads longer ones twice.
    """
    from torch._inductor.choices import InductorChoices
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    class Choices(InductorChoices):
        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
            size = features.reduction_numel
            inner = features.get_reduction_hint() == ReductionHint.INNER and not cooperative_reduction
            if inner and size.is_number and int(size) <= WIDEST_ROW:
                return True
            return InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)

    with V.set_choices_handler(Choices()):
        yield


def join_channels_last(graph: fx.Graph) -> int:
    """Lets feature maps (B, C, H, W) that are joined by channels lie channels-last, as convolutions want; in place.

    The result of ``cat`` lies channels-first otherwise. What normalizes it then reads one layout and writes the other:
    239 us for a map that takes 45 (960 channels of 128x128 on an H100).

    Returns:
        How many there were.
    """
    cat, permute = torch.ops.aten.cat.default, torch.ops.aten.permute.default
    found = 0
    for node in list(graph.find_nodes(op="call_function", target=cat)):
        tensors, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
        if dim not in (1, -3) or any(tensor.meta["val"].ndim != 4 for tensor in tensors):
            continue
        with graph.inserting_before(node):
            rows = [graph.call_function(permute, (tensor, [0, 2, 3, 1])) for tensor in tensors]
            joined = graph.call_function(cat, (rows, 3))
            back = graph.call_function(permute, (joined, [0, 3, 1, 2]))
        for made, like in [*zip(rows, tensors, strict=True), (back, node)]:
            made.meta = dict(like.meta)
        for row, tensor in zip(rows, tensors, strict=True):
            row.meta["val"] = tensor.meta["val"].permute(0, 2, 3, 1)
        joined.meta = {**node.meta, "val": node.meta["val"].permute(0, 2, 3, 1).contiguous()}
        back.meta["val"] = joined.meta["val"].permute(0, 3, 1, 2)
        node.replace_all_uses_with(back)
        graph.erase_node(node)
        found += 1
    return found

"""GroupNorms of channels-last maps on a GPU, with the SiLU after them and what is added before: kernels of our own.

Inductor makes a reduction of each group, whose 4 to 80 channels lie between the others': it reads a map eight bytes at
a time. Ours sum whole rows by channel and join the channels to groups afterwards. What a convolution's bias and the
time's embedding add to a map is the same for all its pixels: it moves the channels' means, and needs no pass of its
own. Measured in docs/performance.md.
"""

import math
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from exporters.inductor import only_user

PROGRAMS = 640
"""Programs that sum up one call's maps, about: five to a multiprocessor of an H100."""
COLUMNS = 64
"""Channels to a program: 128 bytes of a row in fp16."""


def rows_in_parts(pixels: int, channels: int, batch: int) -> int:
    """Into how many parts a map's pixels are cut for their sums: a power of two, of at least 64 pixels each."""
    wanted = max(PROGRAMS * COLUMNS // (batch * channels), 1)
    return 1 << max(0, min(round(math.log2(wanted)), int(math.log2(max(pixels // 64, 1)))))


@torch.library.triton_op("sdxl::group_norm", mutates_args={})
def group_norm(
    x: Tensor, addend: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> Tensor:
    """GroupNorm of x + addend, then SiLU if asked for: computed in float32, rounded once.

    On a CPU, PyTorch's own operations.

    Args:
        x: maps (B, C, H, W), channels-last, or they are copied so.
        addend: (B, C), the same for all pixels.
        weight, bias: (C,).

    Returns:
        (B, C, H, W), channels-last, in x's dtype.
    """
    if x.device.type == "cpu":
        moved = x if addend is None else x + addend[:, :, None, None]
        normed = F.group_norm(moved, groups, weight, bias, eps)
        return (F.silu(normed) if silu else normed).clone(memory_format=torch.channels_last)
    return _by_kernels(x, addend, weight, bias, groups, eps, silu)


def _by_kernels(
    x: Tensor, addend: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> Tensor:
    from exporters import group_norm_kernels as kernels

    batch, channels, height, width = x.shape
    pixels = height * width
    rows = x.permute(0, 2, 3, 1).contiguous()
    count = rows_in_parts(pixels, channels, batch)
    parts = x.new_empty((batch, count, 2, channels), dtype=torch.float32)
    scale, shift = (x.new_empty((batch, channels), dtype=torch.float32) for _ in range(2))
    out = torch.empty_like(rows)
    blocks = -(-channels // COLUMNS)
    torch.library.wrap_triton(kernels.sums)[(batch * count, blocks)](
        rows, parts, pixels, K=count, LENGTH=-(-pixels // count), C=channels, ROWS=64, COLUMNS=COLUMNS, num_warps=4
    )
    torch.library.wrap_triton(kernels.factors)[(batch * groups,)](
        parts,
        rows if addend is None else addend.contiguous(),
        weight,
        bias,
        scale,
        shift,
        pixels,
        eps,
        K=count,
        C=channels,
        GROUPS=groups,
        WIDTH=_power_of_two(channels // groups),
        STEP=min(16, count),
        ADDS=addend is not None,
        num_warps=4,
    )
    columns = 128 if channels % 128 == 0 else 64
    tile = 1024 // columns
    torch.library.wrap_triton(kernels.apply)[(-(-pixels // tile), -(-channels // columns), batch)](
        rows, scale, shift, out, pixels, C=channels, ROWS=tile, COLUMNS=columns, SILU=silu, num_warps=2
    )
    return out.permute(0, 3, 1, 2)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def fuse(graph: fx.Graph) -> int:
    """Lets the GroupNorms of a graph's maps (B, C, H, W) be computed by :func:`group_norm`; in place.

    A SiLU that alone reads one is part of it, and so are a convolution's bias and one more addend of a map's channels
    that only the norm reads.

    Returns:
        How many there were.
    """
    aten = torch.ops.aten
    found = 0
    for norm in list(graph.find_nodes(op="call_function", target=aten.group_norm.default)):
        x, groups, *others = norm.args
        weight, bias, eps = (*others, None, None, None)[:3]
        if x.meta["val"].ndim != 4 or weight is None or bias is None:
            continue
        last = only_user(norm)
        silu = last is not None and last.target is aten.silu.default
        end: fx.Node = last if silu and last is not None else norm
        with graph.inserting_before(end):
            source, addend = _without_addends(graph, x, norm)
            made = graph.call_function(
                torch.ops.sdxl.group_norm.default,
                (source, addend, weight, bias, groups, 1e-5 if eps is None else eps, silu),
            )
        made.meta = {**end.meta, "val": end.meta["val"].contiguous(memory_format=torch.channels_last)}
        end.replace_all_uses_with(made)
        found += 1
    graph.eliminate_dead_code()
    return found


def _without_addends(graph: fx.Graph, x: fx.Node, norm: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """The map that ``x`` is before something is added to all its pixels, and what that is, (B, C)."""
    aten = torch.ops.aten
    batch, channels = x.meta["val"].shape[:2]
    found: list[fx.Node] = []

    def view(node: fx.Node, *shape: int) -> fx.Node:
        made = graph.call_function(aten.reshape.default, (node, list(shape)))
        made.meta["val"] = node.meta["val"].reshape(shape)
        return made

    # Not aten.add_, which stays whether its result is read or not: the norm would find the addend in the map already.
    if only_user(x) is norm and x.target is aten.add.Tensor and not x.kwargs:
        inner: Any = x.args[0]
        other: Any = x.args[1]
        if isinstance(other, fx.Node) and other.meta["val"].shape == (batch, channels, 1, 1):
            found.append(view(other, batch, channels))
            x, norm = inner, x
    if only_user(x) is norm and x.target is aten.conv2d.default and len(x.args) > 2 and x.args[2] is not None:
        convolution: fx.Node = x
        found.append(view(convolution.args[2], 1, channels))  # type: ignore[arg-type]
        x = graph.call_function(convolution.target, (*convolution.args[:2], None, *convolution.args[3:]))  # type: ignore[arg-type]
        x.meta = dict(convolution.meta)
    if not found:
        return x, None
    total = found[0]
    if len(found) == 2:
        total = graph.call_function(aten.add.Tensor, tuple(found))
        total.meta["val"] = found[0].meta["val"] + found[1].meta["val"]
    if total.meta["val"].shape[0] != batch:
        shape = [batch, channels]
        value = total.meta["val"].expand(shape)
        total = graph.call_function(aten.expand.default, (total, shape))
        total.meta["val"] = value
    return x, total

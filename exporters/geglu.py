"""The first product of a transformer's feed-forward and its GEGLU, in one kernel of our own, on a Hopper GPU.

What the product writes is twice as wide as what GEGLU makes of it, and goes to memory and back: in this kernel it stays
in registers. Measured in docs/performance.md.
"""

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from exporters.inductor import only_user

TARGETS = ("sm90",)
"""GPUs on which the kernel was measured to be the faster way."""
ROWS, COLUMNS, DEPTH, GROUP = 128, 128, 64, 8


def fits(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> bool:
    """Whether the kernel takes a product of x (rows, inputs) with a GEGLU of so many outputs."""
    halves = dtype in (torch.float16, torch.bfloat16)
    return halves and rows >= ROWS and inputs % DEPTH == 0 and outputs % COLUMNS == 0


@torch.library.triton_op("sdxl::geglu", mutates_args={})
def geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GEGLU of x W^T + bias, the first half times gelu of the second: summed in float32, rounded once.

    On a CPU, PyTorch's own operations.

    Args:
        x: (..., K).
        weight, bias: (2N, K) and (2N,).

    Returns:
        (..., N), in x's dtype.
    """
    if x.device.type == "cpu":
        value, gate = F.linear(x, weight, bias).chunk(2, -1)
        return value * F.gelu(gate)
    return _by_kernel(x, weight, bias)


def _by_kernel(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from exporters import geglu_kernel

    rows = x.reshape(-1, x.shape[-1]).contiguous()
    count, outputs = rows.shape[0], weight.shape[0] // 2
    out = rows.new_empty((count, outputs))
    tiles = -(-count // ROWS) * (outputs // COLUMNS)
    programs = min(torch.cuda.get_device_properties(x.device).multi_processor_count, tiles)
    torch.library.wrap_triton(geglu_kernel.geglu)[(programs,)](
        rows,
        weight.contiguous(),
        bias.contiguous(),
        out,
        count,
        N=outputs,
        K=rows.shape[1],
        PROGRAMS=programs,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        DEPTH=DEPTH,
        GROUP=GROUP,
        num_warps=8,
        num_stages=3,
    )
    return out.view(*x.shape[:-1], outputs)


def fuse(graph: fx.Graph) -> int:
    """Lets the products whose GEGLU alone reads them be computed by :func:`geglu`, in place.

    Returns:
        How many there were.
    """
    found = 0
    for gelu in list(graph.find_nodes(op="call_function", target=torch.ops.aten.gelu.default)):
        end = only_user(gelu)
        linear = end and _product(gelu, end)
        if end is None or linear is None:
            continue
        with graph.inserting_before(linear):  # later on its input may be another
            made = graph.call_function(torch.ops.sdxl.geglu.default, linear.args)
        made.meta = dict(end.meta)
        end.replace_all_uses_with(made)
        found += 1
    graph.eliminate_dead_code()
    return found


def _product(gelu: fx.Node, end: fx.Node) -> fx.Node | None:
    """The linear layer that ``gelu`` has the second half of and ``end`` multiplies the first of, if the kernel fits."""
    aten = torch.ops.aten
    gate: Any = gelu.args[0]
    if end.target is not aten.mul.Tensor or gelu.kwargs or gate.target is not operator.getitem:
        return None
    halves, which = gate.args
    value: Any = next((arg for arg in end.args if arg is not gelu), None)
    if halves.target is not aten.chunk.default or halves.args[1:] != (2, -1) or which != 1 or len(halves.users) != 2:
        return None
    if value not in halves.users or value.args[1] != 0 or only_user(value) is not end or only_user(gate) is not gelu:
        return None
    linear: Any = halves.args[0]
    if linear.target is not aten.linear.default or len(linear.args) != 3 or only_user(linear) is not halves:
        return None
    shape, dtype = linear.meta["val"].shape, linear.meta["val"].dtype
    inputs = linear.args[0].meta["val"].shape[-1]
    return linear if fits(shape[:-1].numel(), inputs, shape[-1] // 2, dtype) else None

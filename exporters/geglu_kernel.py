"""A Triton kernel for a product and the GEGLU of it. Imported only where code is built for a GPU."""

import triton
import triton.language as tl


@triton.jit
def geglu(
    x,
    weight,
    bias,
    out,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out (M, N) = a * gelu(b), where (a, b) = x (M, K) times weight (2N, K) transposed, plus bias (2N).

    Each program computes every PROGRAMSth tile of ROWS by COLUMNS, both halves of it: GROUP tiles below each other come
    before those beside them, so that programs at work at the same time read the same rows and columns.
    """
    xs = tl.make_tensor_descriptor(x, [M, K], [K, 1], [ROWS, DEPTH])
    weights = tl.make_tensor_descriptor(weight, [2 * N, K], [K, 1], [COLUMNS, DEPTH])
    outs = tl.make_tensor_descriptor(out, [M, N], [N, 1], [ROWS, COLUMNS])
    down, across = tl.cdiv(M, ROWS), N // COLUMNS
    for tile in tl.range(tl.program_id(0), down * across, PROGRAMS, flatten=False):
        first = tile // (GROUP * across) * GROUP
        height = min(down - first, GROUP)
        row = (first + tile % height) * ROWS
        column = tile % (GROUP * across) // height * COLUMNS
        value = tl.zeros((ROWS, COLUMNS), tl.float32)
        gate = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, K, DEPTH):
            part = xs.load([row, k])
            value = tl.dot(part, weights.load([column, k]).T, value)
            gate = tl.dot(part, weights.load([N + column, k]).T, gate)
        columns = column + tl.arange(0, COLUMNS)
        value += tl.load(bias + columns)[None, :].to(tl.float32)
        gate += tl.load(bias + N + columns)[None, :].to(tl.float32)
        made = value * gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        outs.store([row, column], made.to(out.dtype.element_ty))

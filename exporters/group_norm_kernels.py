"""Triton kernels for a GroupNorm of rows (B, P, C), P pixels of C channels: sums, then scale and shift, then the rows.

Imported only where code is built for a GPU. Loads and stores are 16 bytes wide: a row's channels are
neighbours.
"""

import triton
import triton.language as tl


@triton.jit
def sums(
    x,
    out,
    pixels,
    K: tl.constexpr,
    LENGTH: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Each channel's sum and sum of squares over each of K parts of the pixels: out (B, K, 2, C), float32.

    Program (b * K + k, block of channels). LENGTH pixels to a part.
    """
    part = tl.program_id(0)
    batch, first = part // K, part % K * LENGTH
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    rows = x + (batch.to(tl.int64) * pixels + first) * C  # from here on 32 bits do: a part is small
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, LENGTH, ROWS):
        at = start + row
        inside = ((at < LENGTH) & (first + at < pixels))[:, None] & (channel < C)[None, :]
        value = tl.load(rows + at[:, None] * C + channel[None, :], inside, 0.0).to(tl.float32)
        total += value
        squares += value * value
    to = out + part * 2 * C + channel
    tl.store(to, tl.sum(total, 0), channel < C)
    tl.store(to + C, tl.sum(squares, 0), channel < C)


@triton.jit
def factors(
    parts,
    addend,
    weight,
    bias,
    scale,
    shift,
    pixels,
    eps,
    K: tl.constexpr,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    ADDS: tl.constexpr,
):
    """What makes the normalized rows of the given ones, x * scale + shift, both (B, C), float32.

    The statistics are those of x + addend (B, C): a channel's mean moves by it, its variance doesn't.
    Program b * GROUPS + g.
    """
    batch, group = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS
    size: tl.constexpr = C // GROUPS
    part, member = tl.arange(0, STEP), tl.arange(0, WIDTH)
    channel, known = group * size + member, member < size
    total = tl.zeros([WIDTH], tl.float32)
    squares = tl.zeros([WIDTH], tl.float32)
    for start in range(0, K, STEP):
        at = start + part
        inside = (at < K)[:, None] & known[None, :]
        rows = parts + (batch * K + at)[:, None] * 2 * C + channel[None, :]
        total += tl.sum(tl.load(rows, inside, 0.0), 0)
        squares += tl.sum(tl.load(rows + C, inside, 0.0), 0)
    at = batch * C + channel
    if ADDS:
        moved = tl.load(addend + at, known, 0.0).to(tl.float32)
    else:
        moved = tl.zeros([WIDTH], tl.float32)
    own = total / pixels
    # Not below 0: the difference is the rounding of a large square, where a channel has one value.
    variance = tl.where(known, tl.maximum(squares / pixels - own * own, 0.0), 0.0)
    mean = tl.sum(tl.where(known, own + moved, 0.0), 0) / size
    distance = tl.where(known, own + moved - mean, 0.0)
    # The mean of the channels' variances, and the variance of their means.
    whole = (tl.sum(variance, 0) + tl.sum(distance * distance, 0)) / size
    factor = tl.rsqrt(whole + eps) * tl.load(weight + channel, known, 0.0).to(tl.float32)
    tl.store(scale + at, factor, known)
    tl.store(shift + at, tl.load(bias + channel, known, 0.0).to(tl.float32) + (moved - mean) * factor, known)


@triton.jit
def apply(
    x,
    scale,
    shift,
    out,
    pixels,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SILU: tl.constexpr,
):
    """x * scale + shift, and SiLU of it, in out's dtype. Program (block of pixels, block of channels, b)."""
    batch = tl.program_id(2)
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    known = channel < C
    factor = tl.load(scale + batch * C + channel, known, 0.0)
    constant = tl.load(shift + batch * C + channel, known, 0.0)
    at = (batch.to(tl.int64) * pixels + row)[:, None] * C + channel[None, :]
    inside = (row < pixels)[:, None] & known[None, :]
    value = tl.load(x + at, inside, 0.0).to(tl.float32) * factor[None, :] + constant[None, :]
    if SILU:
        value = value * tl.sigmoid(value)
    tl.store(out + at, value.to(out.dtype.element_ty), inside)

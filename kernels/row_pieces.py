"""The pieces of a Triton row kernel, in which one program reads one row of V logits once.

How a row is split. A GPU reads 16 bytes in one instruction only from an address that is a multiple of 16, and
with an odd V a row may start at any address. So most of it is read in whole vectors of VEC columns, LANES
vectors per step; the columns before the first vector (the head) and after the last (the tail) are read one by
one. Example: V = 21 bf16 logits that start 12 bytes after a multiple of 16. VEC = 8, and in this drawing
LANES = 8.

    column  | .  .  .  .  .  .  0  1| 2  3  4  5  6  7  8  9|10 11 12 13 14 15 16 17|18 19 20  .  .  .  .  .|
    part                      head=2        vector 0                vector 1         tail=3
    lane                        0  1           0                       1              2  3  4

Head and tail together are the edge: fewer than 2 VEC columns, one per lane. Here lanes 5 to 7 have none.

What a lane keeps. A tile is [LANES, VEC]. Each lane has its own statistics and reduces only within its own
vectors, which one thread holds, so threads exchange data once per row and not once per step:

    m = max x    d = x - m    e = 2^(c d)    s = sum e    t = sum e d    where c = log2(e) / temperature

2^(c d) is exp(d / temperature): base 2 is what the hardware computes.
"""

from __future__ import annotations

import math

from .dispatch import constexpr, jit, tl

LOG2E = 1 / math.log(2)
LN2 = constexpr(0.6931471805599453)
NEG_INF = constexpr(float("-inf"))
# A running maximum starts at the lowest finite number. Only -inf is below it, and -inf - -inf never occurs.
LOWEST = constexpr(-3.4028234663852886e38)
# 2^FLOOR is exactly 0 in fp32. An exponent clamped to FLOOR is finite, so 0 * -inf never occurs.
FLOOR = constexpr(-160.0)


@jit
def row_offset(row, n_inner, outer, inner):
    """Where row `row` (int64: logits may exceed 2^31 elements) of [outer, inner, V] starts, in elements."""
    return (row // n_inner) * outer + (row % n_inner) * inner


@jit
def split_row(ptr, offset, n_cols, LANES: tl.constexpr):
    """The row at ptr + offset -> its start, its first vector, head, n_vec, lanes, tile, edge.

    The lanes [LANES, 1] number the vectors of a step, and the tile [LANES, VEC] its elements. `edge` [LANES]
    is each lane's column of the edge, or a column >= n_cols where it has none.
    """
    VEC: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    phase = ((ptr + offset).to(tl.int64) % 16 // (16 // VEC)).to(tl.int32)
    head = tl.minimum((VEC - phase) % VEC, n_cols)
    n_vec = (n_cols - head) // VEC
    lane = tl.arange(0, LANES)
    edge = tl.where(lane < head, lane, lane + n_vec * VEC)
    tile = lane[:, None] * VEC + tl.arange(0, VEC)[None, :]
    start, body = row_at(ptr, offset, head)
    return start, body, head, n_vec, lane[:, None], tile, edge


@jit
def row_at(ptr, offset, head):
    """Pointers to the start and to the first vector of the row at ptr + offset.

    The compiler is told twice that the vector is aligned: on the pointer, because the tensor itself may start
    anywhere, and on the offset, because for tensors under 2 GB AMD's compiler keeps only that hint.
    """
    VEC: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    return ptr + offset, tl.multiple_of(ptr + tl.multiple_of(offset + head, VEC), 16)


@jit
def load_logits(ptr, ok):
    """Logits in fp32. A column that does not exist is -inf, which adds nothing to any sum."""
    return tl.load(ptr, mask=ok, other=NEG_INF).to(tl.float32)


@jit
def rescale(m, s, t, m_new, c):
    """s and t relative to the maximum m -> the same relative to m_new >= m."""
    fall = tl.maximum(m - m_new, FLOOR / c)
    shrink = tl.exp2(fall * c)
    return shrink * s, shrink * (t + fall * s)  # sum e (d + fall) = sum e d + fall sum e


@jit
def absorb(x, m, s, t, c):
    """Add logits x [LANES, VEC] to each lane's m, s and t [LANES].

    The maximum is subtracted BEFORE scaling, and t keeps d in the logits' units, so large logits stay
    precise.
    """
    m_new = tl.maximum(m, tl.max(x, 1))
    s, t = rescale(m, s, t, m_new, c)
    # By default a GPU's maximum drops a NaN operand; here a NaN logit must reach the result.
    d = tl.maximum(x - m_new[:, None], FLOOR / c, propagate_nan=tl.PropagateNan.ALL)
    e = tl.exp2(d * c)
    return m_new, s + tl.sum(e, 1), t + tl.sum(e * d, 1)


@jit
def merge_lanes(m, s, t, c):
    """The lanes' statistics -> the row's, three numbers. A row of only -inf has s = 0, whose log is NaN."""
    peak = tl.max(m, 0)
    s, t = rescale(m, s, t, peak, c)
    return peak, tl.sum(s, 0), tl.sum(t, 0)

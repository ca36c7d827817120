"""What the operations share: checks of arguments, rows taken a few at a time on CPU, the pieces of a Triton row kernel.

Where Triton is not installed, or has nothing to run on, the kernels are plain functions that nothing calls.
"""

from __future__ import annotations

import contextlib
import math
import os
from typing import Any

import torch
from torch import Tensor

triton = tl = None
if (
    torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ
):  # else it would take 70 MB and a second for nothing
    with contextlib.suppress(ImportError):
        import triton
        import triton.language as tl

jit = triton.jit if triton else lambda kernel: kernel
constexpr = tl.constexpr if triton else lambda value: value
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


# Arguments and dispatch


def result_dtype(*inputs: Tensor) -> torch.dtype:
    """fp32; float64 only where an input is float64, so that gradients can be checked numerically."""
    return torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32


def use_triton(*inputs: Tensor) -> bool:
    """Whether these go to the Triton kernels: on a GPU, or on CPU under TRITON_INTERPRET=1; float64 never does."""
    if triton is None or result_dtype(*inputs) == torch.float64:
        return False
    return all(x.is_cuda or (INTERPRETED and x.device.type == "cpu") for x in inputs)


def check_rows(x: Tensor, tokens: Tensor, temperature: float, mask: Tensor | None) -> None:
    """Refuse arguments that do not fit the rows of x [..., V or C]; what they hold is not looked at."""
    if (
        x.ndim == 0
        or x.shape[-1] == 0
        or x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    ):
        raise ValueError(
            f"rows of float16, bfloat16, float32 or float64 are needed, not {x.dtype} {tuple(x.shape)}"
        )
    for name, y, dtype in (("tokens", tokens, torch.int64), ("mask", mask, torch.bool)):
        if y is None:
            continue
        if y.dtype != dtype or y.shape != x.shape[:-1]:
            raise ValueError(f"{name} must be {dtype} {tuple(x.shape[:-1])}, not {y.dtype} {tuple(y.shape)}")
        if y.device != x.device:
            raise ValueError(f"{name} must be on {x.device}, not {y.device}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a positive finite number, not {temperature}")


# Plain PyTorch


def real_rows(tokens: Tensor, mask: Tensor | None, V: int, size: int) -> tuple[Tensor, ...]:
    """The numbers of the rows that count, so many at a time as make `size` elements, but at least one.

    Raises ValueError where one of their tokens is outside the vocabulary. What stands in a masked row is nobody's business.
    """
    real = (
        torch.arange(tokens.numel(), device=tokens.device)
        if mask is None
        else mask.flatten().nonzero().squeeze(1)
    )
    used = tokens.flatten()[real]
    if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < V:
        raise ValueError(f"tokens must lie in 0..{V - 1}, found {int(used.min())}..{int(used.max())}")
    return real.split(max(1, size // V))


# Triton


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run a kernel on the device of its first argument, which need not be the current one; an empty grid is no work."""
    device = args[0].device
    if 0 not in grid:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[grid](*args, **options)


# Pieces of a row kernel: one program goes once through one row of V logits.
#
# A row of odd V starts at any address, but a GPU reads 16 bytes at once only from a multiple of 16. So a row is cut in two:
# the `edge`, which is the columns before the first such boundary and those after the last, fewer than 2 * VEC and read one
# by one; and between them whole vectors of VEC columns, LANES of them a step. A tile is [LANES, VEC]: each lane keeps its
# own statistics and reduces only within its vectors, which one thread holds. So threads talk to one another once a row.

NEG_INF = constexpr(float("-inf"))
LN2 = constexpr(0.6931471805599453)
LOG2E = 1 / math.log(2)  # kernels count in powers of two, which is what the hardware computes
# A running maximum starts at the lowest finite number: below it lies only -inf, and -inf - -inf never arises.
LOWEST = constexpr(-3.4028234663852886e38)
# exp2(FLOOR) is exactly 0. An exponent that is cut off there stays finite, so that 0 * -inf never arises either.
FLOOR = constexpr(-160.0)


@jit
def row_offset(row, n_inner, outer, inner):
    """Where row `row` (int64: a batch of logits passes 2^31 elements) of [outer, inner, V] starts, in elements."""
    return (row // n_inner) * outer + (row % n_inner) * inner


@jit
def vectors(ptr, offset, head, VEC: tl.constexpr):
    """Where the vectors of the row at ptr + offset start: said to be a boundary twice, of the sum for a tensor that does
    not start at one, and of the offset because AMD's compiler keeps nothing else for tensors of less than 2 GB."""
    return tl.multiple_of(ptr + tl.multiple_of(offset + head, VEC), 16)


@jit
def cut(start, n_cols, VEC: tl.constexpr, LANES: tl.constexpr):
    """The row at `start` has `head` columns before its first boundary, and `n_vec` vectors from there.

    `lane` [LANES, 1] numbers the vectors of a step, `tile` [LANES, VEC] its elements. `edge` [LANES] gives each lane a
    column of the edge, or one past the row's end.
    """
    phase = (start.to(tl.int64) % 16 // (16 // VEC)).to(tl.int32)
    head = tl.minimum((VEC - phase) % VEC, n_cols)
    n_vec = (n_cols - head) // VEC
    lane = tl.arange(0, LANES)
    edge = tl.where(lane < head, lane, lane + n_vec * VEC)
    return head, n_vec, lane[:, None], lane[:, None] * VEC + tl.arange(0, VEC)[None, :], edge


@jit
def load(ptr, ok):
    """Logits in fp32; one that does not exist is as good as impossible."""
    return tl.load(ptr, mask=ok, other=NEG_INF).to(tl.float32)


@jit
def store_zeros(ptr, offset, n_cols, VEC: tl.constexpr, LANES: tl.constexpr):
    """The gradient of a masked row."""
    start = ptr + offset
    dtype: tl.constexpr = ptr.dtype.element_ty
    head, n_vec, lane, tile, edge = cut(start, n_cols, VEC, LANES)
    body = vectors(ptr, offset, head, VEC)
    for v in range(0, n_vec, LANES):
        tl.store(body + (v * VEC + tile), tl.zeros((LANES, VEC), dtype), mask=v + lane < n_vec)
    tl.store(start + edge, tl.zeros((LANES,), dtype), mask=edge < n_cols)


@jit
def rescale(m, s, t, m_new, c):
    """Sums relative to a maximum m, made relative to m_new >= m."""
    fall = tl.maximum(m - m_new, FLOOR / c)
    shrink = tl.exp2(fall * c)
    return shrink * s, shrink * (t + fall * s)  # sum e (d + fall) = sum e d + fall sum e


@jit
def absorb(x, m, s, t, c):
    """Take logits x [LANES, VEC] into each lane's maximum m, s = sum e and t = sum e d, with d = x - m, e = 2^(c d).

    c = log2(e) / temperature. The maximum is subtracted BEFORE scaling, and t keeps d in the units of the logits.
    """
    m_new = tl.maximum(m, tl.max(x, 1))
    s, t = rescale(m, s, t, m_new, c)
    # Of two floats a GPU's maximum drops the one that is NaN, unless told: here a NaN logit has to come through.
    d = tl.maximum(x - m_new[:, None], FLOOR / c, propagate_nan=tl.PropagateNan.ALL)
    e = tl.exp2(d * c)
    return m_new, s + tl.sum(e, 1), t + tl.sum(e * d, 1)


@jit
def merge(m, s, t, c):
    """The lanes' statistics -> the row's, three numbers. A row of only -inf has s = 0, and its logarithms give NaN."""
    peak = tl.max(m, 0)
    s, t = rescale(m, s, t, peak, c)
    return peak, tl.sum(s, 0), tl.sum(t, 0)

"""linear_token_logprobs in Triton: both kernels, and how they are launched.

Memory at N = 8192, V = 151936, C = 4096 in bf16, where the logits would take 2.3 GiB. Forward: 12 bytes a row for every 4096
columns, 3.6 MiB, and as much again while they are merged. Backward goes TWICE through the logits' gradient, by columns for
the weight and by rows for the hidden states, so that each part of either gradient is finished by one matrix product, which
sums in fp32, and no fp32 copy of a gradient is kept: BUDGET bytes, 60 MiB, hold a strip of it and the product. The second
recomputation makes four products of three; it is what the memory costs. Hidden states with a mask are copied without their
masked rows, into the memory that their gradient needs anyway. Operands of two dtypes, or of another than autocast's, are
converted whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .common import FLOOR, LOG2E, LOWEST, NEG_INF, absorb, jit, launch, tl
from .linear_plain import merge

BLOCK_M, BLOCK_N, BLOCK_K = (
    128,
    128,
    64,
)  # a tile of logits, and the channels that it takes at a time in 16 bits
BLOCK_SPLIT = (
    4096  # columns that one program reduces: fixed, so that no row depends on how many others there are
)
GROUP = 16  # tiles of rows that take turns at the same columns: their hidden states stay in a GPU's L2 cache
BUDGET = 60 << 20


@jit
def _row_numbers(BLOCK_M: tl.constexpr):
    """Of a program's rows. Programs start in the order of the grid's first axis, which runs through a GROUP of row tiles."""
    return (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * BLOCK_M + tl.arange(0, BLOCK_M)


@jit
def _logits(
    hidden, weight, row, col, C,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """hidden[row] @ weight[col].T, a tile in fp32. Only the last channels are masked: all rows and columns must exist."""
    k = tl.arange(0, BLOCK_K)
    a_ptr = hidden + row.to(tl.int64)[:, None] * C + k[None, :]
    b_ptr = weight + col.to(tl.int64)[:, None] * C + k[None, :]
    x = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, C, BLOCK_K):
        ok = (start + k < C)[None, :]
        a, b = tl.load(a_ptr + start, mask=ok, other=0.0), tl.load(b_ptr + start, mask=ok, other=0.0)
        x = tl.dot(a, tl.trans(b), x, input_precision="ieee")
    if ROUND:  # autocast's logits are as wide as its operands
        x = x.to(hidden.dtype.element_ty).to(tl.float32)
    return x


@jit
def linear_token_logprobs_forward(
    hidden, weight, tokens, mask, picked, parts, N, V, C, c,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_SPLIT: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """One program takes BLOCK_M rows through BLOCK_SPLIT columns: the recurrence of `absorb`, with a row as a lane."""
    row = _row_numbers(BLOCK_M)
    live = row < N
    if mask is not None:
        live = live & tl.load(mask + row, mask=live, other=0)
    if tl.max(live.to(tl.int32), 0) == 0:
        return
    at = tl.where(live, row, 0)  # rows that do not count read row 0, so that the loop needs no mask for them
    first = tl.program_id(1) * BLOCK_SPLIT
    last = tl.minimum(first + BLOCK_SPLIT, V)
    token = tl.load(tokens + row, mask=live, other=-1)
    mine = (token >= first) & (
        token < last
    )  # at most one split picks a row's logit: where none does, `picked` stays NaN
    token = tl.where(mine, token, -1).to(tl.int32)
    m, s, x_token = (
        tl.full((BLOCK_M,), LOWEST, tl.float32),
        tl.zeros((BLOCK_M,), tl.float32),
        tl.zeros((BLOCK_M,), tl.float32),
    )
    t = s
    for start in range(first, last, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        x = _logits(hidden, weight, at, tl.minimum(col, V - 1), C, BLOCK_M, BLOCK_N, BLOCK_K, ROUND)
        x = tl.where(
            (col < V)[None, :], x, NEG_INF
        )  # a phantom column is the last one once more: it must carry nothing
        x_token += tl.sum(tl.where(col[None, :] == token[:, None], x, 0.0), 1)
        m, s, t = absorb(x, m, s, t, c)
    tl.store(picked + row, x_token, mask=mine)
    out = parts + tl.program_id(1).to(tl.int64) * N + row
    step = tl.num_programs(1).to(tl.int64) * N
    tl.store(out, m, mask=live)
    tl.store(out + step, s, mask=live)
    tl.store(out + 2 * step, t, mask=live)


@jit
def linear_token_logprobs_backward(
    hidden, weight, tokens, factors, out, N, V, C, first, factor_stride, out_stride, c,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """out[i, j] = the gradient of the logit of row i and column first + j. One program a tile."""
    row = _row_numbers(BLOCK_M)
    at = tl.minimum(row, N - 1)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    x = _logits(hidden, weight, at, tl.minimum(col, V - 1), C, BLOCK_M, BLOCK_N, BLOCK_K, ROUND)
    peak = tl.load(factors + at)
    a = tl.load(factors + factor_stride + at)
    b = tl.load(factors + 2 * factor_stride + at)
    g = tl.load(factors + 3 * factor_stride + at)
    d = tl.maximum(x - peak[:, None], FLOOR / c)
    x = tl.exp2(d * c) * (a[:, None] + b[:, None] * d)
    token = tl.load(tokens + at) - first
    token = tl.where((token >= 0) & (token < V), token, -1).to(tl.int32)
    x += tl.where(col[None, :] == token[:, None], g[:, None], 0.0)
    ok = (row < N)[:, None] & (col < V)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * out_stride + col[None, :], x.to(out.dtype.element_ty), mask=ok)


def _tile(h: Tensor) -> dict[str, int]:
    """A smaller tile where registers would not do: for fp32, and where no 16 bytes of channels can be loaded at once."""
    wide, odd = h.element_size() // 2, 1 if h.shape[1] % 16 == 0 else 2
    return {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N // wide, "BLOCK_K": max(16, BLOCK_K // wide // odd)}


def _launch(kernel: Any, rows: int, columns: int, h: Tensor, *args: Any, **options: Any) -> None:
    """`columns`: programs side by side for the same rows."""
    tiles = -(-rows // BLOCK_M)
    group = max(1, min(GROUP, tiles))
    launch(kernel, (group, columns, -(-tiles // group)), h, *args, **options, **_tile(h), num_warps=8)


def _operands(hidden: Tensor, weight: Tensor, product: torch.dtype) -> tuple[Tensor, Tensor, bool]:
    """As matrices of one dtype, and whether the logits are rounded to it. fp32 holds products of 16-bit floats exactly."""
    dtype = hidden.dtype if hidden.dtype == weight.dtype and product == torch.float32 else product
    hidden, weight = (x.reshape(-1, x.shape[-1]).to(dtype).contiguous() for x in (hidden, weight))
    return hidden, weight, product != torch.float32


def triton_forward(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    temperature: float,
    product: torch.dtype,
) -> Tensor:
    """-> logprob, entropy, max, S [4, N], 0 in rows that do not count."""
    h, w, narrow = _operands(hidden, weight, product)
    (N, C), V = h.shape, len(w)
    splits = -(-V // BLOCK_SPLIT)
    picked, parts = (
        h.new_full((N,), torch.nan, dtype=torch.float32),
        h.new_empty(3, splits, N, dtype=torch.float32),
    )
    args = (h, w, tokens, mask, picked, parts, N, V, C, LOG2E / temperature)
    _launch(linear_token_logprobs_forward, N, splits, *args, BLOCK_SPLIT=BLOCK_SPLIT, ROUND=narrow)
    found = merge(picked, parts, temperature)
    return found if mask is None else torch.where(mask, found, 0.0)


def triton_backward(
    hidden: Tensor, weight: Tensor, tokens: Tensor, mask: Tensor | None, factors: Tensor,
    temperature: float, product: torch.dtype, want: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> the gradients of hidden [N, C] and weight [V, C] (if wanted; else of any content or no element)."""
    clean = hidden
    if mask is not None:  # 0 * NaN would be NaN
        clean, factors = torch.where(mask[:, None], hidden, 0.0).contiguous(), torch.where(mask, factors, 0.0)
    h, w, narrow = _operands(clean, weight, product)
    (N, C), V, size, width = h.shape, len(w), h.element_size(), _tile(h)["BLOCK_N"]

    def strip(i: int, j: int, n: int, v: int) -> Tensor:
        """The gradient of the logits of n rows from i on at v columns from j on."""
        a, b = h[i : i + n], w[j : j + v]
        out = h.new_empty(len(a), -(-len(b) // 16) * 16)[
            :, : len(b)
        ]  # every row starts at a multiple of 16 bytes
        tensors = (a, b, tokens[i : i + n], factors[:, i : i + n], out)
        numbers = (*out.shape, C, j, factors.stride(0), out.stride(0), LOG2E / temperature)
        _launch(linear_token_logprobs_backward, len(a), -(-len(b) // width), *tensors, *numbers, ROUND=narrow)
        return out

    grad_weight = weight.new_empty(weight.shape if want[1] else 0)
    if want[1]:
        v = max(1, BUDGET // size // (N + C) // width) * width
        for j in range(0, V, v):
            grad_weight[j : j + v] = strip(0, j, N, v).T @ h
    # The masked copy of the hidden states is not needed once their gradient is known: that takes its place, row by row.
    grad_hidden = clean if mask is not None else hidden.new_empty(N, C)
    if want[0]:
        n = max(1, BUDGET // size // (V + C) // 16) * 16
        for i in range(0, N, n):
            grad_hidden[i : i + n] = strip(i, 0, n, V) @ w
    return grad_hidden, grad_weight

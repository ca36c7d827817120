"""linear_token_logprobs in Triton: both kernels, and how they are launched.

Memory at N = 8192, V = 151936, C = 4096 in bf16, where the logits would take 2.3 GiB. Forward needs 12 bytes
per row and split, 3.6 MiB, and as much again to merge the splits. Backward goes TWICE through the logits'
gradient, by columns for the weight and by rows for the hidden states: each part of either gradient is then
finished by one matrix product, which sums in fp32, and no fp32 copy of a gradient is kept. BUDGET, 60 MiB,
holds one strip of the logits' gradient and the product. The price is a fourth matrix product beside three.
With a mask, the hidden states are copied without their masked rows, into the memory of their gradient.
Operands of two dtypes, or of another than autocast's, are converted as a whole.

One program of forward takes BLOCK_M rows through one split of the vocabulary, tile by tile:

                         split 0 (4096 columns)         split 1
                       | tile | tile | tile | ...    | tile | tile | ...
    rows 0 to 127       ------ program 0, 0 ------>   --- program 0, 1 --->     each: m, s, t per row
    rows 128 to 255     ------ program 1, 0 ------>   --- program 1, 1 --->     -> merge_splits
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import row_pieces as pieces
from .dispatch import jit, launch, tl

BLOCK_M, BLOCK_N, BLOCK_K = 128, 128, 64  # a tile of logits, and the channels it takes at a time in 16 bits
BLOCK_SPLIT = 4096  # columns per split: a constant, so that no row depends on how many others there are
GROUP = 16  # row tiles that read the same columns at a time: their hidden states stay in a GPU's L2 cache
BUDGET = 60 << 20


@jit
def row_numbers(BLOCK_M: tl.constexpr):
    """The rows of a program. Programs start in the order of the grid's first axis, a group of row tiles."""
    return (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * BLOCK_M + tl.arange(0, BLOCK_M)


@jit
def tile_of_logits(hidden, weight, row, col, C, BLOCK_K: tl.constexpr, ROUND: tl.constexpr):
    """hidden[row] @ weight[col].T in fp32. Rows and columns must exist: only the last channels are masked."""
    k = tl.arange(0, BLOCK_K)
    a_ptr = hidden + row.to(tl.int64)[:, None] * C + k[None, :]
    b_ptr = weight + col.to(tl.int64)[:, None] * C + k[None, :]
    x = tl.zeros((row.shape[0], col.shape[0]), tl.float32)
    for start in range(0, C, BLOCK_K):
        ok = (start + k < C)[None, :]
        a, b = tl.load(a_ptr + start, mask=ok, other=0.0), tl.load(b_ptr + start, mask=ok, other=0.0)
        x = tl.dot(a, tl.trans(b), x, input_precision="ieee")
    if ROUND:  # under autocast the logits have the operands' precision
        x = x.to(hidden.dtype.element_ty).to(tl.float32)
    return x


@jit
def linear_token_logprobs_forward(
    hidden, weight, tokens, mask, picked, splits, N, V, C, c, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_SPLIT: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """picked [N] (NaN before): the token's logit. splits [3, n_splits, N]: m, s, t as in pieces.absorb."""
    row = row_numbers(BLOCK_M)
    live = row < N
    if mask is not None:
        live = live & tl.load(mask + row, mask=live, other=0)
    if tl.max(live.to(tl.int32), 0) == 0:
        return
    at = tl.where(live, row, 0)  # rows that do not count read row 0, so that the loop needs no mask for them
    first = tl.program_id(1) * BLOCK_SPLIT
    last = tl.minimum(first + BLOCK_SPLIT, V)
    token = tl.load(tokens + row, mask=live, other=-1)
    mine = (token >= first) & (token < last)  # at most one split holds the token; else `picked` stays NaN
    token = tl.where(mine, token, -1).to(tl.int32)
    m, s = tl.full((BLOCK_M,), pieces.LOWEST, tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    t, token_logit = s, s
    for start in range(first, last, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        x = tile_of_logits(hidden, weight, at, tl.minimum(col, V - 1), C, BLOCK_K, ROUND)
        x = tl.where((col < V)[None, :], x, pieces.NEG_INF)  # columns after the last must add nothing
        token_logit += tl.sum(tl.where(col[None, :] == token[:, None], x, 0.0), 1)
        m, s, t = pieces.absorb(x, m, s, t, c)
    tl.store(picked + row, token_logit, mask=mine)
    out = splits + tl.program_id(1).to(tl.int64) * N + row
    stride = tl.num_programs(1).to(tl.int64) * N
    tl.store(out, m, mask=live)
    tl.store(out + stride, s, mask=live)
    tl.store(out + 2 * stride, t, mask=live)


@jit
def linear_token_logprobs_backward(
    hidden, weight, tokens, factors, out, N, V, C, first, factor_stride, out_stride, c,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """out[i, j] = the gradient of the logit of row i and column first + j. One program per tile."""
    row = row_numbers(BLOCK_M)
    at = tl.minimum(row, N - 1)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    x = tile_of_logits(hidden, weight, at, tl.minimum(col, V - 1), C, BLOCK_K, ROUND)
    peak = tl.load(factors + at)
    a = tl.load(factors + factor_stride + at)
    b = tl.load(factors + 2 * factor_stride + at)
    g = tl.load(factors + 3 * factor_stride + at)
    d = tl.maximum(x - peak[:, None], pieces.FLOOR / c)
    dx = tl.exp2(d * c) * (a[:, None] + b[:, None] * d)
    token = tl.load(tokens + at) - first
    token = tl.where((token >= 0) & (token < V), token, -1).to(tl.int32)
    dx += tl.where(col[None, :] == token[:, None], g[:, None], 0.0)
    ok = (row < N)[:, None] & (col < V)[None, :]
    to = out + row.to(tl.int64)[:, None] * out_stride + col[None, :]
    tl.store(to, dx.to(out.dtype.element_ty), mask=ok)


def tile_sizes(h: Tensor) -> dict[str, int]:
    """Smaller tiles where registers would not do: in fp32, and where 16 bytes of channels are not aligned."""
    wide, odd = h.element_size() // 2, 1 if h.shape[1] % 16 == 0 else 2
    return {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N // wide, "BLOCK_K": max(16, BLOCK_K // wide // odd)}


def launch_tiles(kernel: Any, rows: int, columns: int, h: Tensor, *args: Any, **options: Any) -> None:
    """Run a kernel on all row tiles of h, with `columns` programs side by side for each."""
    tiles = -(-rows // BLOCK_M)
    group = max(1, min(GROUP, tiles))
    launch(kernel, (group, columns, -(-tiles // group)), h, *args, **options, **tile_sizes(h), num_warps=8)


def operands(hidden: Tensor, weight: Tensor, product: torch.dtype) -> tuple[Tensor, Tensor, bool]:
    """Both in one dtype, and whether the logits are rounded to it. fp32 holds 16-bit products exactly."""
    dtype = hidden.dtype if hidden.dtype == weight.dtype and product == torch.float32 else product
    return hidden.to(dtype).contiguous(), weight.to(dtype).contiguous(), product != torch.float32


def gpu_statistics(hidden, weight, tokens, mask, temperature, product) -> tuple[Tensor, Tensor]:
    """-> the token's logit [N]; m, s and t of each split [3, splits, N]. Masked rows hold anything."""
    h, w, narrow = operands(hidden, weight, product)
    (N, C), V = h.shape, len(w)
    n_splits = -(-V // BLOCK_SPLIT)
    picked = h.new_full((N,), torch.nan, dtype=torch.float32)
    splits = h.new_empty(3, n_splits, N, dtype=torch.float32)
    args = (h, w, tokens, mask, picked, splits, N, V, C, pieces.LOG2E / temperature)
    launch_tiles(linear_token_logprobs_forward, N, n_splits, *args, BLOCK_SPLIT=BLOCK_SPLIT, ROUND=narrow)
    return picked, splits


def gpu_gradients(hidden, weight, tokens, mask, factors, temperature, product, wanted):
    """-> gradients of hidden [N, C] (anything if not wanted) and weight [V, C] (no element if not wanted)."""
    clean = hidden
    if mask is not None:  # 0 * NaN would be NaN
        clean, factors = torch.where(mask[:, None], hidden, 0.0).contiguous(), torch.where(mask, factors, 0.0)
    h, w, narrow = operands(clean, weight, product)
    (N, C), V, size, width = h.shape, len(w), h.element_size(), tile_sizes(h)["BLOCK_N"]

    def strip(i: int, j: int, n: int, v: int) -> Tensor:
        """The gradient of the logits of n rows from i on, at v columns from j on."""
        a, b = h[i : i + n], w[j : j + v]
        padded = -(-len(b) // 16) * 16  # so that every row starts at a multiple of 16 bytes
        out = h.new_empty(len(a), padded)[:, : len(b)]
        tensors = (a, b, tokens[i : i + n], factors[:, i : i + n], out)
        numbers = (*out.shape, C, j, factors.stride(0), out.stride(0), pieces.LOG2E / temperature)
        columns = -(-len(b) // width)
        launch_tiles(linear_token_logprobs_backward, len(a), columns, *tensors, *numbers, ROUND=narrow)
        return out

    grad_weight = weight.new_empty(weight.shape if wanted[1] else 0)
    if wanted[1]:
        v = max(1, BUDGET // size // (N + C) // width) * width
        for j in range(0, V, v):
            grad_weight[j : j + v] = strip(0, j, N, v).T @ h
    # The masked copy of the hidden states is needed until their gradient replaces it, row by row.
    grad_hidden = clean if mask is not None else hidden.new_empty(N, C)
    if wanted[0]:
        n = max(1, BUDGET // size // (V + C) // 16) * 16
        for i in range(0, N, n):
            grad_hidden[i : i + n] = strip(i, 0, n, V) @ w
    return grad_hidden, grad_weight

"""linear_token_logprobs in plain PyTorch: tiles of logits on CPU (and for float64), and what lies between tiles and rows.

The tiles go column by column: a tile's columns of the weight are converted once, their gradient is summed where it will
stay, and a tile is small enough to be reduced while it is still in a core's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .common import real_rows, result_dtype
from .logprobs import ZERO

TILE_M, TILE_N = 512, 1024  # rows and columns: 2 MiB in fp32


def merge(picked: Tensor, parts: Tensor, temperature: float) -> Tensor:
    """The token's logit [n]; max, sum e, sum e d over some columns each [3, parts, n] -> logprob, entropy, max, S [4, n]."""
    m, s, t = parts
    peak = m.amax(0)
    fall = (m - peak).clamp_(min=ZERO * temperature)
    shrink = (fall / temperature).exp_()
    total = (s * shrink).sum(0)
    t = fall.mul_(s).add_(t).mul_(shrink).sum(0)
    log_total = total.log()
    return torch.stack(
        [(picked - peak) / temperature - log_total, log_total - t / total / temperature, peak, total]
    )


def row_factors(tokens: Tensor, stats: Tensor, upstream: Tensor, V: int, temperature: float) -> Tensor:
    """Of what a row's gradient e_j (a + b d_j) + g [j = token] is made, with d_j = logit_j - max: max, a, b, g [4, n].

    A token outside the vocabulary (a GPU does not refuse it) makes the row's gradient NaN.
    """
    (entropy, peak, total), (g, g_entropy) = stats, upstream
    g = torch.where((tokens >= 0) & (tokens < V), g, torch.nan)
    a = -(g + g_entropy * (entropy - total.log())) / total
    return torch.stack([peak, a / temperature, -g_entropy / total / temperature**2, g / temperature])


def _tiles(
    h: Tensor, w: Tensor, tokens: Tensor, product: torch.dtype, dtype: torch.dtype
) -> Iterator[tuple[Any, ...]]:
    """-> rows, first column, operands, the tile of logits, and where in it tokens lie (rows, columns)."""
    h = h.to(product)
    for j in range(0, len(w), TILE_N):
        b = w[j : j + TILE_N].to(product)
        for i in range(0, len(h), TILE_M):
            a, token = h[i : i + TILE_M], tokens[i : i + TILE_M] - j
            row = ((token >= 0) & (token < len(b))).nonzero().squeeze(1)
            yield slice(i, i + len(a)), j, a, b, (a @ b.T).to(dtype), (row, token[row])


def plain_forward(
    h: Tensor, w: Tensor, tokens: Tensor, mask: Tensor | None, temperature: float, product: torch.dtype
) -> Tensor:
    """h [N, C], w [V, C] -> logprob, entropy, max, S [4, N], 0 in rows that do not count."""
    dtype, V = result_dtype(h, w), len(w)
    (real,) = real_rows(tokens, mask, V, V * max(1, len(h)))
    picked, parts = (
        h.new_empty(len(real), dtype=dtype),
        h.new_empty(3, -(-V // TILE_N), len(real), dtype=dtype),
    )
    for rows, j, _, _, x, here in _tiles(h[real], w, tokens[real], product, dtype):
        picked[rows][here[0]] = x[here]
        peak = x.amax(1).clamp_(min=torch.finfo(dtype).min)  # -inf - -inf must not arise
        d = x.sub_(peak[:, None]).clamp_(min=ZERO * temperature)
        e = (d / temperature).exp_()
        parts[:, j // TILE_N, rows] = torch.stack([peak, e.sum(1), d.mul_(e).sum(1)])
    found = h.new_zeros(4, len(h), dtype=dtype)
    found[:, real] = merge(picked, parts, temperature)
    return found


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, of operands that may be narrower."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def plain_backward(
    h: Tensor, w: Tensor, tokens: Tensor, mask: Tensor | None, factors: Tensor,
    temperature: float, product: torch.dtype, want: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> the gradients of h [N, C] and w [V, C] (if wanted; else no element), summed in the factors' dtype."""
    dtype, V = factors.dtype, len(w)
    (real,) = real_rows(tokens, mask, V, V * max(1, len(h)))
    grad_h, grad_w = h.new_zeros(len(real), h.shape[1], dtype=dtype), w.new_zeros(w.shape if want[1] else 0)
    with_entropy = bool(factors[2].any())
    for rows, j, a, b, x, here in _tiles(h[real], w, tokens[real], product, dtype):
        peak, offset, slope, g = factors[:, real[rows], None]
        d = x.sub_(peak)
        if with_entropy:
            e = (d.clamp_(min=ZERO * temperature) / temperature).exp_()
            dx = d.mul_(slope).add_(offset).mul_(e)
        else:
            dx = d.div_(temperature).exp_().mul_(offset)
        dx[here] += g[here[0], 0]
        dx = dx.to(product)
        if want[0]:
            _add_product(grad_h[rows], dx, b)
        if want[1]:
            if rows.start == 0:
                total = grad_h.new_zeros(b.shape)
            _add_product(total, dx.T, a)
            if rows.stop == len(real):
                grad_w[j : j + len(b)] = total
    grad = h.new_zeros(h.shape)
    grad[real] = grad_h.to(h.dtype)
    return grad, grad_w

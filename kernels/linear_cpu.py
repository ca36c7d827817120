"""linear_token_logprobs in plain PyTorch: tiles of logits on CPU, and on any device in float64.

A split of the vocabulary is TILE_N columns, and the tiles go split by split: the weight's rows of a split are
converted once, their gradient is summed where it will stay, and a tile is reduced while it is still in a
core's cache.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .dispatch import result_dtype
from .logprobs import ZERO

TILE_M, TILE_N = 512, 1024  # rows and columns of a tile: 2 MiB in fp32


def logit_tiles(h: Tensor, w: Tensor, tokens: Tensor, product: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Yields rows (a slice), the first column, both operands, the logits, and the tokens' places in these."""
    dtype = result_dtype(h, w)
    h = h.to(product)
    for j in range(0, len(w), TILE_N):
        b = w[j : j + TILE_N].to(product)
        for i in range(0, len(h), TILE_M):
            a, token = h[i : i + TILE_M], tokens[i : i + TILE_M] - j
            row = ((token >= 0) & (token < len(b))).nonzero().squeeze(1)
            yield slice(i, i + len(a)), j, a, b, (a @ b.T).to(dtype), (row, token[row])


def cpu_statistics(h, w, tokens, temperature, product) -> tuple[Tensor, Tensor]:
    """h [n, C], w [V, C] -> the token's logit [n]; m, s and t of each split [3, splits, n]."""
    dtype = result_dtype(h, w)
    picked = h.new_empty(len(h), dtype=dtype)
    splits = h.new_empty(3, -(-len(w) // TILE_N), len(h), dtype=dtype)
    for rows, j, _, _, x, places in logit_tiles(h, w, tokens, product):
        picked[rows][places[0]] = x[places]
        peak = x.amax(1).clamp_(min=torch.finfo(dtype).min)  # -inf - -inf must not occur
        d = x.sub_(peak[:, None]).clamp_(min=ZERO * temperature)
        e = (d / temperature).exp_()
        splits[:, j // TILE_N, rows] = torch.stack([peak, e.sum(1), d.mul_(e).sum(1)])
    return picked, splits


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b. The operands may be of lower precision than the total."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def cpu_gradients(h, w, tokens, factors, temperature, product, wanted) -> tuple[Tensor, Tensor]:
    """-> the gradients of h [n, C], in the factors' dtype, and of w [V, C] (no element if not wanted).

    `factors` [4, n] are those of linear_logprobs.row_factors. Both gradients are summed in their dtype.
    """
    grad_h = h.new_zeros(h.shape, dtype=factors.dtype)
    grad_w = w.new_zeros(w.shape if wanted[1] else 0)
    with_entropy = bool(factors[2].any())
    for rows, j, a, b, x, places in logit_tiles(h, w, tokens, product):
        peak, offset, slope, g = factors[:, rows, None]
        d = x.sub_(peak)
        if with_entropy:
            e = (d.clamp_(min=ZERO * temperature) / temperature).exp_()
            dx = d.mul_(slope).add_(offset).mul_(e)
        else:
            dx = d.div_(temperature).exp_().mul_(offset)
        dx[places] += g[places[0], 0]
        dx = dx.to(product)
        if wanted[0]:
            add_product(grad_h[rows], dx, b)
        if wanted[1]:
            if rows.start == 0:
                total = grad_h.new_zeros(b.shape)
            add_product(total, dx.T, a)
            if rows.stop == len(h):
                grad_w[j : j + len(b)] = total
    return grad_h, grad_w

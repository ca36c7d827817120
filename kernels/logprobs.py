"""Log-probability of each token, and the entropy of the distribution it was drawn from.

    z = logits / temperature      d_j = z_j - max z      S = sum_j exp(d_j)      p_j = exp(d_j) / S
    logprob = d_token - log S     entropy = log S - (1/S) sum_j exp(d_j) d_j
    d logprob / d logit_j = ([j = token] - p_j) / temperature
    d entropy / d logit_j = -p_j (log p_j + entropy) / temperature

Shapes: logits [..., V], tokens and mask [...], both results [...]. Forward reads each real row once; backward
reads it once and writes its gradient once. Beside the logits nothing of size [N, V] exists in forward, and
only the gradient in backward. Saved for backward: the logits, and 12 bytes per row (entropy, max, S). The
maximum is subtracted BEFORE scaling, and S is stored apart from it, so that large logits lose no precision.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import row_pieces as pieces
from .dispatch import check_rows, jit, result_dtype, tl
from .token_op import RowOp

ZERO = -1000.0  # exp(ZERO) is exactly 0, also in float64; a finite exponent never makes 0 * -inf


def token_logprobs_reference(
    logits: Tensor, tokens: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The oracle: both by plain differentiable operations, in the logits' dtype (at least fp32)."""
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    scaled = logits.to(result_dtype(logits)) / temperature
    logp = torch.where(real[..., None], scaled, 0.0).log_softmax(-1)
    picked = logp.gather(-1, torch.where(real, tokens, 0)[..., None]).squeeze(-1)
    entropy = -(logp.exp() * logp.clamp(min=ZERO)).sum(-1)
    return torch.where(real, picked, 0.0), torch.where(real, entropy, 0.0)


# Triton: one program per row. row_pieces.py explains how a row is split, and what absorb and merge_lanes do.


@jit
def token_logprobs_forward(
    logits, tokens, mask, results, stats, n_inner, n_cols, outer, inner, c, LANES: tl.constexpr
):
    """results [2, rows]: logprob, entropy. stats [3, rows]: entropy, max, S."""
    VEC: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
    row = tl.program_id(0).to(tl.int64)
    n_rows = tl.num_programs(0)
    if mask is not None:
        n_cols *= tl.load(mask + row).to(tl.int32)  # a masked row has no columns, so nothing of it is read
    offset = pieces.row_offset(row, n_inner, outer, inner)
    start, body, head, n_vec, lane, tile, edge = pieces.split_row(logits, offset, n_cols, LANES)

    m, s = tl.full((LANES,), pieces.LOWEST, tl.float32), tl.zeros((LANES,), tl.float32)
    t = s
    for v in range(0, n_vec, LANES):
        x = pieces.load_logits(body + (v * VEC + tile), v + lane < n_vec)
        m, s, t = pieces.absorb(x, m, s, t, c)
    x = pieces.load_logits(start + edge, edge < n_cols)
    m, s, t = pieces.absorb(x[:, None], m, s, t, c)
    peak, s, t = pieces.merge_lanes(m, s, t, c)

    # A token outside the vocabulary gives NaN: stopping the GPU to refuse it would cost more than the kernel.
    token = tl.load(tokens + row)
    known = (token >= 0) & (token < n_cols)
    x = tl.load(start + token, mask=known, other=float("nan")).to(tl.float32)
    logprob = tl.where(n_cols > 0, ((x - peak) * c - tl.log2(s)) * pieces.LN2, 0.0)
    entropy = tl.where(n_cols > 0, (tl.log2(s) - t / s * c) * pieces.LN2, 0.0)
    tl.store(results + row, logprob)
    tl.store(results + n_rows + row, entropy)
    tl.store(stats + row, entropy)
    tl.store(stats + n_rows + row, peak)
    tl.store(stats + 2 * n_rows + row, s)


@jit
def logit_gradient(x, column, peak, a, b, token, g, c):
    """([j = token] g - p_j (g + g_entropy (log p_j + entropy))) / temperature. a, b: what a row shares."""
    d = tl.maximum(x - peak, pieces.FLOOR / c)
    return tl.exp2(d * c) * (a + b * d) + tl.where(column == token, g, 0.0)


@jit
def token_logprobs_backward(
    logits, tokens, mask, stats, upstream, grad, n_inner, n_cols, outer, inner, c, scale, LANES: tl.constexpr
):
    """upstream [2, rows]: the gradients of logprob and entropy. grad [rows, V]. scale = 1 / temperature."""
    VEC: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
    dtype: tl.constexpr = grad.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    n_rows = tl.num_programs(0)
    live = True
    if mask is not None:  # a masked row is not read: its upstream gradients are 0, and so is all that follows
        live = tl.load(mask + row) != 0
    token = tl.load(tokens + row)
    known = (token >= 0) & (token < n_cols)
    g = tl.where(live & (known == 0), float("nan"), tl.load(upstream + row, mask=live, other=0.0))
    g_entropy = tl.load(upstream + n_rows + row, mask=live, other=0.0)
    entropy, peak = tl.load(stats + row), tl.load(stats + n_rows + row)
    total = tl.load(stats + 2 * n_rows + row, mask=live, other=1.0)
    share = tl.div_rn(scale, total)
    a = -(g + g_entropy * (entropy - tl.log2(total) * pieces.LN2)) * share
    b = -g_entropy * share * scale
    token, g = tl.where(known, token, -1).to(tl.int32), g * scale

    offset = pieces.row_offset(row, n_inner, outer, inner)
    start, body, head, n_vec, lane, tile, edge = pieces.split_row(logits, offset, n_cols, LANES)
    out, body_out = pieces.row_at(grad, row * n_cols, head)
    for v in range(0, n_vec, LANES):
        at, ok = v * VEC + tile, v + lane < n_vec
        x = pieces.load_logits(body + at, ok & live)
        dx = logit_gradient(x, head + at, peak, a, b, token, g, c)
        tl.store(body_out + at, dx.to(dtype), mask=ok)
    ok = edge < n_cols
    x = pieces.load_logits(start + edge, ok & live)
    dx = logit_gradient(x, edge, peak, a, b, token, g, c)
    tl.store(out + edge, dx.to(dtype), mask=ok)


# Plain PyTorch, for CPU and float64: a few rows [n, V] at a time


def row_stats(x: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [n, V], overwritten; tokens [n] -> logprobs, entropy, max, S, each [n]."""
    peak = x.amax(-1, keepdim=True)
    d = x.sub_(peak).mul_(1 / temperature)  # [D3]
    picked = d.gather(-1, tokens[:, None]).squeeze(-1)
    e = d.clamp_(min=ZERO).exp()
    total = e.sum(-1)
    log_total = total.log()
    return picked - log_total, log_total - e.mul_(d).sum(-1) / total, peak.squeeze(-1), total


def row_grads(x: Tensor, tokens: Tensor, stats: Tensor, up: Tensor, temperature: float) -> Iterator[Tensor]:
    """x [n, V], overwritten by its gradient, which is yielded; stats [3, n]; upstream gradients [2, n]."""
    entropy, peak, total = stats[..., None]
    g, g_entropy = up[..., None]
    d = x.sub_(peak).mul_(1 / temperature)
    if g_entropy.any():
        e = d.clamp_(min=ZERO).exp()
        d.add_(entropy - total.log()).mul_(g_entropy).add_(g).mul_(e).div_(total)
    else:
        d.exp_().mul_(g / total)
    yield d.scatter_add_(-1, tokens[:, None], -g).mul_(-1 / temperature)


KERNELS, PLAIN = (token_logprobs_forward, token_logprobs_backward), (row_stats, row_grads)
logprobs_op = RowOp("token_logprobs", KERNELS, PLAIN, n_results=2, n_stats=3)  # stats: entropy, max, S


def token_logprobs(
    logits: Tensor, tokens: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """logits [..., V], tokens [...] int64, mask [...] bool (True = counts) -> logprobs, entropy [...], fp32.

    Differentiable in the logits. float64 logits give float64. A logit of -inf is an impossible token. A row
    of only -inf has no distribution and gives NaN, as does a row with a NaN. Rows where the mask is False
    give 0, get no gradient, and may hold anything. Raises ValueError for arguments that do not fit together,
    and on CPU for a token outside the vocabulary; on a GPU the log-probability and the gradient of such a row
    are NaN.
    """
    check_rows("logits", logits, tokens, temperature, mask)
    results = logprobs_op([logits], tokens, temperature, mask)
    return results[0], results[1]

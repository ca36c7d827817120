"""Log-probability of each token, and the entropy of the distribution it was drawn from.

    z = logits / temperature      d_j = z_j - max z      S = sum_j exp(d_j)      p_j = exp(d_j) / S
    logprob = d_token - log S     entropy = log S - (1/S) sum_j exp(d_j) d_j
    d logprob / d logit_j = ([j = token] - p_j) / temperature
    d entropy / d logit_j = -p_j (log p_j + entropy) / temperature

Shapes: logits [..., V], tokens and mask [...], both results [...]. Forward reads each real row once, backward
reads it once and writes its gradient once; masked rows are not read at all. Besides the logits nothing of size [N, V]
exists in forward, and only the gradient in backward. Saved: the logits and 12 bytes a row (max, S, entropy). The maximum
is subtracted BEFORE scaling, and S is kept apart from it, so that logits of any size cost no precision.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import common
from .common import FLOOR, LN2, LOWEST, absorb, cut, jit, load, merge, row_offset, store_zeros, tl, vectors
from .rows import row_op

ZERO = -1000.0  # exp(ZERO) is exactly 0, also in float64; a finite exponent cannot make 0 * -inf


def token_logprobs_reference(
    logits: Tensor, tokens: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The oracle: the same by plain differentiable operations, in the logits' dtype (at least fp32)."""
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    logp = torch.where(
        real[..., None], logits.to(common.result_dtype(logits)) / temperature, 0.0
    ).log_softmax(-1)
    picked = logp.gather(-1, torch.where(real, tokens, 0)[..., None]).squeeze(-1)
    entropy = -(logp.exp() * logp.clamp(min=ZERO)).sum(-1)
    return torch.where(real, picked, 0.0), torch.where(real, entropy, 0.0)


# Triton: one program a row. How a row is cut, and what absorb and merge do, stands in common.py.


@jit
def token_logprobs_forward(
    x_ptr, token_ptr, mask_ptr, result_ptr, stat_ptr, n_inner, n_cols, outer, inner, c,
    VEC: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    n_rows = tl.num_programs(0)
    if mask_ptr is not None:
        n_cols *= tl.load(mask_ptr + row).to(tl.int32)  # a masked row has no columns: nothing of it is read
    offset = row_offset(row, n_inner, outer, inner)
    start = x_ptr + offset
    head, n_vec, lane, tile, edge = cut(start, n_cols, VEC, LANES)
    body = vectors(x_ptr, offset, head, VEC)
    m, s = tl.full((LANES,), LOWEST, tl.float32), tl.zeros((LANES,), tl.float32)
    t = s
    for v in range(0, n_vec, LANES):
        m, s, t = absorb(load(body + (v * VEC + tile), v + lane < n_vec), m, s, t, c)
    m, s, t = absorb(load(start + edge, edge < n_cols)[:, None], m, s, t, c)
    peak, s, t = merge(m, s, t, c)

    # Stopping the GPU to refuse a token outside the vocabulary would cost more than the kernel: it gives NaN.
    token = tl.load(token_ptr + row)
    known = (token >= 0) & (token < n_cols)
    x = tl.load(start + token, mask=known, other=float("nan")).to(tl.float32)
    entropy = tl.where(n_cols > 0, (tl.log2(s) - t / s * c) * LN2, 0.0)
    tl.store(result_ptr + row, tl.where(n_cols > 0, ((x - peak) * c - tl.log2(s)) * LN2, 0.0))
    tl.store(result_ptr + n_rows + row, entropy)
    tl.store(stat_ptr + row, entropy)
    tl.store(stat_ptr + n_rows + row, peak)
    tl.store(stat_ptr + 2 * n_rows + row, s)


@jit
def _gradient(x, peak, a, b, c):
    """-p_j (g + g_entropy (log p_j + entropy)) / temperature = e_j (a + b d_j): a and b hold what a row shares."""
    d = tl.maximum(x - peak, FLOOR / c)
    return tl.exp2(d * c) * (a + b * d)


@jit
def token_logprobs_backward(
    x_ptr, token_ptr, mask_ptr, stat_ptr, upstream_ptr, dx_ptr,
    n_inner, n_cols, outer, inner, c, scale, VEC: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    n_rows = tl.num_programs(0)
    dtype: tl.constexpr = dx_ptr.dtype.element_ty
    grad = dx_ptr + row * n_cols
    if mask_ptr is not None and tl.load(mask_ptr + row) == 0:
        store_zeros(dx_ptr, row * n_cols, n_cols, VEC, LANES)
        return
    offset = row_offset(row, n_inner, outer, inner)
    start = x_ptr + offset
    token = tl.load(token_ptr + row)
    known = (token >= 0) & (token < n_cols)
    g = tl.where(known, tl.load(upstream_ptr + row), float("nan"))
    g_entropy = tl.load(upstream_ptr + n_rows + row)
    entropy = tl.load(stat_ptr + row)
    peak = tl.load(stat_ptr + n_rows + row)
    total = tl.load(stat_ptr + 2 * n_rows + row)
    share = tl.div_rn(scale, total)
    a, b = -(g + g_entropy * (entropy - tl.log2(total) * LN2)) * share, -g_entropy * share * scale

    head, n_vec, lane, tile, edge = cut(start, n_cols, VEC, LANES)
    body, out = vectors(x_ptr, offset, head, VEC), vectors(dx_ptr, row * n_cols, head, VEC)
    for v in range(0, n_vec, LANES):
        at, ok = v * VEC + tile, v + lane < n_vec
        tl.store(out + at, _gradient(load(body + at, ok), peak, a, b, c).to(dtype), mask=ok)
    ok = edge < n_cols
    tl.store(grad + edge, _gradient(load(start + edge, ok), peak, a, b, c).to(dtype), mask=ok)
    # The token's own entry again, with its one-hot term: once a row, not a comparison at every column. The barrier
    # keeps this store behind the one of whichever thread has just written the same address.
    tl.debug_barrier()
    tl.store(
        grad + token, (_gradient(load(start + token, known), peak, a, b, c) + g * scale).to(dtype), mask=known
    )


# Plain PyTorch, for CPU and float64: tiles of a few rows [n, V]


def _row_stats(x: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [n, V], overwritten; tokens [n] -> logprobs, entropy, max, S, each [n]."""
    peak = x.amax(-1, keepdim=True)
    d = x.sub_(peak).mul_(1 / temperature)  # [D3]
    picked = d.gather(-1, tokens[:, None]).squeeze(-1)
    e = d.clamp_(min=ZERO).exp()
    total = e.sum(-1)
    log_total = total.log()
    return picked - log_total, log_total - e.mul_(d).sum(-1) / total, peak.squeeze(-1), total


def _row_grads(x: Tensor, tokens: Tensor, stats: Tensor, up: Tensor, temperature: float) -> Iterator[Tensor]:
    """x [n, V], overwritten by its gradient, the only one that is yielded; stats [3, n], up [2, n]."""
    entropy, peak, total = stats[..., None]
    g, g_entropy = up[..., None]
    d = x.sub_(peak).mul_(1 / temperature)
    if g_entropy.any():
        e = d.clamp_(min=ZERO).exp()
        d.add_(entropy - total.log()).mul_(g_entropy).add_(g).mul_(e).div_(total)
    else:
        d.exp_().mul_(g / total)
    yield d.scatter_add_(-1, tokens[:, None], -g).mul_(-1 / temperature)


# Results: logprobs, entropy. For backward: entropy, max, S.
_op = row_op(
    "token_logprobs", 2, 3, (token_logprobs_forward, token_logprobs_backward), (_row_stats, _row_grads)
)


def token_logprobs(
    logits: Tensor, tokens: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """logits [..., V], tokens [...] int64, mask [...] bool (True = counts) -> logprobs, entropy [...], fp32.

    Differentiable in the logits. float64 logits are computed and returned in float64. A -inf logit is an impossible
    token; a row of nothing else has no distribution and gives NaN, as does a row with a NaN. Rows where the mask is
    False give 0, get no gradient and may hold anything. Raises ValueError for arguments that do not fit together, and on
    CPU for a token outside the vocabulary; on a GPU such a row's logprob and gradient are NaN.
    """
    common.check_rows(logits, tokens, temperature, mask)
    results, _ = _op([logits], tokens, temperature, mask)
    return results[0], results[1]

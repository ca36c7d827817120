"""Log-probabilities under a policy and its reference, and the exact KL between them, over all the vocabulary.

    z = logits / temperature        d = z - max z      S = sum exp(d)      p = exp(d) / S      (the policy)
    y = ref_logits / temperature    w = y - max y      R = sum exp(w)      q = exp(w) / R      (the reference)
    kl = KL(p || q) = sum_j p_j (log p_j - log q_j) = (1/S) sum_j exp(d_j) (d_j - w_j) + log(R / S)
    d kl / d logit_j     = p_j (log p_j - log q_j - kl) / temperature
    d kl / d ref_logit_j = (q_j - p_j) / temperature

Shapes: both logits [..., V], tokens and mask [...], the four results [...]. Forward reads each real row of both once, and so
does backward, which writes each wanted gradient once. Nothing else is of size [N, V]. Saved: the logits and 24 bytes a row
(entropy, kl, max and S of each). The KL is a sum over the DIFFERENCE of shifted logits, so that equal inputs give
exactly 0. It is +inf, and passes no gradient on, where the reference rules out what the policy allows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from . import common
from .common import (
    FLOOR,
    LN2,
    LOWEST,
    NEG_INF,
    constexpr,
    cut,
    jit,
    load,
    row_offset,
    store_zeros,
    tl,
    vectors,
)
from .logprobs import ZERO, token_logprobs_reference
from .rows import row_op

# A possible token keeps a weight above 0, so that it makes the KL infinite where the reference rules it out, however
# unlikely it is: 2^TINY is a normal fp32 number, and lost in a sum that is at least 1.
TINY = constexpr(-125.0)
FAR = constexpr(-1e20)  # stands for -inf where it will only be multiplied by 0


def token_kl_reference(
    logits: Tensor, ref_logits: Tensor, tokens: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The oracle: the same by plain differentiable operations, in the logits' dtype (at least fp32)."""
    logprobs, entropy = token_logprobs_reference(logits, tokens, temperature, mask)
    ref_logprobs, _ = token_logprobs_reference(ref_logits, tokens, temperature, mask)
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    real_logits = (
        torch.where(real[..., None], x.to(common.result_dtype(x)), 0.0) for x in (logits, ref_logits)
    )
    z, y = ((x / temperature).log_softmax(-1) for x in real_logits)
    possible, ruled_out = z != -math.inf, y == -math.inf
    kl = (z.exp() * torch.where(possible & ~ruled_out, z - y, 0.0)).sum(-1)
    kl = torch.where((possible & ruled_out).any(-1) & ~kl.isnan(), math.inf, kl)
    return logprobs, ref_logprobs, entropy, torch.where(real, kl, 0.0)


# Triton: one program a row of each. How a row is cut, and the clamps, stand in common.py.


@jit
def _rescale(m, s, t, n, r, u, m_new, n_new, c):
    """Sums relative to maxima m of x and n of y, made relative to m_new >= m and n_new >= n."""
    fall, ref_fall = tl.maximum(m - m_new, FAR), tl.maximum(n - n_new, FAR)
    shrink = tl.exp2(tl.maximum(fall * c, TINY))
    u = shrink * (u + (fall - ref_fall) * s)
    return shrink * s, shrink * (t + fall * s), tl.exp2(ref_fall * c) * r, u


@jit
def _absorb(x, y, m, s, t, n, r, u, c):
    """Take logits x and y [LANES, VEC] into each lane's statistics, as common.absorb does: with d = x - m, e = 2^(c d),
    w = y - n and f = 2^(c w) they are s = sum e, t = sum e d, r = sum f and u = sum e (d - w)."""
    m_new, n_new = tl.maximum(m, tl.max(x, 1)), tl.maximum(n, tl.max(y, 1))
    s, t, r, u = _rescale(m, s, t, n, r, u, m_new, n_new, c)
    d, w = x - m_new[:, None], y - n_new[:, None]
    gap = tl.where(
        x > NEG_INF, d - w, 0.0
    )  # what the policy rules out adds nothing, whatever the reference says
    d = tl.maximum(d, TINY / c, propagate_nan=tl.PropagateNan.ALL)
    e = tl.exp2(d * c)
    return (
        m_new,
        s + tl.sum(e, 1),
        t + tl.sum(e * d, 1),
        n_new,
        r + tl.sum(tl.exp2(w * c), 1),
        u + tl.sum(e * gap, 1),
    )


@jit
def token_kl_forward(
    x_ptr, y_ptr, token_ptr, mask_ptr, result_ptr, stat_ptr,
    n_inner, n_cols, outer, inner, ref_outer, ref_inner, c, VEC: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    n_rows = tl.num_programs(0)
    if mask_ptr is not None:
        n_cols *= tl.load(mask_ptr + row).to(tl.int32)  # a masked row has no columns: nothing of it is read
    offset, ref_offset = (
        row_offset(row, n_inner, outer, inner),
        row_offset(row, n_inner, ref_outer, ref_inner),
    )
    start, ref_start = x_ptr + offset, y_ptr + ref_offset
    head, n_vec, lane, tile, edge = cut(start, n_cols, VEC, LANES)
    body, ref_body = vectors(x_ptr, offset, head, VEC), vectors(y_ptr, ref_offset, head, VEC)  # see in_phase
    m, s = tl.full((LANES,), LOWEST, tl.float32), tl.zeros((LANES,), tl.float32)
    t, n, r, u = s, m, s, s
    for v in range(0, n_vec, LANES):
        at, ok = v * VEC + tile, v + lane < n_vec
        x, y = load(body + at, ok), load(ref_body + at, ok)
        m, s, t, n, r, u = _absorb(x, y, m, s, t, n, r, u, c)
    x, y = load(start + edge, edge < n_cols), load(ref_start + edge, edge < n_cols)
    m, s, t, n, r, u = _absorb(x[:, None], y[:, None], m, s, t, n, r, u, c)
    peak, ref_peak = tl.max(m, 0), tl.max(n, 0)
    s, t, r, u = _rescale(m, s, t, n, r, u, peak, ref_peak, c)
    s, t, r, u = tl.sum(s, 0), tl.sum(t, 0), tl.sum(r, 0), tl.sum(u, 0)
    s = tl.where(
        (s < 1.0) & (n_cols > 0), float("nan"), s
    )  # the likeliest token alone adds 1: no token is possible

    token = tl.load(token_ptr + row)
    known = (token >= 0) & (token < n_cols)
    x = tl.load(start + token, mask=known, other=float("nan")).to(tl.float32)
    y = tl.load(ref_start + token, mask=known, other=float("nan")).to(tl.float32)
    entropy = tl.where(n_cols > 0, (tl.log2(s) - t / s * c) * LN2, 0.0)
    # Of r / s alone the rounding is exact: for equal inputs it is 1, and its logarithm 0.
    kl = tl.where(n_cols > 0, (u / s * c + tl.log2(tl.div_rn(r, s))) * LN2, 0.0)
    tl.store(result_ptr + row, tl.where(n_cols > 0, ((x - peak) * c - tl.log2(s)) * LN2, 0.0))
    tl.store(result_ptr + n_rows + row, tl.where(n_cols > 0, ((y - ref_peak) * c - tl.log2(r)) * LN2, 0.0))
    tl.store(result_ptr + 2 * n_rows + row, entropy)
    tl.store(result_ptr + 3 * n_rows + row, kl)
    tl.store(stat_ptr + row, entropy)
    tl.store(stat_ptr + n_rows + row, kl)
    tl.store(stat_ptr + 2 * n_rows + row, peak)
    tl.store(stat_ptr + 3 * n_rows + row, s)
    tl.store(stat_ptr + 4 * n_rows + row, ref_peak)
    tl.store(stat_ptr + 5 * n_rows + row, r)


@jit
def _gradients(x, y, peak, ref_peak, a, b, k, mean_gap, ratio, ref_a, ref_k, c):
    """e_j, and both gradients but for their one-hot terms; the scalars hold what a row shares."""
    d = tl.maximum(x - peak, FLOOR / c)
    w = tl.maximum(y - ref_peak, FAR)
    e, f = tl.exp2(d * c), tl.exp2(w * c)
    # Subtract, then multiply: whether products are fused or not, equal inputs leave exactly 0 of the KL's terms.
    return e, e * (a + b * d + k * (d - w - mean_gap)), ref_k * (f - ratio * e) - ref_a * f


@jit
def token_kl_backward(
    x_ptr, y_ptr, token_ptr, mask_ptr, stat_ptr, upstream_ptr, dx_ptr, dy_ptr,
    n_inner, n_cols, outer, inner, ref_outer, ref_inner, c, scale, VEC: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    n_rows = tl.num_programs(0)
    dtype: tl.constexpr = dx_ptr.dtype.element_ty
    grad = dx_ptr + row * n_cols
    ref_grad = grad if dy_ptr is None else dy_ptr + row * n_cols
    if mask_ptr is not None and tl.load(mask_ptr + row) == 0:
        store_zeros(dx_ptr, row * n_cols, n_cols, VEC, LANES)
        if dy_ptr is not None:
            store_zeros(dy_ptr, row * n_cols, n_cols, VEC, LANES)
        return
    offset, ref_offset = (
        row_offset(row, n_inner, outer, inner),
        row_offset(row, n_inner, ref_outer, ref_inner),
    )
    start, ref_start = x_ptr + offset, y_ptr + ref_offset
    token = tl.load(token_ptr + row)
    known = (token >= 0) & (token < n_cols)
    entropy, kl = tl.load(stat_ptr + row), tl.load(stat_ptr + n_rows + row)
    peak, total = tl.load(stat_ptr + 2 * n_rows + row), tl.load(stat_ptr + 3 * n_rows + row)
    ref_peak, ref_total = tl.load(stat_ptr + 4 * n_rows + row), tl.load(stat_ptr + 5 * n_rows + row)
    g = tl.where(known, tl.load(upstream_ptr + row), float("nan"))
    g_ref = tl.where(known, tl.load(upstream_ptr + n_rows + row), float("nan"))
    g_entropy, g_kl = tl.load(upstream_ptr + 2 * n_rows + row), tl.load(upstream_ptr + 3 * n_rows + row)
    g_kl = tl.where(kl == float("inf"), 0.0, g_kl)
    share, ref_share, ratio = (
        tl.div_rn(scale, total),
        tl.div_rn(scale, ref_total),
        tl.div_rn(ref_total, total),
    )
    mean_gap = tl.where(
        kl == float("inf"), 0.0, tl.div_rn(kl - tl.log2(ratio) * LN2, scale)
    )  # sum_j p_j (d_j - w_j)
    a, b = -(g + g_entropy * (entropy - tl.log2(total) * LN2)) * share, -g_entropy * share * scale
    k, ref_a, ref_k = g_kl * share * scale, g_ref * ref_share, g_kl * ref_share
    head, n_vec, lane, tile, edge = cut(start, n_cols, VEC, LANES)
    body, ref_body = vectors(x_ptr, offset, head, VEC), vectors(y_ptr, ref_offset, head, VEC)
    out = vectors(dx_ptr, row * n_cols, head, VEC)
    ref_out = out if dy_ptr is None else vectors(dy_ptr, row * n_cols, head, VEC)
    excess = tl.zeros((LANES,), tl.float32)
    likely = tl.full((LANES,), -1, tl.int32)  # a column of the policy's maximum
    for v in range(0, n_vec, LANES):
        at, ok = v * VEC + tile, v + lane < n_vec
        x, y = load(body + at, ok), load(ref_body + at, ok)
        _, dx, dy = _gradients(x, y, peak, ref_peak, a, b, k, mean_gap, ratio, ref_a, ref_k, c)
        tl.store(out + at, dx.to(dtype), mask=ok)
        if dy_ptr is not None:
            tl.store(ref_out + at, dy.to(dtype), mask=ok)
        excess += tl.sum(dx, 1)
        likely = tl.maximum(likely, tl.max(tl.where(x == peak, head + at, -1), 1))
    ok = edge < n_cols
    x, y = load(start + edge, ok), load(ref_start + edge, ok)
    _, dx, dy = _gradients(x, y, peak, ref_peak, a, b, k, mean_gap, ratio, ref_a, ref_k, c)
    tl.store(grad + edge, dx.to(dtype), mask=ok)
    if dy_ptr is not None:
        tl.store(ref_grad + edge, dy.to(dtype), mask=ok)
    excess = tl.sum(excess + dx, 0) + g * scale
    likely = tl.max(tl.maximum(likely, tl.where(x == peak, edge, -1)), 0)

    # Two columns are written again, behind the barrier: the token's, which has the one-hot term, and a likeliest one.
    # With p near 1, log p - log q - kl nearly cancels there, and a rounding of kl remains. But exact gradients sum to 0
    # over a row: p times what these sum to is what the rounding has added.
    tl.debug_barrier()
    col = tl.where(tl.arange(0, 2) == 0, likely, token)
    ok = (col >= 0) & (col < n_cols)
    x, y = load(start + col, ok), load(ref_start + col, ok)
    e, dx, dy = _gradients(x, y, peak, ref_peak, a, b, k, mean_gap, ratio, ref_a, ref_k, c)
    tl.store(
        grad + col, (dx - e / total * excess + tl.where(col == token, g * scale, 0.0)).to(dtype), mask=ok
    )
    if dy_ptr is not None:
        tl.store(ref_grad + col, (dy + tl.where(col == token, g_ref * scale, 0.0)).to(dtype), mask=ok)


# Plain PyTorch, for CPU and float64


def _pair_stats(x: Tensor, y: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """x, y [n, V], overwritten -> logprobs, ref_logprobs, entropy, kl, max x, S, max y, R, each [n]."""
    peak, ref_peak = x.amax(-1, keepdim=True), y.amax(-1, keepdim=True)
    d, w = x.sub_(peak).mul_(1 / temperature), y.sub_(ref_peak).mul_(1 / temperature)
    picked, ref_picked = (v.gather(-1, tokens[:, None]).squeeze(-1) for v in (d, w))
    ref_total = w.exp().sum(-1)
    gap = w.sub_(d).neg_().masked_fill_(d == -math.inf, 0.0)
    e = d.clamp_(min=-86.0).exp()  # the kernel's TINY
    total = e.sum(-1)
    kl = gap.mul_(e).sum(-1) / total + (ref_total / total).log()
    entropy = total.log() - e.mul_(d).sum(-1) / total
    own, ref = picked - total.log(), ref_picked - ref_total.log()
    return own, ref, entropy, kl, peak.squeeze(-1), total, ref_peak.squeeze(-1), ref_total


def _pair_grads(
    x: Tensor, y: Tensor, tokens: Tensor, stats: Tensor, up: Tensor, temperature: float
) -> Iterator[Tensor]:
    """x, y [n, V], overwritten; stats [6, n], up [4, n] -> yields the gradients; the second is only computed if asked for."""
    entropy, kl, peak, total, ref_peak, ref_total = stats[..., None]
    g, g_ref, g_entropy, g_kl = up[..., None]
    g_kl, kl = (v.masked_fill(kl.isinf(), 0.0) for v in (g_kl, kl))
    d = x.sub_(peak).mul_(1 / temperature).clamp_(min=ZERO)
    w = y.sub_(ref_peak).mul_(1 / temperature).clamp_(min=-1e20)  # the kernel's FAR
    p = d.exp().div_(total)
    # p (g_kl (log p/q - kl) - g_entropy (log p + entropy)) + g ([j = token] - p). The first term sums to 0 over a row:
    # subtracting p times its sum supplies the constants left out, and takes away the rounding of kl, which can be large.
    grad = (d - w).add_((ref_total / total).log() - kl).mul_(g_kl).addcmul_(d, g_entropy, value=-1.0).mul_(p)
    grad.addcmul_(p, grad.sum(-1, keepdim=True) + g, value=-1.0).scatter_add_(-1, tokens[:, None], g)
    yield grad.mul_(1 / temperature)
    # g_kl (q - p) + g_ref ([j = token] - q)
    ref_grad = w.exp_().mul_((g_kl - g_ref) / ref_total).addcmul_(p, g_kl, value=-1.0)
    yield ref_grad.scatter_add_(-1, tokens[:, None], g_ref).mul_(1 / temperature)


# Results: logprobs, ref_logprobs, entropy, kl. For backward: entropy, kl, max x, S, max y, R.
_op = row_op("token_kl", 4, 6, (token_kl_forward, token_kl_backward), (_pair_stats, _pair_grads))


def token_kl(
    logits: Tensor, ref_logits: Tensor, tokens: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both logits [..., V], tokens [...] int64, mask [...] bool -> logprobs, ref_logprobs, entropy, kl [...].

    fp32 whatever the inputs (float64 if one of them is); differentiable in both logits; kl = KL(policy || ref). -inf, NaN,
    masked rows, tokens outside the vocabulary and errors are as in token_logprobs.
    """
    if (one := (tuple(logits.shape), logits.device)) != (two := (tuple(ref_logits.shape), ref_logits.device)):
        raise ValueError(f"logits and ref_logits differ: {one}, {two}")
    for x in (logits, ref_logits):
        common.check_rows(x, tokens, temperature, mask)
    dtype = torch.promote_types(logits.dtype, ref_logits.dtype)
    results, _ = _op([logits.to(dtype), ref_logits.to(dtype)], tokens, temperature, mask)
    return results[0], results[1], results[2], results[3]

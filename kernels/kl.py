"""Log-probabilities under a policy and its reference, and the exact KL between them over all the vocabulary.

    z = logits / temperature        d = z - max z      S = sum exp(d)      p = exp(d) / S      (the policy)
    y = ref_logits / temperature    w = y - max y      R = sum exp(w)      q = exp(w) / R      (the reference)
    kl = KL(p || q) = sum_j p_j (log p_j - log q_j) = (1/S) sum_j exp(d_j) (d_j - w_j) + log(R / S)
    d kl / d logit_j     = p_j (log p_j - log q_j - kl) / temperature
    d kl / d ref_logit_j = (q_j - p_j) / temperature

Shapes: both logits [..., V], tokens and mask [...], the four results [...]. Forward reads each real row of
both once; so does backward, which writes each wanted gradient once. Nothing else is of size [N, V]. Saved for
backward: the logits, and 24 bytes per row (entropy, kl, max x, S, max y, R). The KL is a sum over the
DIFFERENCE of shifted logits, so that equal inputs give exactly 0. It is +inf, and passes no gradient on,
where the reference rules out what the policy allows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from . import row_pieces as pieces
from .dispatch import check, check_rows, constexpr, jit, result_dtype, tl
from .logprobs import ZERO, token_logprobs_reference
from .token_op import RowOp

# A possible token keeps a weight above 0, however unlikely it is, and makes the KL infinite where the
# reference rules it out: 2^TINY is a normal fp32 number, and vanishes in a sum of at least 1.
TINY = constexpr(-125.0)
FAR = constexpr(-1e20)  # replaces -inf where it is only multiplied by 0


def token_kl_reference(
    logits: Tensor, ref_logits: Tensor, tokens: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The oracle: all four by plain differentiable operations, in the logits' dtype (at least fp32)."""
    logprobs, entropy = token_logprobs_reference(logits, tokens, temperature, mask)
    ref_logprobs, _ = token_logprobs_reference(ref_logits, tokens, temperature, mask)
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    both = (torch.where(real[..., None], x.to(result_dtype(x)), 0.0) for x in (logits, ref_logits))
    z, y = ((x / temperature).log_softmax(-1) for x in both)
    possible, ruled_out = z != -math.inf, y == -math.inf
    kl = (z.exp() * torch.where(possible & ~ruled_out, z - y, 0.0)).sum(-1)
    kl = torch.where((possible & ruled_out).any(-1) & ~kl.isnan(), math.inf, kl)
    return logprobs, ref_logprobs, entropy, torch.where(real, kl, 0.0)


# Triton: one program per row of each, as in row_pieces.py. A lane's statistics of x (policy) and y
# (reference):
#
#     m = max x    d = x - m    e = 2^(c d)    s = sum e    t = sum e d          c = log2(e) / temperature
#     n = max y    w = y - n    f = 2^(c w)    r = sum f    u = sum e (d - w)


@jit
def rescale_pair(m, s, t, n, r, u, m_new, n_new, c):
    """The sums relative to maxima m and n -> the same relative to m_new >= m and n_new >= n."""
    fall, ref_fall = tl.maximum(m - m_new, FAR), tl.maximum(n - n_new, FAR)
    shrink = tl.exp2(tl.maximum(fall * c, TINY))
    u = shrink * (u + (fall - ref_fall) * s)
    return shrink * s, shrink * (t + fall * s), tl.exp2(ref_fall * c) * r, u


@jit
def absorb_pair(x, y, m, s, t, n, r, u, c):
    """Add logits x and y [LANES, VEC] to each lane's six statistics [LANES]."""
    m_new, n_new = tl.maximum(m, tl.max(x, 1)), tl.maximum(n, tl.max(y, 1))
    s, t, r, u = rescale_pair(m, s, t, n, r, u, m_new, n_new, c)
    d, w = x - m_new[:, None], y - n_new[:, None]
    # What the policy rules out adds nothing to the gap, whatever the reference says.
    gap = tl.where(x > pieces.NEG_INF, d - w, 0.0)
    d = tl.maximum(d, TINY / c, propagate_nan=tl.PropagateNan.ALL)
    e, f = tl.exp2(d * c), tl.exp2(w * c)
    return m_new, s + tl.sum(e, 1), t + tl.sum(e * d, 1), n_new, r + tl.sum(f, 1), u + tl.sum(e * gap, 1)


@jit
def token_kl_forward(
    logits, ref_logits, tokens, mask, results, stats,
    n_inner, n_cols, outer, inner, ref_outer, ref_inner, c, LANES: tl.constexpr,
):  # fmt: skip
    """results [4, rows]: logprob, ref_logprob, entropy, kl. stats [6, rows]: see the top of this file."""
    VEC: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
    row = tl.program_id(0).to(tl.int64)
    n_rows = tl.num_programs(0)
    if mask is not None:
        n_cols *= tl.load(mask + row).to(tl.int32)  # a masked row has no columns, so nothing of it is read
    offset = pieces.row_offset(row, n_inner, outer, inner)
    ref_offset = pieces.row_offset(row, n_inner, ref_outer, ref_inner)
    start, body, head, n_vec, lane, tile, edge = pieces.split_row(logits, offset, n_cols, LANES)
    ref_start, ref_body = pieces.row_at(ref_logits, ref_offset, head)  # split alike: token_op.same_phase

    m, s = tl.full((LANES,), pieces.LOWEST, tl.float32), tl.zeros((LANES,), tl.float32)
    t, n, r, u = s, m, s, s
    for v in range(0, n_vec, LANES):
        at, ok = v * VEC + tile, v + lane < n_vec
        x, y = pieces.load_logits(body + at, ok), pieces.load_logits(ref_body + at, ok)
        m, s, t, n, r, u = absorb_pair(x, y, m, s, t, n, r, u, c)
    ok = edge < n_cols
    x, y = pieces.load_logits(start + edge, ok), pieces.load_logits(ref_start + edge, ok)
    m, s, t, n, r, u = absorb_pair(x[:, None], y[:, None], m, s, t, n, r, u, c)
    peak, ref_peak = tl.max(m, 0), tl.max(n, 0)
    s, t, r, u = rescale_pair(m, s, t, n, r, u, peak, ref_peak, c)
    s, t, r, u = tl.sum(s, 0), tl.sum(t, 0), tl.sum(r, 0), tl.sum(u, 0)
    # The likeliest token alone adds 1 to s: below 1, no token is possible.
    s = tl.where((s < 1.0) & (n_cols > 0), float("nan"), s)

    token = tl.load(tokens + row)
    known = (token >= 0) & (token < n_cols)
    x = tl.load(start + token, mask=known, other=float("nan")).to(tl.float32)
    y = tl.load(ref_start + token, mask=known, other=float("nan")).to(tl.float32)
    logprob = tl.where(n_cols > 0, ((x - peak) * c - tl.log2(s)) * pieces.LN2, 0.0)
    ref_logprob = tl.where(n_cols > 0, ((y - ref_peak) * c - tl.log2(r)) * pieces.LN2, 0.0)
    entropy = tl.where(n_cols > 0, (tl.log2(s) - t / s * c) * pieces.LN2, 0.0)
    # div_rn rounds exactly: for equal inputs r / s is 1, and its logarithm 0.
    kl = tl.where(n_cols > 0, (u / s * c + tl.log2(tl.div_rn(r, s))) * pieces.LN2, 0.0)
    tl.store(results + row, logprob)
    tl.store(results + n_rows + row, ref_logprob)
    tl.store(results + 2 * n_rows + row, entropy)
    tl.store(results + 3 * n_rows + row, kl)
    tl.store(stats + row, entropy)
    tl.store(stats + n_rows + row, kl)
    tl.store(stats + 2 * n_rows + row, peak)
    tl.store(stats + 3 * n_rows + row, s)
    tl.store(stats + 4 * n_rows + row, ref_peak)
    tl.store(stats + 5 * n_rows + row, r)


@jit
def pair_gradients(x, y, peak, ref_peak, a, b, k, mean_gap, ratio, ref_a, ref_k, c):
    """Both gradients without one-hot terms, and e_j. The scalars hold what all columns of a row share."""
    d = tl.maximum(x - peak, pieces.FLOOR / c)
    w = tl.maximum(y - ref_peak, FAR)
    e, f = tl.exp2(d * c), tl.exp2(w * c)
    # Subtract first, then multiply: then equal inputs leave exactly 0, with or without fused products.
    return e * (a + b * d + k * (d - w - mean_gap)), ref_k * (f - ratio * e) - ref_a * f, e


@jit
def token_kl_backward(
    logits, ref_logits, tokens, mask, stats, upstream, grad, ref_grad,
    n_inner, n_cols, outer, inner, ref_outer, ref_inner, c, scale, LANES: tl.constexpr,
):  # fmt: skip
    """upstream [4, rows]: the results' gradients; grad, ref_grad [rows, V], the latter None if not wanted."""
    VEC: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
    dtype: tl.constexpr = grad.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    n_rows = tl.num_programs(0)
    live = True
    if mask is not None:  # a masked row is not read: its upstream gradients are 0, and so is all that follows
        live = tl.load(mask + row) != 0
    token = tl.load(tokens + row)
    known = (token >= 0) & (token < n_cols)
    entropy, kl = tl.load(stats + row), tl.load(stats + n_rows + row)
    peak, ref_peak = tl.load(stats + 2 * n_rows + row), tl.load(stats + 4 * n_rows + row)
    total = tl.load(stats + 3 * n_rows + row, mask=live, other=1.0)
    ref_total = tl.load(stats + 5 * n_rows + row, mask=live, other=1.0)
    g = tl.load(upstream + row, mask=live, other=0.0)
    g_ref = tl.load(upstream + n_rows + row, mask=live, other=0.0)
    unknown = (known == 0) & live
    g, g_ref = tl.where(unknown, float("nan"), g), tl.where(unknown, float("nan"), g_ref)
    g_entropy = tl.load(upstream + 2 * n_rows + row, mask=live, other=0.0)
    g_kl = tl.load(upstream + 3 * n_rows + row, mask=live, other=0.0)

    # What all columns share. mean_gap = sum_j p_j (d_j - w_j).
    infinite = kl == float("inf")
    g_kl = tl.where(infinite, 0.0, g_kl)
    share, ref_share = tl.div_rn(scale, total), tl.div_rn(scale, ref_total)
    ratio = tl.div_rn(ref_total, total)
    mean_gap = tl.where(infinite, 0.0, tl.div_rn(kl - tl.log2(ratio) * pieces.LN2, scale))
    a = -(g + g_entropy * (entropy - tl.log2(total) * pieces.LN2)) * share
    b = -g_entropy * share * scale
    k, ref_a, ref_k = g_kl * share * scale, g_ref * ref_share, g_kl * ref_share
    token, g, g_ref = tl.where(known, token, -1).to(tl.int32), g * scale, g_ref * scale

    offset = pieces.row_offset(row, n_inner, outer, inner)
    ref_offset = pieces.row_offset(row, n_inner, ref_outer, ref_inner)
    start, body, head, n_vec, lane, tile, edge = pieces.split_row(logits, offset, n_cols, LANES)
    ref_start, ref_body = pieces.row_at(ref_logits, ref_offset, head)
    out, body_out = pieces.row_at(grad, row * n_cols, head)
    if ref_grad is not None:
        ref_out, ref_body_out = pieces.row_at(ref_grad, row * n_cols, head)

    excess = tl.zeros((LANES,), tl.float32)  # the sum of the gradients without one-hot terms
    likely = tl.full((LANES,), -1, tl.int32)  # a column of the policy's maximum
    for v in range(0, n_vec, LANES):
        at, ok = v * VEC + tile, v + lane < n_vec
        x, y = pieces.load_logits(body + at, ok & live), pieces.load_logits(ref_body + at, ok & live)
        dx, dy, _ = pair_gradients(x, y, peak, ref_peak, a, b, k, mean_gap, ratio, ref_a, ref_k, c)
        is_token = head + at == token
        tl.store(body_out + at, (dx + tl.where(is_token, g, 0.0)).to(dtype), mask=ok)
        if ref_grad is not None:
            tl.store(ref_body_out + at, (dy + tl.where(is_token, g_ref, 0.0)).to(dtype), mask=ok)
        excess += tl.sum(dx, 1)
        likely = tl.maximum(likely, tl.max(tl.where(x == peak, head + at, -1), 1))
    ok, is_token = edge < n_cols, edge == token
    x, y = pieces.load_logits(start + edge, ok & live), pieces.load_logits(ref_start + edge, ok & live)
    dx, dy, _ = pair_gradients(x, y, peak, ref_peak, a, b, k, mean_gap, ratio, ref_a, ref_k, c)
    tl.store(out + edge, (dx + tl.where(is_token, g, 0.0)).to(dtype), mask=ok)
    if ref_grad is not None:
        tl.store(ref_out + edge, (dy + tl.where(is_token, g_ref, 0.0)).to(dtype), mask=ok)
    excess = tl.sum(excess + dx, 0) + g
    likely = tl.max(tl.maximum(likely, tl.where(x == peak, edge, -1)), 0)

    # Where p is near 1, log p - log q - kl nearly cancels, and the rounding of kl remains. Exact gradients
    # sum to 0 over a row, so their sum is that rounding; p times it is subtracted at a likeliest column. The
    # barrier keeps this second store after the first. In the wrong order, the rounding would remain.
    tl.debug_barrier()
    x = pieces.load_logits(start + likely, likely >= 0)
    y = pieces.load_logits(ref_start + likely, likely >= 0)
    dx, _, e = pair_gradients(x, y, peak, ref_peak, a, b, k, mean_gap, ratio, ref_a, ref_k, c)
    dx += tl.where(likely == token, g, 0.0) - e / total * excess
    tl.store(out + likely, dx.to(dtype), mask=likely >= 0)


# Plain PyTorch, for CPU and float64


def pair_stats(x: Tensor, y: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, ...]:
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


def pair_grads(x, y, tokens, stats, up, temperature) -> Iterator[Tensor]:
    """x, y [n, V], overwritten; stats [6, n], upstream gradients [4, n] -> yields one gradient at a time."""
    entropy, kl, peak, total, ref_peak, ref_total = stats[..., None]
    g, g_ref, g_entropy, g_kl = up[..., None]
    g_kl, kl = (v.masked_fill(kl.isinf(), 0.0) for v in (g_kl, kl))
    d = x.sub_(peak).mul_(1 / temperature).clamp_(min=ZERO)
    w = y.sub_(ref_peak).mul_(1 / temperature).clamp_(min=-1e20)  # the kernel's FAR
    p = d.exp().div_(total)
    # p (g_kl (log p/q - kl) - g_entropy (log p + entropy)) + g ([j = token] - p). The first term sums to 0
    # over a row: p times its sum is subtracted, which supplies the constants left out and removes the
    # rounding of kl.
    grad = (d - w).add_((ref_total / total).log() - kl).mul_(g_kl).addcmul_(d, g_entropy, value=-1.0).mul_(p)
    grad.addcmul_(p, grad.sum(-1, keepdim=True) + g, value=-1.0).scatter_add_(-1, tokens[:, None], g)
    yield grad.mul_(1 / temperature)
    # g_kl (q - p) + g_ref ([j = token] - q)
    ref_grad = w.exp_().mul_((g_kl - g_ref) / ref_total).addcmul_(p, g_kl, value=-1.0)
    yield ref_grad.scatter_add_(-1, tokens[:, None], g_ref).mul_(1 / temperature)


KERNELS, PLAIN = (token_kl_forward, token_kl_backward), (pair_stats, pair_grads)
kl_op = RowOp("token_kl", KERNELS, PLAIN, n_results=4, n_stats=6)


def token_kl(
    logits: Tensor, ref_logits: Tensor, tokens: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both logits [..., V], tokens, mask [...] -> logprobs, ref_logprobs, entropy, kl [...], fp32.

    kl is KL(policy || reference). Differentiable in both logits. float64 logits give float64. -inf, NaN,
    masked rows, tokens outside the vocabulary and errors are as in token_logprobs.
    """
    check_rows("logits", logits, tokens, temperature, mask)
    check("ref_logits", ref_logits, logits, logits.shape)
    check_rows("ref_logits", ref_logits, tokens, temperature, mask)
    dtype = torch.promote_types(logits.dtype, ref_logits.dtype)
    results = kl_op([logits.to(dtype), ref_logits.to(dtype)], tokens, temperature, mask)
    return results[0], results[1], results[2], results[3]

"""Log-probabilities under a policy and its reference, and the exact KL between them, over all the vocabulary.

    z = logits / temperature        d = z - max z      S = sum exp(d)      p = exp(d) / S      (the policy)
    y = ref_logits / temperature    w = y - max y      R = sum exp(w)      q = exp(w) / R      (the reference)
    kl = KL(p || q) = sum_j p_j (log p_j - log q_j) = (1/S) sum_j exp(d_j) (d_j - w_j) + log(R / S)
    d kl / d logit_j     = p_j (log p_j - log q_j - kl) / temperature
    d kl / d ref_logit_j = (q_j - p_j) / temperature

Shapes: both logits [..., V] (any strides), tokens and mask [...], the four results [...]. Saved for backward:
both logits and 20 bytes a row (kl, max and S of each). Nothing else of size [N, V] exists in
forward. The KL is a sum over the DIFFERENCE of shifted logits, so that equal inputs give exactly 0. Where the
policy allows a token that the reference rules out, the KL is +inf, and that row's KL passes no gradient on.
"""

from typing import Any

import torch
from torch import Tensor

from .logprobs import (
    CHUNK,
    FLOOR,
    check_rows,
    result_dtype,
    row_buffers,
    row_chunks,
    token_logprobs_reference,
)

LOWEST = -1e20  # stands for log 0 in backward, where it is only ever multiplied by 0


def token_kl_reference(
    logits: Tensor, ref_logits: Tensor, tokens: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The oracle: the same by plain differentiable operations, in the logits' dtype (at least fp32)."""
    logprobs, entropy = token_logprobs_reference(logits, tokens, temperature, mask)
    ref_logprobs, _ = token_logprobs_reference(ref_logits, tokens, temperature, mask)
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    z, y = (
        torch.where(real[..., None], x.to(result_dtype(x)) / temperature, 0.0).log_softmax(-1) for x in (logits, ref_logits)
    )
    p = z.exp()
    kl = (p * torch.where(p > 0, z - y, 0.0)).sum(-1)
    return logprobs, ref_logprobs, entropy, torch.where(real, kl, 0.0)


def _pair_stats(x: Tensor, y: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """x, y [n, V], overwritten -> logprobs, ref_logprobs, entropy, kl, max x, S, max y, R, each [n]."""
    peak, ref_peak = x.amax(-1, keepdim=True), y.amax(-1, keepdim=True)
    d, w = x.sub_(peak).mul_(1 / temperature), y.sub_(ref_peak).mul_(1 / temperature)
    picked, ref_picked = (v.gather(-1, tokens[:, None]).squeeze(-1) for v in (d, w))
    ref_total = w.exp().sum(-1)
    e = d.clamp_(min=FLOOR).exp()
    total = e.sum(-1)
    log_total = total.log()
    # An impossible token adds 0 whatever the reference says; -inf in the reference alone stays infinite.
    kl = w.sub_(d).neg_().masked_fill_(e == 0, 0.0).mul_(e).sum(-1) / total + (ref_total / total).log()
    entropy = log_total - e.mul_(d).sum(-1) / total
    logprobs, ref_logprobs = picked - log_total, ref_picked - ref_total.log()
    return logprobs, ref_logprobs, entropy, kl, peak.squeeze(-1), total, ref_peak.squeeze(-1), ref_total


class _TokenKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ref_logits: Tensor, tokens: Tensor, mask: Tensor, temperature: float
    ) -> tuple[Tensor, ...]:
        dtype = result_dtype(logits, ref_logits)
        out = row_buffers(8, tokens, dtype)
        for rows in row_chunks(mask, CHUNK // 2 // logits.shape[-1]):
            stats = _pair_stats(logits[rows].to(dtype), ref_logits[rows].to(dtype), tokens[rows], temperature)
            for kept, stat in zip(out, stats, strict=True):
                kept[rows] = stat
        ctx.save_for_backward(logits, ref_logits, tokens, mask, *out[3:])
        ctx.temperature = temperature
        return out[:4]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, ref_logits, tokens, mask, *saved = ctx.saved_tensors
        grad = torch.zeros_like(logits) if ctx.needs_input_grad[0] else None
        ref_grad = torch.zeros_like(ref_logits) if ctx.needs_input_grad[1] else None
        dtype, scale = saved[0].dtype, 1 / ctx.temperature
        for rows in row_chunks(mask, CHUNK // 2 // logits.shape[-1]):
            kl, peak, total, ref_peak, ref_total = (s[rows][:, None] for s in saved)
            g, g_ref, g_entropy, g_kl = (u[rows][:, None] for u in upstream)
            g_kl, kl = (v.masked_fill(kl.isinf(), 0.0) for v in (g_kl, kl))
            token = tokens[rows][:, None]
            d = logits[rows].to(dtype).sub_(peak).mul_(scale).clamp_(min=FLOOR)
            w = ref_logits[rows].to(dtype).sub_(ref_peak).mul_(scale).clamp_(min=LOWEST)
            p = d.exp().div_(total)
            # p (g_kl (log p/q - kl) - g_entropy (log p + entropy)) + g ([j = token] - p). The first term
            # sums to 0 over a row: subtracting p times its sum supplies the constants left out here, and
            # takes away the rounding of those put in. kl is put in because it can be large.
            if grad is not None:
                x = (d - w).add_((ref_total / total).log() - kl).mul_(g_kl)
                x.addcmul_(d, g_entropy, value=-1.0).mul_(p)
                x.addcmul_(p, x.sum(-1, keepdim=True) + g, value=-1.0)
                grad[rows] = x.scatter_add_(-1, token, g).mul_(scale).to(grad.dtype)
            # g_kl (q - p) + g_ref ([j = token] - q)
            if ref_grad is not None:
                y = w.exp_().mul_((g_kl - g_ref) / ref_total).addcmul_(p, g_kl, value=-1.0)
                ref_grad[rows] = y.scatter_add_(-1, token, g_ref).mul_(scale).to(ref_grad.dtype)
        return grad, ref_grad, None, None, None


def token_kl(
    logits: Tensor, ref_logits: Tensor, tokens: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both logits [..., V], tokens [...] int64, mask [...] bool -> logprobs, ref_logprobs, entropy, kl [...].

    fp32 whatever the inputs (float64 if one of them is); differentiable in both logits; kl = KL(policy ||
    ref). Rows where the mask is False give 0, get no gradient and may hold anything. Raises ValueError for
    arguments that do not fit together.
    """
    if logits.shape != ref_logits.shape:
        raise ValueError(f"logits and ref_logits differ: {tuple(logits.shape)}, {tuple(ref_logits.shape)}")
    mask = check_rows(logits.shape[:-1], logits.shape[-1], tokens, temperature, mask)
    logprobs, ref_logprobs, entropy, kl = _TokenKL.apply(logits[None], ref_logits[None], tokens[None], mask[None], temperature)
    return logprobs[0], ref_logprobs[0], entropy[0], kl[0]

"""Log-probability of each token, and the entropy of the distribution it was drawn from.

    z = logits / temperature      d_j = z_j - max z      S = sum_j exp(d_j)      p_j = exp(d_j) / S
    logprob = d_token - log S     entropy = log S - (1/S) sum_j exp(d_j) d_j
    d logprob / d logit_j = ([j = token] - p_j) / temperature
    d entropy / d logit_j = -p_j (log p_j + entropy) / temperature

Shapes: logits [..., V] (any strides), tokens and mask [...], both results [...]. Only real rows are read, a
few at a time: besides the logits nothing of size [N, V] exists in forward, and only the gradient in backward.
Saved for backward: the logits and 12 bytes a row (max, S, entropy). The maximum is subtracted BEFORE scaling,
and S is kept apart from it, so that logits of any size cost no precision.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 19  # elements a chunk: two fp32 buffers of 2 MiB stay in the cores' caches
FLOOR = -1000.0  # exp(FLOOR) is exactly 0, also in float64; a finite exponent cannot make 0 * -inf


def token_logprobs_reference(
    logits: Tensor, tokens: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The oracle: the same by plain differentiable operations, in the logits' dtype (at least fp32)."""
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    logp = torch.where(real[..., None], logits.to(result_dtype(logits)) / temperature, 0.0).log_softmax(-1)
    picked = logp.gather(-1, torch.where(real, tokens, 0)[..., None]).squeeze(-1)
    entropy = -(logp.exp() * logp.clamp(min=FLOOR)).sum(-1)
    return torch.where(real, picked, 0.0), torch.where(real, entropy, 0.0)


def result_dtype(*inputs: Tensor) -> torch.dtype:
    """fp32; float64 only where an input is float64, so that gradients can be checked numerically."""
    return torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32


def check_rows(lead: torch.Size, V: int, tokens: Tensor, temperature: float, mask: Tensor | None) -> Tensor:
    """Refuse arguments that do not fit together; return the mask (all True where none was given)."""
    mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    for name, x, dtype in (("tokens", tokens, torch.int64), ("mask", mask, torch.bool)):
        if x.dtype != dtype or x.shape != lead:
            raise ValueError(f"{name} must be {dtype} {tuple(lead)}, not {x.dtype} {tuple(x.shape)}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be a positive finite number, not {temperature}")
    used = tokens[mask]  # what stands in a masked row is nobody's business
    if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < V:
        raise ValueError(f"tokens must lie in 0..{V - 1}, found {int(used.min())}..{int(used.max())}")
    return mask


def row_buffers(count: int, tokens: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """`count` results of one number a row, 0 until written: what a masked row keeps."""
    return tuple(torch.zeros(tokens.shape, dtype=dtype, device=tokens.device) for _ in range(count))


def row_chunks(mask: Tensor, rows: int) -> Iterator[tuple[Tensor, ...]]:
    """Indices of the True positions of `mask`, at most `rows` (at least one) at a time."""
    return zip(*(i.split(max(1, rows)) for i in mask.nonzero(as_tuple=True)), strict=True)


def row_stats(x: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [n, V], overwritten; tokens [n] -> logprobs, entropy, max, S, each [n]."""
    peak = x.amax(-1, keepdim=True)
    d = x.sub_(peak).mul_(1 / temperature)  # [D3]
    picked = d.gather(-1, tokens[:, None]).squeeze(-1)
    e = d.clamp_(min=FLOOR).exp()
    total = e.sum(-1)
    log_total = total.log()
    return picked - log_total, log_total - e.mul_(d).sum(-1) / total, peak.squeeze(-1), total


def row_grad(x: Tensor, tokens: Tensor, stats: Any, g: Tensor, g_entropy: Tensor | None, temperature: float) -> Tensor:
    """x [n, V], overwritten by its gradient; stats = entropy, max, S of the rows; g, g_entropy [n]."""
    entropy, peak, total = stats
    d = x.sub_(peak[:, None]).mul_(1 / temperature)
    if g_entropy is None:
        d.exp_().mul_((g / total)[:, None])
    else:
        e = d.clamp_(min=FLOOR).exp()
        d.add_((entropy - total.log())[:, None]).mul_(g_entropy[:, None]).add_(g[:, None])
        d.mul_(e).div_(total[:, None])
    d.scatter_add_(-1, tokens[:, None], -g[:, None])  # the one-hot term once, not compared for per column
    return d.mul_(-1 / temperature)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, mask: Tensor, temperature: float) -> tuple[Tensor, ...]:
        logprobs, entropy, peak, total = row_buffers(4, tokens, result_dtype(logits))
        for rows in row_chunks(mask, CHUNK // logits.shape[-1]):
            x = logits[rows].to(logprobs.dtype)  # [D18] bf16 ends here: the softmax is fp32
            logprobs[rows], entropy[rows], peak[rows], total[rows] = row_stats(x, tokens[rows], temperature)
        ctx.save_for_backward(logits, tokens, mask, entropy, peak, total)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor | None, g_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, tokens, mask, *saved = ctx.saved_tensors
        grad = torch.zeros_like(logits)
        g = torch.zeros_like(saved[0]) if g is None else g
        for rows in row_chunks(mask, CHUNK // logits.shape[-1]):
            up = None if g_entropy is None else g_entropy[rows]
            x, stats = logits[rows].to(saved[0].dtype), (s[rows] for s in saved)
            grad[rows] = row_grad(x, tokens[rows], stats, g[rows], up, ctx.temperature).to(grad.dtype)
        return grad, None, None, None


def token_logprobs(
    logits: Tensor, tokens: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """logits [..., V], tokens [...] int64, mask [...] bool (True = counts) -> logprobs, entropy [...], fp32.

    Differentiable in the logits. float64 logits are computed and returned in float64. A -inf logit is an
    impossible token; a row of nothing else has no distribution and gives NaN. Rows where the mask is False
    give 0, get no gradient and may hold anything. Raises ValueError for arguments that do not fit together.
    """
    mask = check_rows(logits.shape[:-1], logits.shape[-1], tokens, temperature, mask)
    logprobs, entropy = _TokenLogprobs.apply(logits[None], tokens[None], mask[None], temperature)
    return logprobs[0], entropy[0]  # the extra dimension lets [V] and [] be rows as well

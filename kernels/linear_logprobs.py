"""Token log-probabilities and entropy straight from the last hidden states: the logits [N, V] never exist.

    logits = hidden @ weight.T, then as in logprobs.py
    d hidden = d logits @ weight        d weight = (d logits).T @ hidden

Shapes: hidden [..., C], weight [V, C], tokens and mask [...], both results [...]. A few rows of logits are
made at a time, reduced to a few numbers each and dropped; backward makes them again. Saved for backward:
hidden, weight and 12 bytes a row. The product runs in fp32 (float64 if an input is), under autocast in
autocast's dtype; the log-softmax always runs in fp32, and the chunks' gradients of the weight are added up in
fp32.
"""

from typing import Any

import torch
from torch import Tensor

from .logprobs import (
    check_rows,
    result_dtype,
    row_buffers,
    row_chunks,
    row_grad,
    row_stats,
    token_logprobs_reference,
)

TILE = 1 << 22  # logits held at a time: 16 MiB in fp32, unless eight rows are more


def linear_token_logprobs_reference(
    hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The oracle: the same from the full logits, by plain differentiable operations, at least in fp32."""
    if mask is not None:  # 0 * NaN is NaN: poison has to go before the product, for the weight's gradient
        hidden = torch.where(mask[..., None], hidden, 0.0)
    dtype = result_dtype(hidden, weight)
    return token_logprobs_reference(hidden.to(dtype) @ weight.to(dtype).T, tokens, temperature, mask)


def _rows(vocab: int) -> int:
    return max(8, TILE // vocab)


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        tokens: Tensor,
        mask: Tensor,
        temperature: float,
        product_dtype: torch.dtype,
    ) -> tuple[Tensor, ...]:
        logprobs, entropy, peak, total = row_buffers(4, tokens, result_dtype(hidden, weight))
        w = weight.to(product_dtype)
        with torch.autocast(hidden.device.type, enabled=False):  # its dtype is applied already
            for rows in row_chunks(mask, _rows(len(w))):
                x = (hidden[rows].to(product_dtype) @ w.T).to(logprobs.dtype)
                stats = row_stats(x, tokens[rows], temperature)
                logprobs[rows], entropy[rows], peak[rows], total[rows] = stats
        ctx.save_for_backward(hidden, weight, tokens, mask, entropy, peak, total)
        ctx.temperature, ctx.product_dtype = temperature, product_dtype
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor | None, g_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, tokens, mask, *saved = ctx.saved_tensors
        dtype = saved[0].dtype
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=dtype)
        g = torch.zeros_like(saved[0]) if g is None else g
        w = weight.to(ctx.product_dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in row_chunks(mask, _rows(len(w))):
                h = hidden[rows].to(ctx.product_dtype)
                up = None if g_entropy is None else g_entropy[rows]
                stats = (s[rows] for s in saved)
                dx = row_grad((h @ w.T).to(dtype), tokens[rows], stats, g[rows], up, ctx.temperature).to(w.dtype)
                grad_hidden[rows] = (dx @ w).to(hidden.dtype)
                if ctx.needs_input_grad[1]:
                    grad_weight += dx.T @ h
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def linear_token_logprobs(
    hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """hidden [..., C], weight [V, C], tokens [...] int64, mask [...] bool -> logprobs, entropy [...], fp32.

    Equal to token_logprobs(hidden @ weight.T, ...), without the logits; differentiable in hidden and weight.
    float64 inputs are computed and returned in float64. Rows where the mask is False give 0, get no gradient
    and may hold anything. Raises ValueError for arguments that do not fit together.
    """
    if weight.ndim != 2 or hidden.shape[-1:] != weight.shape[1:]:
        shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"hidden [..., C] and weight [V, C] do not fit: {shapes}")
    mask = check_rows(hidden.shape[:-1], len(weight), tokens, temperature, mask)
    dtype, device = result_dtype(hidden, weight), hidden.device.type
    if dtype == torch.float32 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    logprobs, entropy = _LinearTokenLogprobs.apply(hidden[None], weight, tokens[None], mask[None], temperature, dtype)
    return logprobs[0], entropy[0]

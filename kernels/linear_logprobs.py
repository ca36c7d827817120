"""Token log-probabilities and entropy straight from the last hidden states: the logits [N, V] never exist.

    logits = hidden @ weight.T, then as in logprobs.py
    d hidden = d logits @ weight        d weight = (d logits).T @ hidden

Shapes: hidden [..., C], weight [V, C], tokens and mask [...], both results [...]. Saved for backward: hidden,
weight, and 12 bytes per row (entropy, max, S).

Logits exist one tile at a time. Forward reduces each split of the vocabulary to three numbers per row (m =
max, s = sum e, t = sum e d, with d = logit - m and e = exp(d / temperature)) and merges the splits in a fixed
order. Backward computes the tiles again; both gradients are sums over tiles, in fp32 or within one matrix
product. Products are fp32 (float64 if an input is) of operands in their own dtypes; under autocast they have
autocast's dtype. The softmax is always fp32. linear_cpu.py and linear_gpu.py have the loops over tiles; this
file has what both need.
"""

import contextlib

import torch
from torch import Tensor

from .dispatch import check, check_rows, real_rows, result_dtype, use_triton
from .linear_cpu import cpu_gradients, cpu_statistics
from .linear_gpu import gpu_gradients, gpu_statistics
from .logprobs import ZERO, token_logprobs_reference
from .token_op import TokenOp


def linear_token_logprobs_reference(
    hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The oracle: both from the full logits by plain differentiable operations, in fp32 at least."""
    if mask is not None:  # 0 * NaN is NaN: a masked NaN must go before the product, for the weight's gradient
        hidden = torch.where(mask[..., None], hidden, 0.0)
    dtype = result_dtype(hidden, weight)
    return token_logprobs_reference(hidden.to(dtype) @ weight.to(dtype).T, tokens, temperature, mask)


def merge_splits(picked: Tensor, splits: Tensor, temperature: float) -> Tensor:
    """The token's logit [n]; m, s and t of each split [3, splits, n] -> logprob, entropy, max, S [4, n]."""
    m, s, t = splits
    peak = m.amax(0)
    fall = (m - peak).clamp_(min=ZERO * temperature)
    shrink = (fall / temperature).exp_()
    total = (s * shrink).sum(0)
    t = fall.mul_(s).add_(t).mul_(shrink).sum(0)
    log_total = total.log()
    logprob = (picked - peak) / temperature - log_total
    return torch.stack([logprob, log_total - t / total / temperature, peak, total])


def row_factors(tokens: Tensor, stats: Tensor, upstream: Tensor, V: int, temperature: float) -> Tensor:
    """max, a, b, g [4, n] of each row: its gradient is e_j (a + b d_j) + [j = token] g, d_j = logit_j - max.

    A token outside the vocabulary, which a GPU does not refuse, makes the row's gradient NaN.
    """
    (entropy, peak, total), (g, g_entropy) = stats, upstream
    g = torch.where((tokens >= 0) & (tokens < V), g, torch.nan)
    a = -(g + g_entropy * (entropy - total.log())) / total
    return torch.stack([peak, a / temperature, -g_entropy / total / temperature**2, g / temperature])


class LinearOp(TokenOp):
    """Leaves: hidden [N, C] and weight [V, C]. Results: logprobs, entropy. Statistics: entropy, max, S."""

    def forward(self, leaves, tokens, temperature, mask, product) -> tuple[Tensor, Tensor]:
        hidden, weight = leaves
        if use_triton(hidden, weight):
            parts = gpu_statistics(hidden, weight, tokens, mask, temperature, product)
            found = merge_splits(*parts, temperature)
            found = found if mask is None else torch.where(mask, found, 0.0)
        else:
            rows = real_rows(tokens, mask, len(weight))
            parts = cpu_statistics(hidden[rows], weight, tokens[rows], temperature, product)
            found = hidden.new_zeros(4, len(hidden), dtype=result_dtype(hidden, weight))
            found[:, rows] = merge_splits(*parts, temperature)
        return found[:2].clone(), found[1:].clone()

    def backward(self, leaves, tokens, temperature, mask, product, stats, upstream, wanted) -> list[Tensor]:
        hidden, weight = leaves
        factors = row_factors(tokens, stats, upstream, len(weight), temperature)
        device = hidden.device.type
        has_autocast = torch.amp.is_autocast_available(device)
        # The products below have the dtype `product` already.
        with torch.autocast(device, enabled=False) if has_autocast else contextlib.nullcontext():
            if use_triton(hidden, weight):
                inputs = (hidden, weight, tokens, mask, factors)
                grad, grad_weight = gpu_gradients(*inputs, temperature, product, wanted)
            else:
                rows = real_rows(tokens, mask, len(weight))
                inputs = (hidden[rows], weight, tokens[rows], factors[:, rows])
                found, grad_weight = cpu_gradients(*inputs, temperature, product, wanted)
                grad = hidden.new_zeros(hidden.shape)
                grad[rows] = found.to(hidden.dtype)
        return [grad if wanted[0] else hidden.new_empty(0), grad_weight]


linear_op = LinearOp("linear_token_logprobs", n_results=2, n_stats=3)


def linear_token_logprobs(
    hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """hidden [..., C], weight [V, C], tokens [...] int64, mask [...] bool -> logprobs, entropy [...], fp32.

    Equal to token_logprobs(hidden @ weight.T, ...), without the logits. Differentiable in hidden and weight.
    float64 inputs give float64. Rows where the mask is False give 0, get no gradient, and may hold anything.
    Raises ValueError for arguments that do not fit together, and on CPU for a token outside the vocabulary;
    on a GPU the log-probability of such a row is NaN, and so are the gradients that come from it.
    """
    check_rows("hidden", hidden, tokens, temperature, mask)
    if weight.ndim != 2 or len(weight) == 0 or not weight.is_floating_point():
        raise ValueError(f"weight must be floats [V, C], not {weight.dtype} {tuple(weight.shape)}")
    check("weight", weight, hidden, (len(weight), hidden.shape[-1]))
    product, device = result_dtype(hidden, weight), hidden.device.type
    has_autocast = torch.amp.is_autocast_available(device)
    if product == torch.float32 and has_autocast and torch.is_autocast_enabled(device):
        product = torch.get_autocast_dtype(device)
    flat_mask = None if mask is None else mask.flatten()
    leaves = [hidden.reshape(-1, hidden.shape[-1]), weight]
    results = linear_op(leaves, tokens.flatten(), temperature, flat_mask, product).view(2, *tokens.shape)
    return results[0], results[1]

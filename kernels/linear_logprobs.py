"""Token log-probabilities and entropy straight from the last hidden states: the logits [N, V] never exist.

    logits = hidden @ weight.T, then as in logprobs.py
    d hidden = d logits @ weight        d weight = (d logits).T @ hidden

Shapes: hidden [..., C], weight [V, C], tokens and mask [...], both results [...]. Saved for backward: hidden, weight and
12 bytes a row. Logits exist a tile at a time; a tile is reduced to a maximum and two sums a row, and these are merged in a
fixed order. Backward makes the tiles again. Both gradients are sums over tiles: in fp32, or within one matrix product.
The product is fp32 (float64 if an input is), of operands as they come; under autocast it has autocast's dtype. The
softmax is fp32 in any case. The GPU's half stands in linear_triton.py, the CPU's in linear_plain.py.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .common import check_rows, result_dtype, use_triton
from .linear_plain import plain_backward, plain_forward, row_factors
from .linear_triton import triton_backward, triton_forward
from .logprobs import token_logprobs_reference


def linear_token_logprobs_reference(
    hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The oracle: the same from the full logits, by plain differentiable operations, at least in fp32."""
    if mask is not None:  # 0 * NaN is NaN: poison has to go before the product, for the weight's gradient
        hidden = torch.where(mask[..., None], hidden, 0.0)
    dtype = result_dtype(hidden, weight)
    return token_logprobs_reference(hidden.to(dtype) @ weight.to(dtype).T, tokens, temperature, mask)


# Registration: one operator for every device, opaque to torch.compile, as in rows.py


_INPUTS = "Tensor hidden, Tensor weight, Tensor tokens, float temperature, Tensor? mask, ScalarType product"
_define = partial(torch.library.custom_op, mutates_args=())


def _flat(hidden: Tensor, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    return hidden.reshape(-1, hidden.shape[-1]), tokens.flatten(), None if mask is None else mask.flatten()


@_define("minirlhf::linear_token_logprobs", schema=f"({_INPUTS}) -> (Tensor, Tensor)")
def _linear(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    temperature: float,
    mask: Tensor | None,
    product: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """-> logprobs, entropy [2, ...]; what backward needs: entropy, max, S [3, ...]."""
    h, token, real = _flat(hidden, tokens, mask)
    forward = triton_forward if use_triton(hidden, weight) else plain_forward
    found = forward(h, weight, token, real, temperature, product).view(4, *tokens.shape)
    return found[:2].clone(), found[1:].clone()


@_linear.register_fake
def _(hidden: Tensor, weight: Tensor, tokens: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = result_dtype(hidden, weight)
    return hidden.new_empty(2, *tokens.shape, dtype=dtype), hidden.new_empty(3, *tokens.shape, dtype=dtype)


@_define(
    "minirlhf::linear_token_logprobs_backward",
    schema=f"({_INPUTS}, Tensor stats, Tensor upstream, bool[] want) -> (Tensor, Tensor)",
)
def _linear_backward(
    hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float, mask: Tensor | None, product: torch.dtype,
    stats: Tensor, upstream: Tensor, want: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    h, token, real = _flat(hidden, tokens, mask)
    factors = row_factors(token, stats.view(3, -1), upstream.reshape(2, -1), len(weight), temperature)
    backward = triton_backward if use_triton(hidden, weight) else plain_backward
    device = hidden.device.type
    autocast = (
        torch.autocast(device, enabled=False)
        if torch.amp.is_autocast_available(device)
        else contextlib.nullcontext()
    )
    with autocast:  # its dtype is applied already
        grad_hidden, grad_weight = backward(h, weight, token, real, factors, temperature, product, want)
    return grad_hidden.view(hidden.shape) if want[0] else hidden.new_empty(0), grad_weight


@_linear_backward.register_fake
def _(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    shapes = [x.shape if wanted else (0,) for x, wanted in zip((hidden, weight), rest[-1], strict=True)]
    return hidden.new_empty(shapes[0]), weight.new_empty(shapes[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, tokens, ctx.temperature, mask, ctx.product = inputs
    ctx.save_for_backward(hidden, weight, tokens, mask, output[1])


def _differentiate(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Any, ...]:
    hidden, weight, tokens, mask, stats = ctx.saved_tensors
    want = [*ctx.needs_input_grad[:2]]
    grads = _linear_backward(
        hidden, weight, tokens, ctx.temperature, mask, ctx.product, stats, upstream, want
    )
    return *(x if w else None for x, w in zip(grads, want, strict=True)), None, None, None, None


_linear.register_autograd(_differentiate, setup_context=_save)


def linear_token_logprobs(
    hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """hidden [..., C], weight [V, C], tokens [...] int64, mask [...] bool -> logprobs, entropy [...], fp32.

    Equal to token_logprobs(hidden @ weight.T, ...), without the logits; differentiable in hidden and weight. float64 inputs
    are computed and returned in float64. Rows where the mask is False give 0, get no gradient and may hold anything.
    Raises ValueError for arguments that do not fit together, and on CPU for a token outside the vocabulary; on a GPU such a
    row's logprob is NaN, and so are the gradients that come from it.
    """
    check_rows(hidden, tokens, temperature, mask)
    if weight.ndim != 2 or len(weight) == 0 or hidden.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"hidden [..., C] and weight [V, C] do not fit: {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if not weight.is_floating_point() or weight.device != hidden.device:
        raise ValueError(
            f"weight must be of floats on {hidden.device}, not {weight.dtype} on {weight.device}"
        )
    product, device = result_dtype(hidden, weight), hidden.device.type
    if (
        product == torch.float32
        and torch.amp.is_autocast_available(device)
        and torch.is_autocast_enabled(device)
    ):
        product = torch.get_autocast_dtype(device)
    results, _ = _linear(hidden, weight, tokens, temperature, mask, product)
    return results[0], results[1]

"""The operations over rows of logits: where token_logprobs and token_kl meet torch.library, autograd and the launcher.

One `custom_op` serves every device, and torch.compile does not look into it: tracing knows neither addresses, which decide
whether rows may be read where they lie, 16 bytes at a time, nor values, so that no token could be refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .common import LOG2E, launch, real_rows, result_dtype, use_triton

CHUNK = 1 << 19  # elements at a time in plain PyTorch: two fp32 buffers of 2 MiB stay in the cores' caches
LANES = 256  # lanes a Triton program, two for each of its 128 threads


def as_rows(x: Tensor) -> Tensor:
    """x [..., V] as [outer, inner, V] with V contiguous: a view wherever two row strides do, as for a slice of [B, T, V]."""
    lead = (1, 1, *x.shape[:-1])
    x = x.reshape(math.prod(lead[:-1]), lead[-1], x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def in_phase(rows: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """The rows [outer, inner, V], row i of each of them and of the gradients equally far from a 16-byte boundary, for every i.

    Only then can a kernel that goes through all of them at once use nothing but 128-bit accesses. Where it is not so (a
    slice of [B, T, V] with an odd V beside a whole tensor), what comes back is contiguous copies.
    """
    every = [*rows, *(as_rows(x) for x in grads)]
    first, size = every[0], every[0].element_size()
    apart = [x.data_ptr() - first.data_ptr() for x in every]
    for x in every:
        apart += [
            (b - a) * size for n, a, b in zip(x.shape, x.stride(), first.stride(), strict=True) if n > 1
        ]
    return (
        rows
        if all(d % 16 == 0 for d in apart)
        else [x.clone(memory_format=torch.contiguous_format) for x in rows]
    )


def _launch(
    kernel: Any, rows: list[Tensor], tokens: Tensor, mask: Tensor | None, *others: Any, **scalars: float
) -> None:
    """One program a row."""
    n_outer, n_inner, V = rows[0].shape
    strides = [step for x in rows for step in x.stride()[:2]]
    mask = None if mask is None else mask.contiguous()
    sizes = {"VEC": 16 // rows[0].element_size(), "LANES": LANES, "num_warps": 4}
    launch(
        kernel,
        (n_outer * n_inner,),
        *rows,
        tokens.contiguous(),
        mask,
        *others,
        n_inner,
        V,
        *strides,
        **scalars,
        **sizes,
    )


def _tiles(rows: list[Tensor], i: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Copies [n, V] of rows number i. [D18] Logits of lower precision end here: the softmax is fp32."""
    return [x[i // x.shape[1], i % x.shape[1]].to(dtype) for x in rows]


def row_op(
    name: str, n_results: int, n_stats: int, kernels: tuple[Any, Any], plain: tuple[Callable, Callable]
) -> Callable:
    """Register `minirlhf::name` and its backward; return f(logits, tokens, temperature, mask), logits one or more [..., V].

    Results are numbers a row, [n_results, ...] (differentiable), and what backward needs of them [n_stats, ...]: the
    last n_stats of what plain[0] returns. A gradient that nobody wants is not made, but for the first.
        kernels[0](*rows, tokens, mask, results, stats, n_inner, V, *strides, c)
        kernels[1](*rows, tokens, mask, stats, upstream, *grads, n_inner, V, *strides, c, scale)
        plain[0](*rows, tokens, temperature) -> n_results + ... tensors [n]
        plain[1](*rows, tokens, stats, upstream, temperature) -> yields the gradients, in the order of the rows
    """

    def numbers(logits: list[Tensor], tokens: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        dtype, device = result_dtype(*logits), tokens.device
        return tuple(
            torch.empty((n, *tokens.shape), dtype=dtype, device=device) for n in (n_results, n_stats)
        )

    def forward(
        logits: list[Tensor], tokens: Tensor, temperature: float, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        out, rows = numbers(logits, tokens), [as_rows(x) for x in logits]
        if use_triton(*logits):
            _launch(kernels[0], in_phase(rows, []), tokens, mask, *out, c=LOG2E / temperature)
            return out
        results, stats = (x.zero_().view(len(x), -1) for x in out)  # masked rows keep the zeros
        for i in real_rows(tokens, mask, rows[0].shape[2], CHUNK // len(rows)):
            found = torch.stack(plain[0](*_tiles(rows, i, stats.dtype), tokens.flatten()[i], temperature))
            results[:, i], stats[:, i] = found[:n_results], found[-n_stats:]
        return out

    def gradients(logits: list[Tensor], *rest: Any) -> list[Tensor]:
        want = rest[-1]
        return [
            torch.empty(x.shape if w else 0, dtype=x.dtype, device=x.device)
            for x, w in zip(logits, want, strict=True)
        ]

    def backward(
        logits: list[Tensor], tokens: Tensor, temperature: float, mask: Tensor | None,
        stats: Tensor, upstream: Tensor, want: list[bool],
    ) -> list[Tensor]:  # fmt: skip
        grads, rows = gradients(logits, want), [as_rows(x) for x in logits]
        made = [x if w else None for x, w in zip(grads, want, strict=True)]
        wanted = [x for x in made if x is not None]
        if use_triton(*logits):
            rows = in_phase(rows, wanted)
            scalars = {"c": LOG2E / temperature, "scale": 1 / temperature}
            _launch(kernels[1], rows, tokens, mask, stats, upstream.contiguous(), *made, **scalars)
            return grads
        stats, upstream = stats.view(n_stats, -1), upstream.reshape(n_results, -1)
        for x in wanted if mask is not None else []:
            x.zero_()
        for i in real_rows(tokens, mask, rows[0].shape[2], CHUNK // len(rows)):
            tiles = _tiles(rows, i, stats.dtype)
            found = plain[1](*tiles, tokens.flatten()[i], stats[:, i], upstream[:, i], temperature)
            for x, tile in zip(wanted, found, strict=False):  # stops before it computes what nobody wants
                x.view(-1, x.shape[-1])[i] = tile.to(x.dtype)
        return grads

    call = "Tensor[] logits, Tensor tokens, float temperature, Tensor? mask"
    schemas = (
        f"({call}) -> (Tensor, Tensor)",
        f"({call}, Tensor stats, Tensor upstream, bool[] want) -> Tensor[]",
    )
    op = torch.library.custom_op(f"minirlhf::{name}", forward, mutates_args=(), schema=schemas[0])
    op_backward = torch.library.custom_op(
        f"minirlhf::{name}_backward", backward, mutates_args=(), schema=schemas[1]
    )
    op.register_fake(numbers)
    op_backward.register_fake(gradients)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        logits, tokens, ctx.temperature, mask = inputs
        ctx.save_for_backward(*logits, tokens, mask, output[1])

    def differentiate(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Any, ...]:
        *logits, tokens, mask, stats = ctx.saved_tensors
        want = [True, *ctx.needs_input_grad[0][1:]]
        grads = op_backward(logits, tokens, ctx.temperature, mask, stats, upstream, want)
        return [x if made else None for x, made in zip(grads, want, strict=True)], None, None, None

    op.register_autograd(differentiate, setup_context=save)
    return op

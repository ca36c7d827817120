"""The registration of the operations on tokens: torch.library, autograd, and the launch of row kernels.

The operators are opaque to torch.compile. A traced graph has no data pointers, whose alignment is checked at
run time, and no values, so that it could not refuse a token outside the vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .dispatch import launch, real_rows, result_dtype, use_triton
from .row_pieces import LOG2E

CHUNK = 1 << 19  # elements per step in plain PyTorch: two fp32 buffers of 2 MiB stay in the cores' caches
LANES = 256  # lanes per Triton program, two for each of its 128 threads


class TokenOp:
    """An operation on tokens, registered as `minirlhf::name` for every device, differentiable in its leaves.

    op(leaves, tokens, temperature, mask, product) -> results [n_results, *tokens.shape]. A subclass defines

        forward(leaves, tokens, temperature, mask, product) -> results; statistics [n_stats, ...] for backward
        backward(leaves, tokens, temperature, mask, product, stats, upstream, wanted) -> one gradient per leaf

    A gradient that is not wanted has no elements. `product` is the dtype of logits computed by the operation.
    """

    def __init__(self, name: str, n_results: int, n_stats: int) -> None:
        self.n_results, self.n_stats = n_results, n_stats
        inputs = "Tensor[] leaves, Tensor tokens, float temperature, Tensor? mask, ScalarType? product"
        more = "Tensor stats, Tensor upstream, bool[] wanted"
        define = partial(torch.library.custom_op, mutates_args=())
        schema, schema_backward = f"({inputs}) -> (Tensor, Tensor)", f"({inputs}, {more}) -> Tensor[]"
        self.op = define(f"minirlhf::{name}", self.forward, schema=schema)
        self.op_backward = define(f"minirlhf::{name}_backward", self.backward, schema=schema_backward)
        self.op.register_fake(self.empty_results)
        self.op_backward.register_fake(self.empty_grads)
        self.op.register_autograd(self.differentiate, setup_context=self.save)

    def __call__(self, leaves, tokens, temperature, mask, product=None) -> Tensor:
        return self.op(leaves, tokens, temperature, mask, product)[0]

    def empty_results(self, leaves: list[Tensor], tokens: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        empty = partial(torch.empty, dtype=result_dtype(*leaves), device=tokens.device)
        return empty((self.n_results, *tokens.shape)), empty((self.n_stats, *tokens.shape))

    def empty_grads(self, leaves: list[Tensor], *rest: Any) -> list[Tensor]:
        return [x.new_empty(x.shape if w else 0) for x, w in zip(leaves, rest[-1], strict=True)]

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        leaves, tokens, ctx.temperature, mask, ctx.product = inputs
        ctx.save_for_backward(*leaves, tokens, mask, output[1])

    def differentiate(self, ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Any, ...]:
        *leaves, tokens, mask, stats = ctx.saved_tensors
        wanted = [*ctx.needs_input_grad[0]]
        inputs = (leaves, tokens, ctx.temperature, mask, ctx.product)
        grads = self.op_backward(*inputs, stats, upstream, wanted)
        return [x if w else None for x, w in zip(grads, wanted, strict=True)], None, None, None, None


def as_rows(x: Tensor) -> Tensor:
    """x [..., V] as [outer, inner, V], V contiguous: a view if possible, as for a slice of [B, T, V]."""
    lead = (1, 1, *x.shape[:-1])
    x = x.reshape(math.prod(lead[:-1]), lead[-1], x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def same_phase(rows: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """The rows [outer, inner, V], copied unless row i of every tensor is equally far from a 16-byte boundary.

    Only then can a kernel use 128-bit accesses for all of them. They differ for, say, a slice of [B, T, V]
    with an odd V beside a whole tensor. Contiguous copies agree.
    """

    def phase(x: Tensor) -> tuple[int, ...]:
        strides = (stride for n, stride in zip(x.shape, x.stride(), strict=True) if n > 1)
        return x.data_ptr() % 16, *(stride * x.element_size() % 16 for stride in strides)

    if len({phase(x) for x in [*rows, *map(as_rows, grads)]}) == 1:
        return rows
    return [x.clone(memory_format=torch.contiguous_format) for x in rows]


def launch_rows(kernel, rows, tokens, mask, *others: Any, **scalars: float) -> None:
    """Run one program per row. `others` are the kernel's further tensors, in its order."""
    n_outer, n_inner, V = rows[0].shape
    strides = [stride for x in rows for stride in x.stride()[:2]]
    mask = None if mask is None else mask.contiguous()
    args = (*rows, tokens.contiguous(), mask, *others, n_inner, V, *strides)
    launch(kernel, (n_outer * n_inner,), *args, **scalars, LANES=LANES, num_warps=4)


class RowOp(TokenOp):
    """A TokenOp whose leaves are logits [..., V], made of two Triton kernels and two plain functions:

        kernels[0](*rows, tokens, mask, results, stats, n_inner, V, *strides, c)
        kernels[1](*rows, tokens, mask, stats, upstream, *grads, n_inner, V, *strides, c, scale)
        plain[0](*rows, tokens, temperature) -> tensors [n]: the first n_results, the last n_stats are taken
        plain[1](*rows, tokens, stats, upstream, temperature) -> yields the gradients in the order of the rows

    `grads` has None for a gradient that is not wanted, but the first gradient is always computed.
    """

    def __init__(self, name: str, kernels: tuple[Any, Any], plain: tuple[Callable, Callable], **sizes: int):
        super().__init__(name, **sizes)
        self.kernels, self.plain = kernels, plain

    def chunks(self, rows, tokens, mask, dtype) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Yields numbers i [n] of rows that count, and copies [n, V] of them: CHUNK elements, or one row.

        [D18] Logits of lower precision end here: the softmax is fp32.
        """
        V = rows[0].shape[2]
        for i in real_rows(tokens, mask, V).split(max(1, CHUNK // len(rows) // V)):
            yield i, [x[i // x.shape[1], i % x.shape[1]].to(dtype) for x in rows]

    def forward(self, leaves, tokens, temperature, mask, product) -> tuple[Tensor, Tensor]:
        results, stats = self.empty_results(leaves, tokens)
        rows = [as_rows(x) for x in leaves]
        if use_triton(*leaves):
            rows = same_phase(rows, [])
            launch_rows(self.kernels[0], rows, tokens, mask, results, stats, c=LOG2E / temperature)
            return results, stats
        flat_results = results.zero_().view(self.n_results, -1)  # masked rows keep the zeros
        flat_stats = stats.zero_().view(self.n_stats, -1)
        for i, copies in self.chunks(rows, tokens, mask, stats.dtype):
            found = torch.stack(self.plain[0](*copies, tokens.flatten()[i], temperature))
            flat_results[:, i], flat_stats[:, i] = found[: self.n_results], found[-self.n_stats :]
        return results, stats

    def backward(self, leaves, tokens, temperature, mask, product, stats, upstream, wanted) -> list[Tensor]:
        grads = self.empty_grads(leaves, wanted)
        first = grads[0] if wanted[0] else torch.empty_like(leaves[0], memory_format=torch.contiguous_format)
        computed = [first, *(x if w else None for x, w in zip(grads[1:], wanted[1:], strict=True))]
        rows = [as_rows(x) for x in leaves]
        if use_triton(*leaves):
            rows = same_phase(rows, [x for x in computed if x is not None])
            others = (stats, upstream.contiguous(), *computed)
            scalars = {"c": LOG2E / temperature, "scale": 1 / temperature}
            launch_rows(self.kernels[1], rows, tokens, mask, *others, **scalars)
            return grads
        computed = [x.zero_() if mask is not None else x for x in computed if x is not None]
        stats, upstream = stats.view(self.n_stats, -1), upstream.reshape(self.n_results, -1)
        for i, copies in self.chunks(rows, tokens, mask, stats.dtype):
            found = self.plain[1](*copies, tokens.flatten()[i], stats[:, i], upstream[:, i], temperature)
            for x, grad in zip(computed, found, strict=False):  # no gradient is asked for that is not wanted
                x.view(-1, x.shape[-1])[i] = grad.to(x.dtype)
        return grads

"""The decode step, compiled (--compile, on a GPU): the next token of all rows in one CUDA graph.

A step of a small model computes for less time than the host takes to start its hundreds of kernels.  A graph
starts them at once, if every tensor has the same shape and address in all steps.  So:
- Keys and values are held at full length, and a mask hides the columns that are not written yet.
- Rows whose text has ended stay in the cache; `keep` notes which rows are still asked for.
- The next rollout uses the same buffers.  A longer one, or one of another batch size, is compiled anew.
- Autocast would round all weights again in every step; they are rounded once per rollout.
The step itself is GPT.forward, for which a cache that is always full but for one column has a fixed shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from minirlhf.support.cache import KVCache
from minirlhf.support.ragged import Packing

if TYPE_CHECKING:
    from minirlhf.model import GPT

MAX_COMPILED = 4  # caches of further sizes are plain ones: to compile each takes longer than it saves
MULTIPLE = 64  # lengths are rounded up to one, so that prompts of other lengths fit the same cache


def graphs(step: Callable) -> Callable:
    """The step as a CUDA graph per shape; on a CPU, as compiled C++."""
    return torch.compile(step, mode="reduce-overhead", fullgraph=True, dynamic=False)


class Decoder:
    """Makes the caches of a GPT whose decode step is compiled."""

    def __init__(self, model: GPT, compile: Callable[[Callable], Callable] = graphs):
        self.model, self.compiled = model, 0
        self.step = compile(lambda rounded, *given: torch.func.functional_call(model, rounded, given))
        self.cache: StaticCache | None = None  # of the last rollout

    def cache_for(self, batch: int, length: int) -> KVCache:
        """An empty cache for `length` tokens per row, valid until the next one is asked for."""
        longest, dtype = self.model.config.context, autocast_dtype(self.model)
        found = self.cache
        if found is None or (found.batch, found.dtype) != (batch, dtype) or found.capacity < length:
            if self.compiled == MAX_COMPILED or length > longest:
                return KVCache(self.model, batch, length)
            self.compiled += 1
            found = self.cache = None  # free its memory first
            found = StaticCache(self, batch, min(longest, -(-length // MULTIPLE) * MULTIPLE), dtype)
            self.cache = found
        found.clear()
        return found


class StaticCache(KVCache):
    """A cache whose steps have one shape.  Its first call, of the prompts, is like any cache's."""

    def __init__(self, decoder: Decoder, batch: int, capacity: int, dtype: torch.dtype | None):
        """dtype: what autocast rounds the weights of linear layers to; None: they are not rounded."""
        super().__init__(decoder.model, batch, capacity)
        self.compiled_step, self.batch, self.capacity, self.dtype = decoder.step, batch, capacity, dtype
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=self.lengths.device)
        self.weights = linear_weights(decoder.model) if dtype else {}
        self.rounded = {name: weight.to(dtype) for name, weight in self.weights.items()}
        for x in (*self.keys, *self.values, self.lengths, self.token, *self.rounded.values()):
            torch._dynamo.mark_static_address(x)

    def clear(self) -> None:
        """Begin again, with the weights as they are now."""
        self.longest, self.even = 0, True
        self.lengths.zero_()
        self.rows = torch.arange(self.batch, device=self.lengths.device)  # those that are asked for
        for name, x in self.rounded.items():
            x.copy_(self.weights[name])

    def keep(self, rows: Tensor) -> None:
        """Ask for these rows alone from now on; the others stay and are computed."""
        self.rows = self.rows[rows]

    def step(self, model: GPT, token: Tensor) -> Tensor:
        """Hidden states [n, C] of the next token [n] of the rows that are asked for."""
        self.longest, self.even = self.capacity - 1, False  # full but for the column of the new token
        self.token[self.rows, 0] = token
        return self.compiled_step(self.rounded, self.token, None, self)[self.rows, -1]

    def advance(self, packing: Packing) -> None:
        self.lengths += packing.width if packing.lengths is None else packing.lengths


def autocast_dtype(model: GPT) -> torch.dtype | None:
    kind = model.wte.weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def linear_weights(model: GPT) -> dict[str, Tensor]:
    """The fp32 weights of the blocks' linear layers, by name; not those of adapters, which are small."""
    layers = [(name, layer) for name, layer in model.blocks.named_modules() if isinstance(layer, nn.Linear)]
    return {f"blocks.{name}.weight": x.weight for name, x in layers if x.weight.dtype == torch.float32}

"""The key-value cache: what attention keeps of earlier tokens, so that each is read once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minirlhf import UserError
from minirlhf.support.ragged import Packing

if TYPE_CHECKING:
    from minirlhf.model import GPT


class KVCache:
    """Keys and values [G, B, length, D] of every layer, allocated once for `length` tokens per row."""

    def __init__(self, model: GPT, batch: int, length: int):
        c, device = model.config, model.wte.weight.device
        if hasattr(model.blocks[-1].ln_1.weight, "to_local"):
            raise RuntimeError("a sharded model writes text in shard.whole(model): no token waits for others")
        if not c.reads_prefixes:
            raise UserError(
                "a model that reads in both directions has no past to keep: every new token changes it"
            )
        half = device.type != "cpu" and torch.is_autocast_enabled(device.type)  # as attention gets them
        dtype = torch.get_autocast_dtype(device.type) if half else torch.float32
        empty = lambda: torch.zeros(c.kv_heads, batch, length, c.head_dim, dtype=dtype, device=device)
        self.keys = [empty() for _ in range(c.n_layer)]
        self.values = [empty() for _ in range(c.n_layer)]
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.longest = 0
        self.even = True  # whether all rows are as long as the longest

    def append(self, layer: int, k: Tensor, v: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
        """Store k, v [G, B, width, D] of the new tokens -> the keys and values of all tokens so far."""
        end = self.longest + packing.width
        for stored, new in ((self.keys[layer], k), (self.values[layer], v)):
            if packing.cache_columns is None:
                stored[:, :, self.longest : end] = new
            else:
                row = torch.arange(len(self.lengths), device=stored.device)[:, None]
                stored[:, row, packing.cache_columns] = new.to(stored.dtype)
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def step(self, model: GPT, token: Tensor) -> Tensor:
        """Hidden states [B, C] of the next token [B] of each row."""
        return model(token[:, None], None, self)[:, -1]

    def advance(self, packing: Packing) -> None:
        """Count the new tokens, after all layers have stored them."""
        self.lengths = self.lengths + (packing.width if packing.lengths is None else packing.lengths)
        self.longest, self.even = self.longest + packing.width, self.even and packing.lengths is None

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows [K] alone.  Layers are copied one by one: two whole caches never exist."""
        for stored in (self.keys, self.values):
            for layer, x in enumerate(stored):
                stored[layer] = x[:, rows]
        self.lengths = self.lengths[rows]


def new_cache(model: GPT, batch: int, length: int) -> KVCache:
    """An empty cache for `length` tokens per row; its steps are compiled if the model has a decoder."""
    return model.decoder.cache_for(batch, length) if model.decoder else KVCache(model, batch, length)

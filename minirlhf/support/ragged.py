"""Batches of texts of different lengths, computed without their padding; and what is fast on a CPU.

A reader of model.py may skip this file.  Linear layers see only the N real tokens of a padded batch [B, T],
as [N, C].  Attention needs rows and sees [rows, width]: every text starts at column 0 of a row, where
causality hides the padding behind it.  On a CPU short texts share rows, and a mask keeps them apart.  On a
GPU in bf16 or fp16 all texts lie in one row, and a kernel is told where each begins (attend_packed).
`make_packing` decides where everything goes; its Packing moves tensors from shape to shape:

    batch [B, T]  --pick-->  tokens [N, ...]  --to_rows-->  rows [rows, width, ...]  --to_tokens-->  tokens
                  <-restore-

Indices depend on what a mask holds.  If a GPU computed them, the host would wait for it several times per
forward pass.  So the mask is copied to the host once (or is there already), all indices are computed there,
and they are sent to the GPU without waiting.

The last part is for the CPU alone: attention of short texts as plain products, dropout from random bytes,
and a transposed product for large vocabularies.
"""

from __future__ import annotations

import functools
import inspect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from minirlhf.model import KVCache

MAX_SHORT = 96  # up to this many tokens plain products beat a CPU's fused attention; at 128 both are equal
MAX_ROWS_TRANSPOSED = 8  # up to this many rows (W @ h.T).T is 2 to 5 times faster than h @ W.T in fp32


class Boundaries(NamedTuple):
    """Where each of the texts begins that lie one after the other in a single row."""

    starts: Tensor  # [texts + 1] int32 on the device; the last entry is the end of the row
    longest: int  # tokens of the longest text


@dataclass
class Packing:
    """Where the real tokens of a batch are: in the padded batch, and in the rows that attention sees.

    Lists of tokens have M >= N entries: after the N real tokens the first is repeated (see fill_up).
    """

    batch: int  # rows of attention
    width: int  # columns of attention: the longest text's new tokens
    length: int  # the longest text, with the tokens in the cache
    n_real: int  # N
    positions: Tensor  # [M] position of each token in its text
    source: Tensor | None  # [M] flat index of each token in the padded batch; None: it has no padding
    place: Tensor | None  # [M] flat index of each token in the rows; None: as in the batch
    wanted: Tensor | None  # [K or more] the tokens that the last block computes; None: all
    target: Tensor | None  # [K] flat index of each result in the padded batch; None: as computed
    lengths: Tensor | None  # [B] new tokens of each text; None: all texts have `width`
    masks: dict[bool, Tensor | Boundaries | None]  # of attention in causal blocks (True) and in others
    cache: KVCache | None
    cache_columns: Tensor | None  # [B, width] of the new tokens in the cache; None: right after the others
    angles: tuple[Tensor, Tensor] | None = None  # cosines, sines [batch, width, D / 2] of rotary positions

    def pick(self, x: Tensor) -> Tensor:
        """Batch [B, T] -> tokens [M]."""
        x = x.reshape(-1)
        return x if self.source is None else x[self.source]

    def to_rows(self, x: Tensor) -> Tensor:
        """Tokens [M, ...] -> rows [batch, width, ...], 0 where there is no token."""
        if self.place is not None:
            empty = x.new_zeros(self.batch * self.width, *x.shape[1:])
            x = empty.index_copy(0, self.place[: self.n_real], x[: self.n_real])
        return x.view(self.batch, self.width, *x.shape[1:])

    def to_tokens(self, x: Tensor) -> Tensor:
        """Rows [batch, width, ...] -> tokens [M, ...]."""
        x = x.reshape(self.batch * self.width, *x.shape[2:])
        return x if self.place is None else x.index_select(0, self.place)

    def restore(self, x: Tensor, shape: torch.Size) -> Tensor:
        """Results [K or more, C] -> batch [B, T, C], 0 where nothing was computed."""
        if self.target is not None:
            x = x.new_zeros(shape.numel(), x.shape[1]).index_copy(0, self.target, x[: len(self.target)])
        return x.view(*shape, x.shape[1])


def make_packing(
    shape: torch.Size,
    mask: Tensor | None,
    wanted: Tensor | None,
    cache: KVCache | None,
    device: torch.device,
    causal_kinds: set[bool],
    head_dim: int,
) -> Packing:
    """The packing of a batch of this shape [B, T] on `device`.

    mask, wanted [B, T] bool and cache are those of GPT.forward.  causal_kinds: {True}, {False} or both, as
    the model has causal blocks, others, or both.  head_dim: D, which decides who computes attention.
    """
    batch, width = shape
    longest, past = width, 0 if cache is None else cache.longest
    mask = None if mask is None else mask.cpu()
    source = place = row = owner = lengths = cache_columns = boundaries = None
    if mask is None or mask.all():
        n_real = batch * width
        positions = torch.arange(width, device=device).repeat(batch)
    else:
        n_real = int(mask.sum())
        source = fill_up(mask.reshape(-1).nonzero().squeeze(1))
        row, positions = source // width, position_ids(mask).reshape(-1)[source]
        lengths = mask.sum(1)
        longest = width = max(1, int(lengths.max()))
        place = row * width + positions
        if cache is None and longest > 1 and attends_packed(device, head_dim):
            batch, width, place = 1, len(source), None
            boundaries = find_boundaries(lengths, len(source), device)
        elif cache is None and is_short(device, width, width):
            shared_rows, starts = pack(lengths.tolist())
            if max(shared_rows) + 1 < batch:
                batch = max(shared_rows) + 1
                place = torch.tensor(shared_rows)[row] * width + torch.tensor(starts)[row] + positions
                owner = torch.full((batch * width,), -1).index_copy(0, place, row).view(batch, width)

    target = None if source is None else source[:n_real]
    if wanted is not None:
        wanted = wanted.cpu().reshape(-1)
        wanted = (wanted if target is None else wanted[target]).nonzero().squeeze(1)
        target = wanted if target is None else target[wanted]
        wanted = fill_up(wanted)

    on_device = lambda x: None if x is None else send(x, device)
    source, place, row, positions, lengths = map(on_device, (source, place, row, positions, lengths))
    if past:
        start = cache.lengths.repeat_interleave(width) if row is None else cache.lengths[row]
        positions = positions + start
        if not cache.even or width > 1:
            cache_columns = cache.lengths[:, None] + torch.arange(width, device=device)
    return Packing(
        batch=batch,
        width=width,
        length=past + longest,
        n_real=n_real,
        positions=positions,
        source=source,
        place=place,
        target=on_device(target),
        wanted=on_device(wanted),
        lengths=lengths,
        masks={
            causal: boundaries or _attention_mask(causal, past, width, device, lengths, owner, cache_columns)
            for causal in causal_kinds
        },
        cache=cache,
        cache_columns=cache_columns,
    )


def _attention_mask(
    causal: bool,
    past: int,
    width: int,
    device: torch.device,
    lengths: Tensor | None,
    owner: Tensor | None,
    cache_columns: Tensor | None,
) -> Tensor | None:
    """Which keys a query may see, [rows or 1, width or 1, keys]: bool, or for short texts 0 and -inf.

    None: all keys, or in a causal block all up to the query.  owner [rows, width]: where texts share rows,
    the text that each token belongs to.
    """
    column = torch.arange(past + width, device=device)
    short = is_short(device, width, past + width)
    mask = None
    if past:
        if cache_columns is not None:
            mask = column <= cache_columns[:, :, None]
    elif owner is not None:
        mask = owner[:, :, None] == owner[:, None]
        if causal:
            mask = mask & (column <= column[:, None])
    elif causal:
        if short and width > 1:
            mask = (column <= column[:, None])[None]
    elif lengths is not None:
        mask = (column < lengths[:, None])[:, None]
    if mask is None or not short:
        return mask
    return torch.zeros(mask.shape).masked_fill_(~mask, -math.inf)


def position_ids(mask: Tensor) -> Tensor:
    """Positions that count real tokens only [D6]: mask [0,0,1,1,1] -> [0,0,0,1,2].  Both are [B, T]."""
    return mask.long().cumsum(1) - mask.long()


def fill_up(index: Tensor) -> Tensor:
    """index [N] -> [M]: the first entry is repeated at the end, up to a multiple of N / 16 to N / 32.

    Tensors of a new size in every batch would fragment the heap.  What is computed for the repeated entries,
    3 % on average, is never read.
    """
    step = 1 << max(0, len(index).bit_length() - 5)
    return torch.cat([index, index[:1].expand(-len(index) % step)])


def pack(lengths: list[int]) -> tuple[list[int], list[int]]:
    """(row, first column) of each text, where texts share rows as wide as the longest one.

    First fit, the longest first: each text goes into the first row that has room for it.
    """
    width, room = max(lengths), []  # room: columns left in each row
    rows, starts = [0] * len(lengths), [0] * len(lengths)
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        row = next((r for r, left in enumerate(room) if left >= lengths[i]), len(room))
        if row == len(room):
            room.append(width)
        rows[i], starts[i] = row, width - room[row]
        room[row] -= lengths[i]
    return rows, starts


def send(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`; the host does not wait for the copy, and whatever uses x on the device runs after it."""
    if x.device.type == "cpu" and device.type == "cuda":
        x = x.pin_memory()  # only copies from pinned memory return at once, whatever their size
    return x.to(device, non_blocking=True)


def places(mask: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """(rows, columns) [N] on `device` where mask [B, T] is True: x[places] equals x[mask].

    For a mask on the CPU.  One on a GPU is copied to the host, which waits for it, as x[mask] does.
    """
    rows, columns = mask.cpu().nonzero().unbind(1)
    return send(rows, device), send(columns, device)


# ------------------------------------------------------------------------------------------ fast on a GPU


def attends_packed(device: torch.device, head_dim: int) -> bool:
    """Whether attention runs on packed tokens: what torch's kernel for that takes, and where torch has it."""
    if device.type != "cuda" or torch.version.hip or not torch.is_autocast_enabled("cuda"):
        return False  # it is FlashAttention's: bf16 or fp16, on NVIDIA's Ampere or later
    fits = head_dim % 8 == 0 and head_dim <= 192  # backward of wider heads is not for all of these GPUs
    return fits and torch.cuda.get_device_capability(device) >= (8, 0) and _has_varlen()


@functools.cache
def _has_varlen() -> bool:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # torch before 2.10
        return False
    return {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys()


def find_boundaries(lengths: Tensor, total: int, device: torch.device) -> Boundaries:
    """Where texts of these lengths [B] (on the CPU) begin in a row of `total` tokens.

    The tokens of fill_up become a text of their own: a kernel leaves what no text covers unwritten, and a
    NaN there would reach the gradients of weights as 0 * NaN.
    """
    filled = torch.cat([lengths, total - lengths.sum(0, keepdim=True)])
    filled = filled[filled > 0]
    starts = torch.cat([filled.new_zeros(1), filled.cumsum(0)]).int()
    return Boundaries(send(starts, device), int(filled.max()))


def attend_packed(q: Tensor, k: Tensor, v: Tensor, texts: Boundaries, causal: bool) -> Tensor:
    """model.attend in one row of texts: q [H, 1, N, D], k and v [G, 1, N, D] -> [H, 1, N, D]."""
    from torch.nn.attention.varlen import varlen_attn  # seconds to import

    q, k, v = (x.squeeze(1).transpose(0, 1) for x in (q, k, v))  # [N, heads, D], without a copy
    starts, longest, window = texts.starts, texts.longest, (-1, 0 if causal else -1)
    y = varlen_attn(q, k, v, starts, starts, longest, longest, window_size=window, enable_gqa=True)
    return y.transpose(0, 1).unsqueeze(1)


# ------------------------------------------------------------------------------------------ fast on a CPU


def is_short(device: torch.device, queries: int, keys: int) -> bool:
    """Whether attention runs as plain products: a CPU's fused attention is made for longer texts."""
    return device.type == "cpu" and queries * keys <= MAX_SHORT**2


def attend_short(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """model.attend by plain products, with a mask of 0 and -inf; heads that share keys are one product."""
    H, B, T, D = q.shape
    G, K = len(k), k.shape[2]
    q = q.view(G, H // G, B, T, D).transpose(1, 2).reshape(G * B, H // G * T, D)
    k, v = (x.reshape(G * B, K, D) for x in (k, v))
    scores = torch.baddbmm(q.new_empty(1), q, k.transpose(1, 2), beta=0, alpha=1 / math.sqrt(D))
    if mask is not None:
        scores.view(G, B, H // G, T, K).add_(mask[:, None])
    y = scores.softmax(-1) @ v
    return y.view(G, B, H // G, T, D).transpose(1, 2).reshape(H, B, T, D)


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """F.dropout; on a CPU with p rounded to 1/256, and one random byte per element.

    There a float per element takes three times as long to draw, which would be a tenth of a training step.
    """
    if x.device.type != "cpu":
        return F.dropout(x, p, training)
    drop = min(255, round(256 * p))
    if not training or drop == 0:
        return x
    words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    keep = words.view(torch.uint8)[: x.numel()].view(x.shape) >= drop
    return x * (keep * (256 / (256 - drop))).to(x.dtype)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., C] @ weight [V, C].T -> [..., V]; by the transposed product for few rows on a CPU."""
    plain = x.device.type == "cpu" and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
    if plain and x.dim() == 2 and len(x) <= MAX_ROWS_TRANSPOSED:
        return (weight @ x.T).T
    return F.linear(x, weight)

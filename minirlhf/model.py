"""A transformer in PyTorch, and the scalar models built on it.

Dimension key: B sequences, T tokens, V vocabulary, C channels, H heads, G key-value heads, D = C / H channels a head, L layers.

One block, whose parts a config chooses.  The default is GPT-2's (Radford et al. 2019): learned positions, pre-norm blocks,
GELU (tanh form), a head tied to the token embedding, N(0, .02) weights with the projections into the residual stream scaled by
1 / sqrt(2 L).  Real weights need the other choices:

    Llama (Touvron et al. 2023)    norm rms, positions rotary, mlp swiglu, n_kv_head < n_head, no biases
    Qwen2 (Yang et al. 2024)       the same, with biases on q, k and v
    BERT (Devlin et al. 2019)      an encoder, not causal: norms after each residual sum, and one after the embeddings

What it does not do: experts, sliding windows, a head width other than C / H.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minirlhf import UserError


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int
    context: int = 128
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 192
    dropout: float = 0.0
    n_kv_head: int | None = None  # heads that keys and values share (grouped queries); None: n_head
    n_inner: int | None = None  # width of the MLP; None: 4 * n_embd
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-5
    positions: Literal["learned", "rotary"] = "learned"
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = (
        None  # Llama 3.1's: factor, low_ and high_freq_factor, original_max_position_embeddings
    )
    mlp: Literal["gelu_tanh", "gelu", "swiglu"] = "gelu_tanh"
    bias: bool = True  # in the blocks' linear layers
    qkv_bias: bool | None = None  # None: as `bias`
    tied: bool = True  # the head is the token embedding
    causal: bool = True  # False: an encoder
    n_bidirectional: int = (
        0  # of a causal model's last blocks, how many read in both directions (Dukic and Snajder 2024)
    )
    pre_norm: bool = (
        True  # False: norms after the residual sums, and the last one after the embeddings instead
    )

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise UserError(
                f"n_embd {self.n_embd} does not divide by n_head {self.n_head}: change --n-embd or --n-head"
            )
        if self.n_head % self.kv_heads:
            raise UserError(f"n_head {self.n_head} does not divide by n_kv_head {self.n_kv_head}")
        if not 0 <= self.n_bidirectional <= self.n_layer:
            raise UserError(
                f"n_bidirectional {self.n_bidirectional}, but {self.n_layer} layers: change --bidirectional"
            )

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def reads_prefixes(self) -> bool:
        """Whether what stands at a token depends on no later one."""
        return self.causal and not self.n_bidirectional


SHORT = 96  # tokens up to which a CPU is faster without its fused attention; at 128 they are equal
FEW = 8  # rows up to which a CPU's fp32 product with a large vocabulary is two to five times as fast the other way round


def position_ids(mask: Tensor) -> Tensor:
    """Positions that count real tokens only [D6]: [0,0,1,1,1] -> [0,0,0,1,2].  mask [B, T] bool -> [B, T] int64."""
    return mask.long().cumsum(1) - mask.long()


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout with p rounded to 1/256.  One random byte an element: drawing a float for each costs three times as much
    on a CPU, where it would be a tenth of a training step."""
    drop = round(256 * p)
    if not training or drop == 0:
        return x
    words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device).random_(-(2**63), None)
    keep = words.view(torch.uint8)[: x.numel()].view(x.shape) >= drop
    return x * (keep * (256 / (256 - drop))).to(x.dtype)


def rotary(config: GPTConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """positions [..., T] -> cosines, sines [..., T, D / 2] of the angles by which pairs of channels turn (Su et al. 2021)."""
    steps = torch.arange(0, config.head_dim, 2, device=positions.device)
    frequency = 1.0 / config.rope_theta ** (steps / config.head_dim)
    if (
        config.rope_scaling
    ):  # Llama 3.1: slow channels turn slower still, so that a longer context reaches the same angles
        s = config.rope_scaling
        turns = (
            s["original_max_position_embeddings"] * frequency / (2 * math.pi)
        )  # in the context of pre-training
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / s["factor"])
    angle = positions[..., None] * frequency
    return angle.cos(), angle.sin()


def brief(device: torch.device, queries: int, keys: int) -> bool:
    """Whether attention runs as plain products: fused kernels are made for longer texts than this."""
    return device.type == "cpu" and queries * keys <= SHORT**2


def pack(lengths: list[int]) -> tuple[list[int], list[int]]:
    """Row and first place of each text where they share rows as wide as the longest: first fit, the longest first."""
    width, room = max(lengths), []  # room: places left in each row
    row, start = [0] * len(lengths), [0] * len(lengths)
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        row[i] = next((r for r, left in enumerate(room) if left >= lengths[i]), len(room))
        room += [width] * (row[i] == len(room))
        start[i] = width - room[row[i]]
        room[row[i]] -= lengths[i]
    return row, start


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., T, D]: channel i turns with channel i + D / 2."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@dataclass(frozen=True)
class Layout:
    """Where the real tokens of a batch are.  Linear layers see the N of them as [N, C]; attention needs rows.  Every text
    begins at place 0 of its own, where causality alone hides the padding; short texts on a CPU share rows, and `allowed` keeps
    them apart.

    Lists of tokens are filled up with copies of their first to one of a few lengths, 3 % on average: activations of a new size
    in every batch would leave the heap full of holes.  Nobody reads the copies.
    """

    batch: int  # rows
    width: int  # of a row: the longest text
    real: Tensor | None  # [N] row * T + column of each real token in the batch as it came; None: all are
    filled: Tensor | None  # [N or a little more] row * width + place of each, filled up
    turn: tuple[Tensor, Tensor] | None  # cosines and sines [B, width, D / 2] of rotary positions
    allowed: dict[
        bool, Tensor | None
    ]  # what a query may look at in a block that is causal (True) or not, [B or 1, width or 1,
    # keys]: bool, or, where texts are brief, 0 and -inf; None: as much as causality lets it, or everything
    places: (
        Tensor | None
    )  # [B, width] of new tokens in the cache's rows; None: all rows go on at the same place

    def rows(self, x: Tensor) -> Tensor:
        """[N, ...] -> [B, width, ...], 0 where there is no token."""
        if self.real is not None:
            n = len(self.real)
            x = x.new_zeros(self.batch * self.width, *x.shape[1:]).index_copy(0, self.filled[:n], x[:n])
        return x.view(self.batch, self.width, *x.shape[1:])

    def tokens(self, x: Tensor) -> Tensor:
        """[B, width, ...] -> [N, ...]"""
        x = x.reshape(self.batch * self.width, *x.shape[2:])
        return x if self.filled is None else x.index_select(0, self.filled)


def fill_up(x: Tensor) -> Tensor:
    """[N] -> x and copies of its first entry, to a multiple of N / 16 to N / 32."""
    step = 1 << max(0, len(x).bit_length() - 5)
    return torch.cat([x, x[:1].expand(-len(x) % step)])


class KVCache:
    """Keys and values of every layer, preallocated for `length` tokens a row: 2 x [L, G, B, length, D]."""

    def __init__(self, model: GPT, batch: int, length: int):
        c, device = model.config, model.wte.weight.device
        if not c.reads_prefixes:
            raise UserError(
                "a model that reads in both directions has no past to keep: every new token changes it"
            )
        half = device.type != "cpu" and torch.is_autocast_enabled(device.type)  # as attention gets them
        dtype = torch.get_autocast_dtype(device.type) if half else torch.float32
        shape = (c.n_layer, c.kv_heads, batch, length, c.head_dim)
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.longest, self.even = 0, True  # even: all rows are as long as the longest

    def append(self, layer: int, k: Tensor, v: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Store k, v [G, B, width, D] of the new tokens; return those of all tokens so far."""
        end = self.longest + layout.width
        for held, new in ((self.k[layer], k), (self.v[layer], v)):
            if layout.places is None:
                held[:, :, self.longest : end] = new
            else:
                row = torch.arange(len(self.lengths), device=held.device)[:, None]
                held[:, row, layout.places] = new.to(held.dtype)
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def advance(self, layout: Layout, counts: Tensor | None) -> None:
        """All layers hold the new tokens: `counts` [B] of them, or (None) as many as the layout is wide."""
        self.lengths = self.lengths + (layout.width if counts is None else counts)
        self.longest, self.even = self.longest + layout.width, self.even and counts is None

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows [K] alone."""
        self.k, self.v, self.lengths = self.k[:, :, rows], self.v[:, :, rows], self.lengths[rows]


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, causal: bool) -> Tensor:
    """softmax(q k' / sqrt D) v where `allowed` (Layout's), or without it causality, lets a query look.  Heads come first:
    q [H, B, T, D], k and v [G, B, K, D].

    No dropout on the weights: it would rule out the fused kernels.
    """
    H, B, T, D = q.shape
    G, K = len(k), k.shape[2]
    if not brief(q.device, T, K):
        k, v = (y.repeat_interleave(H // G, 0) if G < H else y for y in (k, v))
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, is_causal=causal and allowed is None and T > 1
        )
    q = (
        q.view(G, H // G, B, T, D).transpose(1, 2).reshape(G * B, H // G * T, D)
    )  # queries that share keys: one product's rows
    k, v = (y.reshape(G * B, K, D) for y in (k, v))
    scores = torch.baddbmm(q.new_empty(1), q, k.transpose(1, 2), beta=0, alpha=1 / math.sqrt(D))
    if allowed is not None:
        scores.view(G, B, H // G, T, K).add_(allowed[:, None])
    y = scores.softmax(-1) @ v
    return y.view(G, B, H // G, T, D).transpose(1, 2).reshape(H, B, T, D)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, causal: bool):
        super().__init__()
        self.config, self.causal, self.dropout = config, causal, config.dropout
        C, inner, D = config.n_embd, config.n_inner or 4 * config.n_embd, config.head_dim
        self.ln_1, self.ln_2 = norm(config), norm(config)
        qkv_bias = config.bias if config.qkv_bias is None else config.qkv_bias
        self.qkv = nn.Linear(C, (config.n_head + 2 * config.kv_heads) * D, bias=qkv_bias)
        self.attn_out = nn.Linear(C, C, bias=config.bias)
        self.fc, self.mlp_out = nn.Linear(C, inner, bias=config.bias), nn.Linear(inner, C, bias=config.bias)
        if config.mlp == "swiglu":
            self.gate = nn.Linear(C, inner, bias=config.bias)

    def attention(
        self, x: Tensor, layout: Layout, cache: KVCache | None, layer: int, keep: Tensor | None
    ) -> Tensor:
        H, G, D = self.config.n_head, self.config.kv_heads, self.config.head_dim
        heads = (
            layout.rows(self.qkv(x)).unflatten(2, (H + 2 * G, D)).permute(2, 0, 1, 3)
        )  # [H + 2 G, B, width, D]
        with torch.autocast(x.device.type, enabled=False):
            if (
                x.device.type == "cpu"
            ):  # whose backward of half-precision attention is many times slower than fp32's
                heads = heads.to(
                    torch.float32, memory_format=torch.contiguous_format
                ).contiguous()  # one copy for both
            q, k, v = heads.split([H, G, G])
            if layout.turn is not None:
                q, k = rotate(heads[: H + G], *layout.turn).to(heads.dtype).split([H, G])
            if cache is not None:
                k, v = cache.append(layer, k, v, layout)
            y = attend(q, k, v, layout.allowed[self.causal], self.causal)
        y = layout.tokens(y.permute(1, 2, 0, 3).flatten(2))
        return self.attn_out(y if keep is None else y.index_select(0, keep))

    def mlp(self, x: Tensor) -> Tensor:
        if self.config.mlp == "swiglu":
            return self.mlp_out(F.silu(self.gate(x)) * self.fc(x))
        return self.mlp_out(
            F.gelu(self.fc(x), approximate="tanh" if self.config.mlp == "gelu_tanh" else "none")
        )

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        cache: KVCache | None = None,
        layer: int = 0,
        keep: Tensor | None = None,
    ) -> Tensor:
        """[N, C] -> [N, C], or of the tokens `keep` [K] alone, which have read all: [K, C]."""
        drop = lambda y: dropout(y, self.dropout, self.training)
        seen = drop(self.attention(self.ln_1(x) if self.config.pre_norm else x, layout, cache, layer, keep))
        x = x if keep is None else x.index_select(0, keep)
        if self.config.pre_norm:
            x = x + seen
            return x + drop(self.mlp(self.ln_2(x)))
        x = self.ln_1(x + seen)
        return self.ln_2(x + drop(self.mlp(x)))


def norm(config: GPTConfig) -> nn.Module:
    return (nn.LayerNorm if config.norm == "layer" else nn.RMSNorm)(config.n_embd, eps=config.norm_eps)


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config, self.dropout = config, config.dropout
        self.recompute = (
            False  # make each block's activations again in backward: one more forward's time, little memory
        )
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.positions == "learned":
            self.wpe = nn.Embedding(config.context, config.n_embd)
        looking_back = (
            config.n_layer - config.n_bidirectional if config.causal else 0
        )  # blocks that do no more
        self.blocks = nn.ModuleList(Block(config, layer < looking_back) for layer in range(config.n_layer))
        self.ln_f = norm(config)
        if not config.tied:
            self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                into_residual = name.endswith(("attn_out.weight", "mlp_out.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if into_residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def layout(
        self, mask: Tensor | None, batch: int, width: int, cache: KVCache | None
    ) -> tuple[Layout, Tensor, Tensor | None]:
        """(where the real tokens are, their positions [N], how many each row has [B] or None for `width` everywhere)."""
        config, device = self.config, self.wte.weight.device
        real = filled = counts = row = text = places = turn = None
        past = cache.longest if cache is not None else 0
        if mask is None:
            positions = torch.arange(width, device=device).repeat(batch)
        else:
            real, counts = mask.reshape(-1).nonzero().squeeze(1), mask.sum(1)
            tokens = fill_up(real)
            row, positions = tokens // width, position_ids(mask).reshape(-1)[tokens]
            width = max(1, int(counts.max()))
            filled = row * width + positions
            if cache is None and brief(device, width, width):
                rows, starts = pack(counts.tolist())
                if max(rows) + 1 < batch:
                    batch = max(rows) + 1
                    filled = torch.tensor(rows)[row] * width + torch.tensor(starts)[row] + positions
                    text = torch.full((batch * width,), -1).index_copy(0, filled, row).view(batch, width)
        if past + width > config.context:
            raise UserError(f"{past + width} tokens do not fit the model's context of {config.context}: shorten the "
                            "prompt or response, or train with a larger --context")  # fmt: skip
        place, short = torch.arange(past + width, device=device), brief(device, width, past + width)
        if past:
            starts = cache.lengths
            positions = positions + (starts[row] if row is not None else starts.repeat_interleave(width))
            if not cache.even or width > 1:
                places = starts[:, None] + place[:width]

        def allowed(causal: bool) -> Tensor | None:
            if past:
                look = None if places is None else place <= places[:, :, None]
            elif text is not None:
                look = (text[:, :, None] == text[:, None]) & (place <= place[:, None] if causal else True)
            elif causal:
                look = (place <= place[:, None])[None] if short and width > 1 else None
            else:  # (a row without tokens may look at its own padding: nobody reads it)
                look = None if counts is None else (place < counts.clamp(min=1)[:, None])[:, None]
            return (
                torch.zeros(look.shape).masked_fill_(~look, -math.inf) if short and look is not None else look
            )

        if config.positions == "rotary":
            at = (
                positions
                if filled is None
                else positions.new_zeros(batch * width).index_copy(0, filled, positions)
            )
            turn = rotary(config, at.view(batch, width))
        bounds = {causal: allowed(causal) for causal in {block.causal for block in self.blocks}}
        return Layout(batch, width, real, filled, turn, bounds, places), positions, counts

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """tokens [B, T] -> hidden states [B, T, C], 0 at padding, on which (almost) no work is done.

        mask [B, T] bool, True = real; None: all are.  With a cache, tokens (and mask) are the new ones only, after those it
        holds.  wanted [B, T] bool: where the hidden states will be read; elsewhere they are 0, and the last block does no more
        than to let others look there.
        """
        B, T = tokens.shape
        mask = None if mask is None or bool(mask.all()) else mask
        layout, positions, counts = self.layout(mask, B, T, cache)
        tokens = tokens.reshape(-1) if mask is None else tokens.reshape(-1)[fill_up(layout.real)]
        x = self.wte(tokens).float()  # the residual stream is fp32, whatever frozen weights are kept in
        if self.config.positions == "learned":
            x = x + self.wpe(positions)
        if not self.config.pre_norm:
            x = self.ln_f(x)
        x = dropout(x, self.dropout, self.training)
        places, keep = layout.real, None  # of the results in the batch as it came
        if wanted is not None:
            read = wanted.reshape(-1) if places is None else wanted.reshape(-1)[places]
            keep = read.nonzero().squeeze(1)
            places, keep = keep if places is None else places[keep], fill_up(keep)
        again = self.recompute and torch.is_grad_enabled()
        for layer, block in enumerate(self.blocks):
            run = partial(checkpoint, block, use_reentrant=False) if again and x.requires_grad else block
            x = run(x, layout, cache, layer, keep if layer + 1 == len(self.blocks) else None)
        if cache is not None:
            cache.advance(layout, counts)
        x = self.ln_f(x) if self.config.pre_norm else x
        if places is not None:
            x = x.new_zeros(B * T, x.shape[1]).index_copy(0, places, x[: len(places)])
        return x.view(B, T, self.config.n_embd)

    @property
    def head_weight(self) -> Tensor:
        """[V, C]: hidden @ head_weight.T are the logits."""
        return self.wte.weight if self.config.tied else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., C] -> logits [..., V]."""
        plain = hidden.device.type == "cpu" and not (
            torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
        )
        if plain and hidden.dim() == 2 and len(hidden) <= FEW:
            return (self.head_weight @ hidden.T).T
        return F.linear(hidden, self.head_weight)


def train_last(model: nn.Module, layers: int | None, dtype: torch.dtype) -> None:
    """Train only the last `layers` blocks of every GPT in `model`, and what comes after them; None trains everything.

    Frozen matrices are stored in `dtype`, which saves memory, and time where autocast would round them at every use.
    """
    for gpt in [m for m in model.modules() if isinstance(m, GPT)] if layers is not None else []:
        if not 0 <= layers <= len(gpt.blocks):
            raise UserError(f"--train-layers {layers}: the model has {len(gpt.blocks)} layers")
        frozen = gpt.blocks[: len(gpt.blocks) - layers]
        for module in (
            gpt,
            *frozen,
        ):  # noise that nothing below can learn to bear ruins what a trained model has read
            module.dropout = 0.0
        embeddings = [gpt.wte] + ([gpt.wpe] if gpt.config.positions == "learned" else [])
        for module in (*embeddings, *frozen):
            for p in module.requires_grad_(False).parameters():
                if p.dim() == 2:
                    p.data = p.data.to(dtype)


def run_blocks(models: Iterable[nn.Module], recompute: bool, compiled: bool) -> None:
    """How every GPT in `models` runs its blocks: made again in backward, compiled."""
    for gpt in {m for model in models for m in model.modules() if isinstance(m, GPT)}:
        gpt.recompute = recompute
        for block in gpt.blocks if compiled else []:
            block.compile(dynamic=True)


def store_blocks(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the blocks' matrices of a model that is only read in `dtype`: bit for bit what autocast would multiply with, in
    half the memory and without rounding them at every use.  (Embeddings stay: they are looked up as they are.)"""
    for block in (m for m in model.modules() if isinstance(m, Block)):
        for p in block.parameters():
            if p.dim() == 2:
                p.data = p.data.to(dtype)


def last_real(mask: Tensor) -> Tensor:
    """Index [B] of the last real token of each row of mask [B, T]; -1 where there is none."""
    T = mask.shape[1]
    return torch.where(mask, torch.arange(T, device=mask.device), -1).amax(1)


POOLINGS = ("last", "mean", "last+mean")


class ValueModel(nn.Module):
    """A GPT with a head, a two-layer MLP, that scores every prefix: values [B, T], values[:, t] having read tokens 0..t.
    (A model that reads in both directions has read all tokens at each: of its values only the last is a prefix's.)

    Pooling says what the head sees of a prefix: its last token's hidden state, the mean over its real tokens, or both.
    Without `mlp` the head is one linear layer, the only kind that transformers' sequence classifiers have.
    With a `trunk` the head stands on that model, the policy, instead of one of its own.
    """

    def __init__(self, config: GPTConfig, pooling: str = "last", mlp: bool = True, trunk: GPT | None = None):
        super().__init__()
        if pooling not in POOLINGS:
            raise UserError(f"unknown pooling {pooling!r}: choose one of {', '.join(POOLINGS)}")
        self.backbone, self.pooling = trunk or GPT(config), pooling
        C, seen = config.n_embd, config.n_embd * len(pooling.split("+"))
        self.fc = nn.Linear(seen, C) if mlp else None
        self.out = nn.Linear(C if mlp else seen, 1)
        self.reset_head()

    def reset_head(self) -> None:
        for layer in (self.fc, self.out) if self.fc else (self.out,):  # [D13]
            nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_features + 1))
            nn.init.zeros_(layer.bias)

    def values(self, tokens: Tensor, mask: Tensor, wanted: Tensor | None = None) -> Tensor:
        """tokens, mask [B, T] -> values [B, T] fp32, 0 at padding.  Left and right padding are both allowed.

        wanted [B, T] bool: where they will be read; what stands elsewhere means nothing.
        """
        return self.head(self.backbone(tokens, mask, wanted=None if "mean" in self.pooling else wanted), mask)

    def head(self, h: Tensor, mask: Tensor) -> Tensor:
        """The backbone's hidden states [B, T, C] -> values [B, T] fp32, 0 at padding."""
        h = h.float()
        features = []
        if "last" in self.pooling:
            features.append(h)
        if "mean" in self.pooling:
            real = mask[..., None]
            features.append(torch.where(real, h, 0.0).cumsum(1) / real.cumsum(1).clamp(min=1))
        x = torch.cat(features, -1)
        if self.fc:
            x = F.gelu(self.fc(x))
        return self.out(x).squeeze(-1).float().masked_fill(~mask, 0.0)

    forward = values


class RewardModel(ValueModel):
    """The value of the whole text: scores [B] read at the last real token, on the scale gain * value + bias [D14] [D15]."""

    def __init__(self, config: GPTConfig, pooling: str = "last", mlp: bool = True):
        super().__init__(config, pooling, mlp)
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("bias", torch.zeros(()))

    def values(self, tokens: Tensor, mask: Tensor, wanted: Tensor | None = None) -> Tensor:
        return (super().values(tokens, mask, wanted) * self.gain + self.bias).masked_fill(~mask, 0.0)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens, mask [B, T] -> scores [B] fp32.  Every row needs a real token."""
        last = last_real(mask)[:, None]
        return (
            self.values(tokens, mask, torch.zeros_like(mask).scatter(1, last, True))
            .gather(1, last)
            .squeeze(1)
        )


class RewardEnsemble(nn.Module):
    """K >= 1 reward models that differ in their seeds: the mean score, and how far they disagree."""

    def __init__(self, config: GPTConfig, pooling: str = "last", members: int = 1, mlp: bool = True):
        super().__init__()
        self.members = nn.ModuleList(RewardModel(config, pooling, mlp) for _ in range(members))

    def each(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens, mask [B, T] -> every member's scores [K, B]."""
        return torch.stack([m(tokens, mask) for m in self.members])

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """tokens, mask [B, T] -> scores [B], disagreement [B] (population standard deviation, 0 for one member)."""
        scores = self.each(tokens, mask)
        return scores.mean(0), scores.std(0, correction=0)


def critic_from(reward_model: RewardModel) -> ValueModel:
    """A value model that starts as the reward model: V of a whole text is its score, scale included [D13] [D14]."""
    if not reward_model.backbone.config.reads_prefixes:
        raise UserError(
            "the reward model reads in both directions, and cannot value a prefix: use --value-init sft or auto"
        )
    critic = ValueModel(reward_model.backbone.config, reward_model.pooling, reward_model.fc is not None)
    critic.load_state_dict({k: v for k, v in reward_model.state_dict().items() if k not in ("gain", "bias")})
    with torch.no_grad():
        critic.out.weight.mul_(reward_model.gain)
        critic.out.bias.mul_(reward_model.gain).add_(reward_model.bias)
    return critic


def disable_dropout(model: nn.Module) -> nn.Module:
    """RL compares log-probabilities of two forwards: with dropout in train mode they would differ [D5]."""
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    return model

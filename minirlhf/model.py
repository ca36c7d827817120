"""A transformer in PyTorch, and the models with a scalar head that are built on it.

Dimension key: B sequences, T tokens, N real tokens of a batch, V vocabulary, C channels, H heads, G key-value
heads, D channels per head (C / H in most models), K keys: those cached and those of this call.

Padding is not computed.  A batch is [N, C] everywhere but in attention, for which its Packing makes rows
[B, T, C] and flattens them again.  support/ragged.py does that; a reader of this page may skip it.

One block, whose parts a config chooses.  The default is GPT-2's (Radford et al. 2019): learned positions,
pre-norm blocks, GELU (tanh form), a head tied to the token embedding, and weights with standard deviation
.02, of which those that project into the residual stream are scaled by 1 / sqrt(2 n_layer).  Other models:

    Llama (Touvron et al. 2023)   norm rms, positions rotary, mlp swiglu, n_kv_head < n_head, no biases
    Mistral (Jiang et al. 2023)   the same; its first version with a window, which is not supported
    Qwen2 (Yang et al. 2024)      the same, with biases on q, k and v
    Qwen3 (Yang et al. 2025)      without biases; each head's q and k are normed, and D is a width of its own
    SmolLM3 (Bakouch et al. 2025) Llama, with every fourth layer seeing no positions
    BERT (Devlin et al. 2019)     an encoder, not causal: norms after residual sums, one after the embeddings

Not supported: mixtures of experts, sliding windows, rotary positions of a part of the channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from minirlhf import UserError, lora
from minirlhf.support import ragged, shape
from minirlhf.support.cache import KVCache
from minirlhf.support.ragged import Boundaries, Packing

POOLINGS = ("last", "mean", "last+mean")


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int
    context: int = 128  # longest text, prompt and response together
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 192
    dropout: float = 0.0
    n_kv_head: int | None = None  # heads of keys and values, shared by groups of queries; None: n_head
    head_dim: int | None = None  # D; None becomes n_embd / n_head
    qk_norm: bool = False  # an RMS norm of each head's queries and keys, before they are rotated
    n_inner: int | None = None  # width of the MLP; None: 4 * n_embd
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-5
    positions: Literal["learned", "rotary"] = "learned"
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None  # Llama 3.1's: see support/shape.py
    nope_layers: list[int] | None = None  # layers whose queries and keys are not rotated
    mlp: Literal["gelu_tanh", "gelu", "swiglu"] = "gelu_tanh"
    bias: bool = True  # in the blocks' linear layers
    qkv_bias: bool | None = None  # None: as `bias`
    tied: bool = True  # the head is the token embedding
    causal: bool = True  # False: an encoder
    n_bidirectional: int = 0  # so many last blocks of a causal model are not causal (Dukic and Snajder 2024)
    pre_norm: bool = True  # False: norms after the residual sums, and ln_f after the embeddings
    lora_rank: int = 0  # of the adapters beside the blocks' linear layers; 0: none
    lora_alpha: float = 32.0
    lora_layers: int | None = None  # so many last blocks have adapters; None: all

    def __post_init__(self):
        shape.check(self)
        object.__setattr__(self, "head_dim", self.head_dim or self.n_embd // self.n_head)

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def reads_prefixes(self) -> bool:
        """Whether the hidden state at a token depends on no later token."""
        return self.causal and not self.n_bidirectional


def rotary(config: GPTConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """positions [..., T] -> cosines, sines [..., T, D / 2] of each channel pair's angle (Su et al. 2021)."""
    steps = torch.arange(0, config.head_dim, 2, device=positions.device)
    frequency = 1.0 / config.rope_theta ** (steps / config.head_dim)
    if config.rope_scaling:  # Llama 3.1: slow channels turn slower still, so that a longer context fits
        scaling = config.rope_scaling
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1 for channels that turn often in a context
        frequency = frequency * (kept + (1 - kept) / scaling["factor"])
    angle = positions[..., None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., T, D] after channels i and i + D / 2, a point in the plane, have turned by angle i."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Boundaries | None, causal: bool) -> Tensor:
    """softmax(q k' / sqrt D) v over the keys that each query may see -> [H, B, T, D].

    Heads come first: q [H, B, T, D], k and v [G, B, K, D].  mask [B or 1, T or 1, K]: True = may see; None =
    all keys, or if causal all up to the query; Boundaries: those of the query's own text.  Weights have no
    dropout: it would rule out fused kernels.
    """
    if isinstance(mask, Boundaries):
        return ragged.attend_packed(q, k, v, mask, causal)
    H, T, K = len(q), q.shape[2], k.shape[2]
    if ragged.is_short(q.device, T, K):
        return ragged.attend_short(q, k, v, mask)
    if len(k) < H:
        k, v = (x.repeat_interleave(H // len(x), 0) for x in (k, v))
    causal = causal and mask is None and T > 1  # one query, the newest token, sees everything
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


class Block(nn.Module):
    """Attention, then an MLP, each added to the residual stream."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.config, self.layer, self.dropout = config, layer, config.dropout
        self.causal = config.causal and layer < config.n_layer - config.n_bidirectional
        C, inner, D = config.n_embd, config.n_inner or 4 * config.n_embd, config.head_dim
        qkv_bias = config.bias if config.qkv_bias is None else config.qkv_bias
        self.ln_1, self.ln_2 = norm(config), norm(config)
        self.qkv = nn.Linear(C, (config.n_head + 2 * config.kv_heads) * D, bias=qkv_bias)
        self.attn_out = nn.Linear(config.n_head * D, C, bias=config.bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = (nn.RMSNorm(D, eps=config.norm_eps) for _ in "qk")
        self.fc, self.mlp_out = nn.Linear(C, inner, bias=config.bias), nn.Linear(inner, C, bias=config.bias)
        if config.mlp == "swiglu":
            self.gate = nn.Linear(C, inner, bias=config.bias)

    def forward(self, x: Tensor, packing: Packing, wanted: Tensor | None = None) -> Tensor:
        """[N, C] -> [N, C]; or [K, C], for the tokens `wanted` [K] alone, which attend to all N."""
        pick = lambda y: y if wanted is None else y.index_select(0, wanted)
        drop = lambda y: ragged.dropout(y, self.dropout, self.training)
        pre_norm = self.config.pre_norm
        y = self.attention(self.ln_1(x) if pre_norm else x, packing)
        x = pick(x) + drop(self.attn_out(pick(y)))
        if pre_norm:
            return x + drop(self.mlp(self.ln_2(x)))
        x = self.ln_1(x)
        return self.ln_2(x + drop(self.mlp(x)))

    def attention(self, x: Tensor, packing: Packing) -> Tensor:
        """[N, C] -> [N, H D], before the output projection."""
        H, G, D = self.config.n_head, self.config.kv_heads, self.config.head_dim
        heads = packing.to_rows(self.qkv(x)).unflatten(2, (-1, D)).permute(2, 0, 1, 3)  # [H + 2 G, B, T, D]
        with torch.autocast(x.device.type, enabled=False):  # norms and rotations in fp32
            if x.device.type == "cpu":  # bf16 attention's backward is many times slower there than fp32's
                heads = heads.to(torch.float32, memory_format=torch.contiguous_format).contiguous()
            qk, v = heads[: H + G], heads[H + G :]
            if self.config.qk_norm:
                qk = torch.cat([self.q_norm(qk[:H].float()), self.k_norm(qk[H:].float())])
            if packing.angles is not None and self.layer not in (self.config.nope_layers or ()):
                qk = rotate(qk, *packing.angles)
            q, k = qk.to(heads.dtype).split([H, G])
            if packing.cache is not None:
                k, v = packing.cache.append(self.layer, k, v, packing)
            y = attend(q, k, v, packing.masks[self.causal], self.causal)
        return packing.to_tokens(y.permute(1, 2, 0, 3).flatten(2))

    def mlp(self, x: Tensor) -> Tensor:
        """[N, C] -> [N, C]"""
        if self.config.mlp == "swiglu":
            return self.mlp_out(F.silu(self.gate(x)) * self.fc(x))
        form = "tanh" if self.config.mlp == "gelu_tanh" else "none"
        return self.mlp_out(F.gelu(self.fc(x), approximate=form))


def norm(config: GPTConfig) -> nn.Module:
    return (nn.LayerNorm if config.norm == "layer" else nn.RMSNorm)(config.n_embd, eps=config.norm_eps)


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config, self.dropout = config, config.dropout
        self.decoder = None  # compiles the steps of a rollout: support/decode.py
        self.recompute = False  # compute a block's activations again in backward: slower, with little memory
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.positions == "learned":
            self.wpe = nn.Embedding(config.context, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = norm(config)
        if not config.tied:
            self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                into_residual = name.endswith(("attn_out.weight", "mlp_out.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if into_residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        if config.lora_rank:
            lora.attach(self, config.lora_rank, config.lora_alpha, config.lora_layers)

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """tokens [B, T] -> hidden states [B, T, C], 0 at padding.  The logits are model.logits(hidden).

        mask [B, T] bool: True = real; None: all are.  Padding may stand anywhere and costs (almost) nothing.
        wanted [B, T] bool: where hidden states will be read.  The last block computes no others; they are 0.
        cache: earlier tokens.  tokens and mask are then the new ones only.
        mask and wanted should be on the CPU: the host waits once for each that is on a GPU.
        """
        config, causal_kinds = self.config, {block.causal for block in self.blocks}
        packing = ragged.make_packing(
            tokens.shape, mask, wanted, cache, tokens.device, causal_kinds, config.head_dim
        )
        if packing.length > config.context:
            raise UserError(
                f"{packing.length} tokens do not fit the model's context of {config.context}: shorten the "
                "prompt or response, or train with a larger --context"
            )
        x = self.wte(packing.pick(tokens)).float()  # [N, C]; fp32, whatever frozen weights are stored in
        if config.positions == "learned":
            x = x + self.wpe(packing.positions)
        else:
            packing.angles = rotary(config, packing.to_rows(packing.positions))
        x = x if config.pre_norm else self.ln_f(x)
        x = ragged.dropout(x, self.dropout, self.training)
        for layer, block in enumerate(self.blocks):
            if self.recompute and torch.is_grad_enabled() and x.requires_grad:
                block = partial(recompute, block, use_reentrant=False)
            x = block(x, packing, packing.wanted if layer + 1 == config.n_layer else None)
        if cache is not None:
            cache.advance(packing)
        x = self.ln_f(x) if config.pre_norm else x
        return packing.restore(x, tokens.shape)

    @property
    def head_weight(self) -> Tensor:
        """[V, C]: hidden @ head_weight.T are the logits."""
        return self.wte.weight if self.config.tied else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., C] -> logits [..., V].

        Under bf16 autocast they are rounded to bf16 (by up to 0.03 between 8 and 16) before any log-softmax.
        """
        return ragged.linear(hidden, self.head_weight)


def last_real(mask: Tensor) -> Tensor:
    """Index [B] of the last real token of each row of mask [B, T]; -1 where there is none."""
    column = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, column, -1).amax(1)


class ValueModel(nn.Module):
    """A GPT with a head that scores every prefix: values [B, T], where values[:, t] has read tokens 0..t.

    The head is a two-layer MLP, or without `mlp` one linear layer, as in transformers' sequence classifiers.
    Pooling says what it sees of a prefix: the last token's hidden state, the mean over its tokens, or both.
    If the GPT is not causal, every value has read the whole text, and only the last one has a meaning.
    """

    def __init__(self, config: GPTConfig, pooling: str = "last", mlp: bool = True):
        super().__init__()
        if pooling not in POOLINGS:
            raise UserError(f"unknown pooling {pooling!r}: choose one of {', '.join(POOLINGS)}")
        self.backbone, self.pooling = GPT(config), pooling
        C, seen = config.n_embd, config.n_embd * len(pooling.split("+"))
        self.fc = nn.Linear(seen, C) if mlp else None
        self.out = nn.Linear(C if mlp else seen, 1)
        self.reset_head()

    def reset_head(self) -> None:
        """Draw new weights for the head: normal, with standard deviation 1 / sqrt(inputs + 1) [D13]."""
        for layer in (self.fc, self.out) if self.fc else (self.out,):
            nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_features + 1))
            nn.init.zeros_(layer.bias)

    def values(self, tokens: Tensor, mask: Tensor, wanted: Tensor | None = None) -> Tensor:
        """tokens, mask [B, T] -> values [B, T] fp32, 0 at padding, which may stand on either side.

        wanted [B, T] bool: where values will be read; elsewhere they mean nothing.
        """
        h = self.backbone(tokens, mask, wanted=None if "mean" in self.pooling else wanted).float()
        mask = ragged.send(mask, h.device)
        features = [h] if "last" in self.pooling else []
        if "mean" in self.pooling:
            real = mask[..., None]
            features.append(torch.where(real, h, 0.0).cumsum(1) / real.cumsum(1).clamp(min=1))
        x = torch.cat(features, -1)
        x = F.gelu(self.fc(x)) if self.fc else x
        return self.out(x).squeeze(-1).float().masked_fill(~mask, 0.0)

    forward = values


class RewardModel(ValueModel):
    """Scores whole texts: the value at the last real token, as gain * value + bias [D14] [D15]."""

    def __init__(self, config: GPTConfig, pooling: str = "last", mlp: bool = True):
        super().__init__(config, pooling, mlp)
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("bias", torch.zeros(()))

    def values(self, tokens: Tensor, mask: Tensor, wanted: Tensor | None = None) -> Tensor:
        values = super().values(tokens, mask, wanted) * self.gain + self.bias
        return values.masked_fill(~ragged.send(mask, values.device), 0.0)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens, mask [B, T] -> scores [B] fp32.  Every row needs a real token."""
        mask = mask.cpu()
        last = last_real(mask)[:, None]
        values = self.values(tokens, mask, wanted=torch.zeros_like(mask).scatter(1, last, True))
        return values.gather(1, ragged.send(last, values.device)).squeeze(1)


class RewardEnsemble(nn.Module):
    """K >= 1 reward models that differ in their seeds: the mean score, and how far they disagree."""

    def __init__(self, config: GPTConfig, pooling: str = "last", members: int = 1, mlp: bool = True):
        super().__init__()
        shape.check_members(members)
        self.members = nn.ModuleList(RewardModel(config, pooling, mlp) for _ in range(members))

    def each(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens, mask [B, T] -> the scores [K, B] of every member."""
        mask = mask.cpu()
        return torch.stack([member(tokens, mask) for member in self.members])

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """tokens, mask [B, T] -> mean score [B], disagreement [B] (population standard deviation)."""
        scores = self.each(tokens, mask)
        return scores.mean(0), scores.std(0, correction=0)


def critic_from(reward_model: RewardModel) -> ValueModel:
    """A value model that starts as the reward model: V of a whole text is its score [D13], scaled [D14]."""
    if not reward_model.backbone.config.reads_prefixes:
        raise UserError(
            "the reward model reads in both directions, so it cannot value a prefix: use --value-init sft"
        )
    critic = ValueModel(reward_model.backbone.config, reward_model.pooling, reward_model.fc is not None)
    critic.load_state_dict({k: v for k, v in reward_model.state_dict().items() if k not in ("gain", "bias")})
    with torch.no_grad():
        critic.out.weight.mul_(reward_model.gain)
        critic.out.bias.mul_(reward_model.gain).add_(reward_model.bias)
    return critic


def zero_critic(policy: GPT) -> ValueModel:
    """A value model that starts as the policy with a zero head: every value is 0 [D13]."""
    critic = ValueModel(policy.config)
    critic.backbone.load_state_dict(policy.state_dict())
    nn.init.zeros_(critic.out.weight)
    return critic

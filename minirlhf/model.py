"""GPT-2 in PyTorch, and the scalar models built on it.

Dimension key: B sequences, T tokens, V vocabulary, C channels, H heads, D = C / H channels a head, L layers.

The architecture is GPT-2's (Radford et al. 2019): learned positions, pre-norm blocks, GELU (tanh form), a head tied to the
token embedding, N(0, .02) weights with the projections into the residual stream scaled by 1 / sqrt(2 L).  Attention is
`scaled_dot_product_attention`.  What it does not do: rotary positions, RMS norm, grouped queries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minirlhf import UserError


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int
    context: int = 128
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 192
    dropout: float = 0.0

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd {self.n_embd} does not divide by n_head {self.n_head}: change --n-embd or --n-head")


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


class KVCache:
    """Keys and values of every layer, preallocated for `length` tokens: 2 x [L, B, H, length, D]."""

    def __init__(self, model: GPT, batch: int, length: int):
        c, like = model.config, model.wte.weight
        shape = (c.n_layer, batch, c.n_head, length, c.n_embd // c.n_head)
        self.k, self.v = (torch.zeros(shape, dtype=torch.float32, device=like.device) for _ in range(2))
        self.mask = torch.zeros(batch, length, dtype=torch.bool, device=like.device)
        self.filled = 0  # tokens stored so far, padding included

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B, H, t, D] of the new tokens; return those of all tokens so far."""
        end = self.filled + k.shape[2]
        self.k[layer, :, :, self.filled : end] = k
        self.v[layer, :, :, self.filled : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        C = config.n_embd
        self.n_head, self.dropout = config.n_head, config.dropout
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.attn_out = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.fc, self.mlp_out = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def attention(self, x: Tensor, allowed: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
        # CPU backends run the backward of half-precision attention many times slower than fp32's.
        with torch.autocast(x.device.type, enabled=False):
            if x.device.type == "cpu":
                q, k, v = q.float(), k.float(), v.float()
            if cache is not None:
                k, v = cache.append(layer, k, v)
            # No dropout on the attention weights: it would rule out the fused kernels.
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=allowed is None and T > 1)
        return self.attn_out(y.transpose(1, 2).reshape(B, T, C))

    def forward(self, x: Tensor, allowed: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        drop = lambda y: dropout(y, self.dropout, self.training)
        x = x + drop(self.attention(self.ln_1(x), allowed, cache, layer))
        return x + drop(self.mlp_out(F.gelu(self.fc(self.ln_2(x)), approximate="tanh")))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config, self.dropout = config, config.dropout
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.context, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                into_residual = name.endswith(("attn_out.weight", "mlp_out.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if into_residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens: Tensor, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """tokens [B, T] -> hidden states [B, T, C].

        mask [B, T] bool, True = real.  None means that there is no padding before a real token: causal attention already
        hides padding on the right.  With a cache, tokens (and mask) are the new ones only, after those it holds.
        """
        B, T = tokens.shape
        past = cache.filled if cache is not None else 0
        if past + T > self.config.context:
            raise UserError(f"{past + T} tokens do not fit the model's context of {self.config.context}: shorten the "
                            "prompt or response, or train with a larger --context")  # fmt: skip
        allowed = None
        if mask is not None or cache is not None:
            real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
            if cache is not None:
                cache.mask[:, past : past + T] = real
                real = cache.mask[:, : past + T]
            positions = position_ids(real)[:, past:]
            new, old = (torch.arange(n, device=tokens.device) for n in (past + T, past + T))
            causal = new[past:, None] >= old
            # A padding query may look at itself, or its row of the softmax would be empty.
            allowed = (causal & real[:, None, None, :]) | (new[past:, None] == old)
        else:
            positions = torch.arange(T, device=tokens.device)
        x = self.wte(tokens) + self.wpe(positions)
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0.0)  # whatever stands in the padding, it cannot reach a real token [D6]
        x = dropout(x, self.dropout, self.training)
        for layer, block in enumerate(self.blocks):
            x = block(x, allowed, cache, layer)
        if cache is not None:
            cache.filled += T
        return self.ln_f(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., C] -> logits [..., V], with the head tied to the token embedding."""
        return F.linear(hidden, self.wte.weight)


def last_real(mask: Tensor) -> Tensor:
    """Index [B] of the last real token of each row of mask [B, T]; -1 where there is none."""
    T = mask.shape[1]
    return torch.where(mask, torch.arange(T, device=mask.device), -1).amax(1)


POOLINGS = ("last", "mean", "last+mean")


class ValueModel(nn.Module):
    """A GPT with a two-layer MLP head that scores every prefix: values [B, T], values[:, t] having read tokens 0..t.

    Pooling says what the head sees of a prefix: its last token's hidden state, the mean over its real tokens, or both.
    """

    def __init__(self, config: GPTConfig, pooling: str = "last"):
        super().__init__()
        if pooling not in POOLINGS:
            raise UserError(f"unknown pooling {pooling!r}: choose one of {', '.join(POOLINGS)}")
        self.backbone, self.pooling = GPT(config), pooling
        C = config.n_embd
        self.fc = nn.Linear(C * len(pooling.split("+")), C)
        self.out = nn.Linear(C, 1)
        self.reset_head()

    def reset_head(self) -> None:
        for layer in (self.fc, self.out):  # [D13]
            nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_features + 1))
            nn.init.zeros_(layer.bias)

    def values(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens, mask [B, T] -> values [B, T] fp32, 0 at padding.  Left and right padding are both allowed."""
        left_padded = not bool(mask[:, 0].all())
        h = self.backbone(tokens, mask if left_padded else None).float()
        features = []
        if "last" in self.pooling:
            features.append(h)
        if "mean" in self.pooling:
            real = mask[..., None]
            features.append(torch.where(real, h, 0.0).cumsum(1) / real.cumsum(1).clamp(min=1))
        x = F.gelu(self.fc(torch.cat(features, -1)))
        return self.out(x).squeeze(-1).float().masked_fill(~mask, 0.0)

    forward = values


class RewardModel(ValueModel):
    """The value of the whole text: scores [B] read at the last real token, on the scale gain * value + bias [D14] [D15]."""

    def __init__(self, config: GPTConfig, pooling: str = "last"):
        super().__init__(config, pooling)
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("bias", torch.zeros(()))

    def values(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return (super().values(tokens, mask) * self.gain + self.bias).masked_fill(~mask, 0.0)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens, mask [B, T] -> scores [B] fp32.  Every row needs a real token."""
        return self.values(tokens, mask).gather(1, last_real(mask)[:, None]).squeeze(1)


class RewardEnsemble(nn.Module):
    """K >= 1 reward models that differ in their seeds: the mean score, and how far they disagree."""

    def __init__(self, config: GPTConfig, pooling: str = "last", members: int = 1):
        super().__init__()
        self.members = nn.ModuleList(RewardModel(config, pooling) for _ in range(members))

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """tokens, mask [B, T] -> scores [B], disagreement [B] (population standard deviation, 0 for one member)."""
        scores = torch.stack([m(tokens, mask) for m in self.members])
        return scores.mean(0), scores.std(0, correction=0)


def critic_from(reward_model: RewardModel) -> ValueModel:
    """A value model that starts as the reward model: V of a whole text is its score, scale included [D13] [D14]."""
    critic = ValueModel(reward_model.backbone.config, reward_model.pooling)
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

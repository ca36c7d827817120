"""Sampling from the policy, and the record of what was sampled.

Dimension key: B sequences, P prompt (left-padded), R response (right-padded), T = P + R, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kernels import linear_token_logprobs, token_logprobs
from minirlhf import data
from minirlhf.model import GPT, KVCache, RewardEnsemble, ValueModel
from minirlhf.tokenizer import Tokenizer

STAY = 0.75  # generate() moves the rows that still run together when they are this share of all, or less


@dataclass
class Rollout:
    """One batch of experience.  Everything off `response_mask` is 0."""

    prompts: Tensor  # [B, P] left-padded
    prompt_mask: Tensor  # [B, P] True = real
    responses: Tensor  # [B, R] right-padded
    response_mask: Tensor  # [B, R] True = counts; the EOS counts
    logprobs: Tensor  # [B, R] of the policy that sampled, recomputed by the update's own forward [D18]
    ref_logprobs: Tensor  # [B, R] of the frozen reference
    values: Tensor  # [B, R] V(s_t), read before token t [D8]
    scores: Tensor  # [B] of the reward function, once a response

    def __getitem__(self, rows: Tensor) -> Rollout:
        return Rollout(*(getattr(self, f.name)[rows] for f in fields(self)))

    @property
    def tokens(self) -> Tensor:
        return torch.cat([self.prompts, self.responses], 1)  # [B, T]

    @property
    def mask(self) -> Tensor:
        return torch.cat([self.prompt_mask, self.response_mask], 1)  # [B, T]


def forbid(logits: Tensor, token: int | None) -> Tensor:
    """Take one token out of the distribution.  Sampler, policy and reference must all do it, or KL is no KL [D2]."""
    if token is None:
        return logits
    return logits.index_fill(-1, torch.tensor([token], device=logits.device), float("-inf"))


def read_before(model: GPT | ValueModel, tokens: Tensor, mask: Tensor, prompt_len: int) -> Tensor:
    """The model's results [B, T - 1, ...] on all tokens but the last, worth reading where the next one is of the response."""
    wanted = torch.zeros_like(mask[:, :-1])
    wanted[:, prompt_len - 1 :] = True
    return model(tokens[:, :-1], mask[:, :-1], wanted=wanted)


def response_logprobs(
    model: GPT, tokens: Tensor, mask: Tensor, prompt_len: int, temperature: float, forbidden: int | None = None,
    fused_head: bool = False, hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-probabilities and entropies [B, R] of the responses in tokens [B, T].

    The one function for old, new and reference log-probs: same temperature as the sampler [D3], fp32 log-softmax [D18].
    With fused_head the logits never exist as a whole; a forbidden token needs them.  `hidden` [B, T - 1, C]: read_before, where
    a critic on the same model reads it too.
    """
    real = mask[:, prompt_len:]
    hidden = read_before(model, tokens, mask, prompt_len) if hidden is None else hidden
    hidden = hidden[:, prompt_len - 1 :][real]  # [N, C]: no logits for padding
    targets = tokens[:, prompt_len:][real]
    if fused_head and forbidden is None:
        logprobs, entropy = linear_token_logprobs(hidden, model.head_weight, targets, temperature)
    else:
        logprobs, entropy = token_logprobs(forbid(model.logits(hidden), forbidden), targets, temperature)
    empty = torch.zeros(real.shape, dtype=logprobs.dtype, device=real.device)
    return empty.masked_scatter(real, logprobs), empty.masked_scatter(real, entropy)


def response_values(
    model: ValueModel, tokens: Tensor, mask: Tensor, prompt_len: int, hidden: Tensor | None = None
) -> Tensor:
    """V(s_t) [B, R]: the value read BEFORE response token t, at the token one place before it [D8].  `hidden`: as above."""
    values = (
        read_before(model, tokens, mask, prompt_len) if hidden is None else model.head(hidden, mask[:, :-1])
    )
    return values[:, prompt_len - 1 :]


def read(
    model: RewardEnsemble, reader: Tokenizer, tokens: Tensor, mask: Tensor, writer: Tokenizer
) -> tuple[Tensor, Tensor]:
    """Scores and disagreement [B] of texts [B, T], by a model that may read them with another tokenizer than wrote them."""
    if reader.hash != writer.hash:
        rows = [
            data.translate(row[real].tolist(), writer, reader) for row, real in zip(tokens, mask, strict=True)
        ]
        tokens, mask = (x.to(tokens.device) for x in data.collate(rows, reader.pad))
    return model(tokens, mask)


def sample(logits: Tensor, temperature: float, u: Tensor) -> Tensor:
    """One token [B] from logits [B, V] where the cumulative distribution passes u [B, 1], uniform in 0..1 (multinomial is far
    slower on CPU)."""
    cdf = (logits.float() / temperature).softmax(-1).cumsum(-1)
    total = cdf[:, -1:].contiguous()
    # Below the total, the first entry above u has a positive probability; u itself may have been rounded up to it.
    u = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, u, right=True).squeeze(1)


@torch.no_grad()
def generate(
    model: GPT, prompts: Tensor, prompt_mask: Tensor, max_new: int, temperature: float, eos: int, pad: int,
    generator: torch.Generator | None = None, forbidden: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Continue prompts [B, P] (left-padded) by up to max_new tokens -> responses, response_mask [B, R = max_new].

    A response ends with its EOS, which counts, or is cut off.  The whole distribution is sampled: no top-k, no top-p, or
    the sampler would not be the policy and KL estimates could stay negative [D2].  temperature 0 takes the best token.

    Rows that have ended leave the batch once they are a quarter of it.  What is drawn for a row does not depend on that.
    """
    B, P = prompts.shape
    device = prompts.device
    cache = KVCache(model, B, P + max_new)
    responses = torch.full((B, max_new), pad, dtype=torch.long, device=device)
    lengths = torch.full((B,), max_new, dtype=torch.long, device=device)
    rows, running = (
        torch.arange(B, device=device),
        torch.ones(B, dtype=torch.bool, device=device),
    )  # those in the cache
    look = 1 if device.type == "cpu" else 16  # asking a GPU how many still run stops it
    last = torch.zeros_like(prompt_mask)
    last[:, -1] = True
    hidden = model(prompts, prompt_mask, cache, last)[:, -1]
    for t in range(max_new):
        logits = forbid(model.logits(hidden), forbidden)
        u = torch.rand(B, 1, generator=generator, device=device)
        token = sample(logits, temperature, u[rows]) if temperature > 0 else logits.argmax(-1)
        responses[rows, t] = torch.where(running, token, pad)
        ended = running & (token == eos)
        lengths[rows] = torch.where(ended, t + 1, lengths[rows])
        running = running & ~ended
        if t % look == 0:
            left = int(running.sum())
            if left == 0:
                break
            if left <= STAY * len(rows):
                keep = running.nonzero().squeeze(1)
                cache.keep(keep)
                rows, token, running = rows[keep], token[keep], running[keep]
        if t + 1 < max_new:
            hidden = model(token[:, None], None, cache)[:, -1]
    mask = torch.arange(max_new, device=device) < lengths[:, None]  # from lengths, never from the tokens [D6]
    return responses, mask

"""Sampling from the policy, and reading what was sampled.

Dimension key: B sequences, P prompt (left-padded), R response (right-padded), T = P + R, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import linear_token_logprobs, token_logprobs
from minirlhf import UserError
from minirlhf.model import GPT, ValueModel
from minirlhf.support import ragged
from minirlhf.support.cache import new_cache
from minirlhf.support.draw import draw_by_cdf, draw_by_race
from minirlhf.support.ends import Ends, are_ends, index_of
from minirlhf.support.layout import shown_prompt
from minirlhf.support.ragged import send

if TYPE_CHECKING:
    from minirlhf.tokenizer import Tokenizer

COMPACT_BELOW = 0.75  # generate() drops the finished rows when at most this share of its batch still runs


@dataclass(frozen=True)
class Sampling:
    """The settings that the sampler and all log-probabilities must share, or KL is not a KL [D2] [D3]."""

    max_new: int  # longest response, in tokens
    temperature: float  # 0 takes the likeliest token; log-probabilities need a positive temperature
    eos: Ends  # the token, or tokens, that end a response; it counts as part of it
    pad: int  # the token written after the end
    forbidden: Ends | None = None  # tokens that are never sampled, of probability 0 for every model
    fused_head: bool = False  # compute log-probabilities without holding all logits at once


@dataclass
class Texts:
    """A batch of prompts and their responses."""

    prompts: Tensor  # [B, P] int64, left-padded
    prompt_mask: Tensor  # [B, P] bool, True = real
    responses: Tensor  # [B, R] int64, right-padded
    response_mask: Tensor  # [B, R] bool, True = counts; the EOS counts

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: Tensor | slice) -> Texts:
        """The texts of some rows: a slice, or indices on the CPU."""
        here = rows if isinstance(rows, slice) else send(rows, self.prompts.device)
        parts = (self.prompts, self.prompt_mask, self.responses, self.response_mask)
        found = Texts(*(x[here] for x in parts))
        found.host_mask = self.host_mask[rows]
        return found

    @property
    def tokens(self) -> Tensor:
        """[B, T]: each prompt, then its response."""
        return torch.cat([self.prompts, self.responses], 1)

    @property
    def mask(self) -> Tensor:
        """[B, T] bool, True = real."""
        return torch.cat([self.prompt_mask, self.response_mask], 1)

    @cached_property
    def host_mask(self) -> Tensor:
        """The mask on the CPU. The host waits once for a copy from a GPU; slices share the copy."""
        return self.mask.cpu()

    def ended(self, eos: Ends) -> Tensor:
        """[B] bool: whether each response ended with EOS, rather than being cut off."""
        return (are_ends(self.responses, eos) & self.response_mask).any(1)

    @staticmethod
    def cat(parts: list[Texts]) -> Texts:
        """All texts of `parts`, in order. Narrower prompts are padded on the left, responses on the right."""
        P = max(part.prompts.shape[1] for part in parts)
        R = max(part.responses.shape[1] for part in parts)
        left = lambda x: F.pad(x, (P - x.shape[1], 0))
        right = lambda x: F.pad(x, (0, R - x.shape[1]))
        return Texts(
            torch.cat([left(part.prompts) for part in parts]),
            torch.cat([left(part.prompt_mask) for part in parts]),
            torch.cat([right(part.responses) for part in parts]),
            torch.cat([right(part.response_mask) for part in parts]),
        )

    def decode(self, tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
        """The prompts and the responses as strings, from one copy to the host."""
        P = self.prompts.shape[1]
        tokens, mask = torch.stack([self.tokens, self.mask.long()]).cpu()
        real = mask.bool()
        prompts = [row[keep].tolist() for row, keep in zip(tokens[:, :P], real[:, :P], strict=True)]
        responses = [row[keep].tolist() for row, keep in zip(tokens[:, P:], real[:, P:], strict=True)]
        return [shown_prompt(tokenizer, ids) for ids in prompts], [tokenizer.decode(ids) for ids in responses]


def forbid(logits: Tensor, tokens: Ends | None) -> Tensor:
    """Logits in which some tokens have probability 0. Sampler, policy and reference must all use it [D2]."""
    if tokens is None:
        return logits
    return logits.index_fill(-1, index_of(tokens, logits.device), float("-inf"))


def read_before(model: GPT | ValueModel, texts: Texts) -> Tensor:
    """The model's output at the token before each response token: hidden states [B, R, C], or values [B, R].

    What stands off response_mask is never read.
    """
    P = texts.prompts.shape[1]
    mask = texts.host_mask[:, :-1]  # the last token of all predicts nothing
    wanted = torch.zeros_like(mask)
    wanted[:, P - 1 :] = True
    return model(texts.tokens[:, :-1], mask, wanted=wanted)[:, P - 1 :]


def response_logprobs(model: GPT, texts: Texts, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [B, R] of the responses, 0 off response_mask.

    The one function for old, new and reference log-probs: they share the sampler's temperature [D3] and an
    fp32 log-softmax [D18]. Under bf16 autocast the logits are rounded to bf16 before the log-softmax. With
    fused_head the logits never exist as a whole, unless a token is forbidden.
    """
    P, device = texts.prompts.shape[1], texts.responses.device
    where = ragged.places(texts.host_mask[:, P:], device)  # the N real tokens: no logits for padding
    hidden, targets = read_before(model, texts)[where], texts.responses[where]  # [N, C], [N]
    if sampling.fused_head and sampling.forbidden is None:
        logprobs, entropy = linear_token_logprobs(hidden, model.head_weight, targets, sampling.temperature)
    else:
        logits = forbid(model.logits(hidden), sampling.forbidden)
        logprobs, entropy = token_logprobs(logits, targets, sampling.temperature)
    empty = torch.zeros(texts.responses.shape, dtype=logprobs.dtype, device=device)
    return empty.index_put(where, logprobs), empty.index_put(where, entropy)


def response_values(model: ValueModel, texts: Texts) -> Tensor:
    """V(s_t) [B, R]: the value read BEFORE response token t, at the token one place before it [D8]."""
    return read_before(model, texts)


def by_microbatch(
    function: Callable, model: Any, texts: Texts, microbatch: int | None, *rest: Any
) -> Tensor | tuple[Tensor, ...]:
    """function(model, texts, *rest), called on at most `microbatch` rows at a time (None: on all at once).

    The function returns a tensor [b, ...], or a tuple of them, for b rows; the results are joined in order.
    """
    size = microbatch or len(texts)
    parts = [function(model, texts[i : i + size], *rest) for i in range(0, len(texts), size)]
    if isinstance(parts[0], tuple):
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))
    return torch.cat(parts)


def sample(
    logits: Tensor, temperature: float, rows: Tensor, batch: int, generator: torch.Generator | None
) -> Tensor:
    """One token per row of logits [n, V] -> [n]; `rows` [n] are their places in the whole batch."""
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits.float() / temperature).softmax(-1)
    if logits.device.type != "cpu":
        return draw_by_race(p, torch.empty_like(p).exponential_(generator=generator))
    if p[:, 0].isnan().any():  # one NaN or infinity in a row of logits makes all of its probabilities NaN
        raise UserError(
            "the model's logits are not numbers: its weights are damaged, or its training diverged"
        )
    # A number for every row of the batch, so that no row's draw depends on which others still run.
    return draw_by_cdf(p, torch.rand(batch, 1, generator=generator)[rows])


@torch.no_grad()
def generate(
    model: GPT,
    prompts: Tensor,
    prompt_mask: Tensor,
    sampling: Sampling,
    generator: torch.Generator | None = None,
) -> Texts:
    """The prompts [B, P] (left-padded), each continued by up to R = sampling.max_new tokens.

    A response ends with its EOS, which counts, or is cut off. The whole distribution is sampled: with top-k
    or top-p the sampler would not be the policy, and KL estimates could stay negative [D2]. Prompts may be on
    the CPU; the texts are on the model's device. Finished rows leave the batch once they are a quarter of it.
    """
    device = model.wte.weight.device
    host_mask = prompt_mask.cpu()
    prompts, prompt_mask = send(prompts, device), send(prompt_mask, device)
    (B, P), R = prompts.shape, sampling.max_new
    cache = new_cache(model, B, P + R)
    responses = torch.full((B, R), sampling.pad, dtype=torch.long, device=device)
    lengths = torch.full((B,), R, dtype=torch.long, device=device)
    rows = torch.arange(B, device=device)  # those still in the batch and in the cache
    running = torch.ones(B, dtype=torch.bool, device=device)
    ask_every = 1 if device.type == "cpu" else 16  # to ask a GPU how many rows still run is to wait for it
    last = torch.zeros_like(host_mask)
    last[:, -1] = True
    hidden = model(prompts, host_mask, cache, last)[:, -1]
    for t in range(R):
        logits = forbid(model.logits(hidden), sampling.forbidden)
        token = sample(logits, sampling.temperature, rows, B, generator)
        responses[rows, t] = torch.where(running, token, sampling.pad)
        ended = running & are_ends(token, sampling.eos)
        lengths[rows] = torch.where(ended, t + 1, lengths[rows])
        running = running & ~ended
        if (t + 1) % ask_every == 0:
            n_running = int(running.sum())
            if n_running == 0:
                break
            if n_running <= COMPACT_BELOW * len(rows):
                kept = running.int().argsort(descending=True, stable=True)[:n_running]
                cache.keep(kept)
                rows, token, running = rows[kept], token[kept], running[kept]
        if t + 1 < R:
            hidden = cache.step(model, token)
    # From the lengths, never from the tokens: a response may contain the padding token [D6].
    response_mask = torch.arange(R, device=device) < lengths[:, None]
    return Texts(prompts, prompt_mask, responses, response_mask)

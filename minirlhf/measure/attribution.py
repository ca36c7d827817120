"""Which tokens of a response its score hangs on: by replacing them, and by cutting the text behind them.

`score` is any function of Texts -> [N]: a reward model, a judge, a rule.  It reads whole texts, so it may
have another tokenizer than the texts, and may read in both directions.

Dimensions: B sequences, R response tokens, K replacements per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minirlhf.model import GPT
from minirlhf.rollout import Sampling, Texts, by_microbatch, forbid, read_before
from minirlhf.support.ends import are_ends

Score = Callable[[Texts], Tensor]
CHUNK = 128  # texts per call of a score


def replaceable(texts: Texts, sampling: Sampling) -> Tensor:
    """[B, R] bool: the real tokens of the responses but for their ends, which no token can stand in for."""
    return texts.response_mask & ~are_ends(texts.responses, sampling.eos)


@torch.no_grad()
def alternatives(
    ref: GPT, texts: Texts, sampling: Sampling, count: int, generator: torch.Generator
) -> Tensor:
    """[B, R, K]: what the reference would write at each place, after the same prefix: K = count draws.

    Neither the token that stands there nor an end is drawn.  Off `replaceable` the tokens mean nothing.
    """
    B, R = texts.responses.shape
    drawn = torch.zeros(B, R, count, dtype=torch.long, device=texts.responses.device)
    for t in range(R):
        drawn[:, t] = _others(ref, texts, sampling, t, count, generator)
    return drawn


def _others(
    ref: GPT, texts: Texts, sampling: Sampling, t: int, count: int, generator: torch.Generator
) -> Tensor:
    """[B, K]: draws of the reference for place t of the responses, other than what stands there."""
    hidden = read_before(ref, texts)[:, t]
    logits = forbid(ref.logits(hidden).float(), sampling.forbidden)
    logits = forbid(logits, sampling.eos).scatter(1, texts.responses[:, t, None], float("-inf"))
    p = (logits / sampling.temperature).softmax(-1).cpu()
    return torch.multinomial(p, count, replacement=True, generator=generator).to(hidden.device)


def cut_after(texts: Texts) -> Texts:
    """One text of n response tokens -> [n + 1]: its first 0, 1, ... n tokens."""
    n = int(texts.response_mask.sum())
    lengths = torch.arange(n + 1, device=texts.responses.device)
    mask = torch.arange(texts.responses.shape[1], device=lengths.device) < lengths[:, None]
    return _versions(texts, texts.responses.expand(n + 1, -1), mask)


def _versions(texts: Texts, responses: Tensor, mask: Tensor) -> Texts:
    """One prompt with each of these responses and masks [N, R]."""
    N = len(responses)
    return Texts(texts.prompts.expand(N, -1), texts.prompt_mask.expand(N, -1), responses, mask)


def scored(score: Score, texts: Texts) -> Tensor:
    """Scores [N] on the CPU, of CHUNK texts at a time."""
    return by_microbatch(lambda score, part: score(part), score, texts, CHUNK).float().cpu()


@torch.no_grad()
def added(score: Score, texts: Texts) -> Tensor:
    """[n]: by how much each token of one text raised the score of the text that ends there.

    The sum is the score of the whole text less that of its prompt.
    """
    return scored(score, cut_after(texts)).diff()


@torch.no_grad()
def replaced(scores: dict[str, Score], texts: Texts, others: Tensor, where: Tensor) -> dict[str, Tensor]:
    """{name: [n]}: by how much each token of one text holds up each score, nan where it cannot be replaced.

        score(text) - mean over k of score(text with others[k] in the token's place)

    texts: one text of n response tokens.  others [R, K], where [R] bool: see alternatives and replaceable.
    """
    n, K = int(texts.response_mask.sum()), others.shape[1]
    places = where[:n].nonzero()[:, 0]  # [P]
    changed = texts.responses.repeat(len(places) * K, 1)  # [P * K, R]
    rows = torch.arange(len(changed), device=changed.device)
    changed[rows, places.repeat_interleave(K)] = others[places].reshape(-1)
    versions = _versions(texts, changed, texts.response_mask.expand(len(changed), -1))
    found = {}
    for name, score in scores.items():
        shares = torch.full((n,), float("nan"))
        if len(places):
            fall = scored(score, texts) - scored(score, versions)
            shares[places.cpu()] = fall.view(-1, K).mean(1)
        found[name] = shares
    return found


def decisive(shares: Tensor, fraction: float = 0.2) -> list[int]:
    """The places of the largest shares [n], best first: a fifth of those that are numbers, at least one."""
    known = [i for i, share in enumerate(shares.tolist()) if share == share]
    count = max(1, round(fraction * len(known)))
    return sorted(known, key=lambda i: -shares[i])[:count]


@torch.no_grad()
def rewritten(
    ref: GPT, texts: Texts, chosen: Tensor, sampling: Sampling, generator: torch.Generator
) -> Texts:
    """The texts with all tokens in `chosen` [B, R] replaced by other tokens that the reference draws.

    From left to right: each is drawn after the prefix that the earlier replacements have left.
    """
    responses = texts.responses.clone()
    for t in chosen.any(0).nonzero()[:, 0].tolist():
        rows = chosen[:, t].nonzero()[:, 0]
        prefix = responses[rows, : t + 1], texts.response_mask[rows, : t + 1]
        here = Texts(texts.prompts[rows], texts.prompt_mask[rows], *prefix)
        responses[rows, t] = _others(ref, here, sampling, t, 1, generator)[:, 0]
    return Texts(texts.prompts, texts.prompt_mask, responses, texts.response_mask)

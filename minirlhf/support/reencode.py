"""Texts in another model's tokens: decoded, encoded again, and cut where they exceed its context."""

from __future__ import annotations

import torch
from torch import Tensor

from minirlhf import data
from minirlhf.rollout import Texts
from minirlhf.tokenizer import Tokenizer


def whole(texts: Texts, tokenizer: Tokenizer, own: Tokenizer, context: int) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, mask [B, T] in the tokens of `own`, and which texts were cut [B]: as a reward model reads them.

    What exceeds the context is cut at the end, as in its training.
    """
    tokens, mask = texts.tokens, texts.mask
    if own.hash == tokenizer.hash:
        return tokens, mask, torch.zeros(len(texts), device=tokens.device)
    rows = [row[real].tolist() for row, real in zip(tokens.cpu(), mask.cpu(), strict=True)]
    rows = [data.translate(row, tokenizer, own) for row in rows]
    cut = torch.tensor([float(len(row) > context) for row in rows])
    found = *data.collate([row[:context] for row in rows], own.pad), cut
    return tuple(x.to(tokens.device) for x in found)


def apart(texts: Texts, tokenizer: Tokenizer, own: Tokenizer, context: int) -> tuple[Texts, Tensor]:
    """texts in the tokens of `own`, and which were cut [B]: as a policy reads them.

    Prompts and responses are translated apart, as in training, so that the boundary stays where it is. What
    exceeds the context is cut at the end.
    """
    device = texts.tokens.device
    if own.hash == tokenizer.hash:
        return texts, torch.zeros(len(texts), device=device)
    ended = texts.ended(tokenizer.eot).tolist()
    prompts, responses = [], []
    for prompt, response, end in zip(*texts.decode(tokenizer), ended, strict=True):
        prompts.append([own.bos, *own.encode(prompt)][: context - 1])
        responses.append([*own.encode(response), *[own.eot] * end] or [own.eot])
    rooms = [context - len(prompt) for prompt in prompts]
    cut = torch.tensor([float(len(r) > room) for r, room in zip(responses, rooms, strict=True)])
    responses = [response[:room] for response, room in zip(responses, rooms, strict=True)]
    parts = *data.collate(prompts, own.pad, "left"), *data.collate(responses, own.pad)
    return Texts(*(x.to(device) for x in parts)), cut.to(device)

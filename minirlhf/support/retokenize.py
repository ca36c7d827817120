"""Texts that one tokenizer encoded, in the ids of another one, as a model that scores them reads them.

What exceeds the model's context is cut on the right, as in its training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minirlhf import data
from minirlhf.rollout import Texts
from minirlhf.tokenizer import Tokenizer


def whole(texts: Texts, source: Tokenizer, target: Tokenizer, context: int) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, mask [B, T] of prompt and response as one text, and which of them were cut [B]."""
    tokens, mask = texts.tokens, texts.mask
    if target.hash == source.hash:
        return tokens, mask, torch.zeros(len(texts), device=tokens.device)
    rows = [row[real].tolist() for row, real in zip(tokens.cpu(), mask.cpu(), strict=True)]
    rows = [data.translate(row, source, target) for row in rows]
    cut = torch.tensor([float(len(row) > context) for row in rows])
    found = *data.collate([row[:context] for row in rows], target.pad), cut
    return tuple(x.to(tokens.device) for x in found)


def apart(texts: Texts, source: Tokenizer, target: Tokenizer, context: int) -> tuple[Texts, Tensor]:
    """The texts, prompt and response encoded apart so that the boundary stays, and which were cut [B]."""
    device = texts.tokens.device
    if target.hash == source.hash:
        return texts, torch.zeros(len(texts), device=device)
    ended = texts.ended(source.eot).tolist()
    prompts, responses, cut = [], [], []
    for prompt, response, end in zip(*texts.decode(source), ended, strict=True):
        prompts.append([target.bos, *target.encode(prompt)][: context - 1])
        ids = [*target.encode(response), *[target.eot] * end] or [target.eot]
        room = context - len(prompts[-1])
        responses.append(ids[:room])
        cut.append(float(len(ids) > room))
    parts = *data.collate(prompts, target.pad, "left"), *data.collate(responses, target.pad)
    return Texts(*(x.to(device) for x in parts)), torch.tensor(cut, device=device)

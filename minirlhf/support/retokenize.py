"""Texts that one tokenizer encoded, in the ids of another one, as a model that scores them reads them.

A conversation is laid out again, as that model was trained to read it.  What exceeds the model's context is
cut on the right, as in its training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minirlhf import data
from minirlhf.rollout import Texts
from minirlhf.support.layout import TEMPLATE, lay_out, layout_of
from minirlhf.tokenizer import Tokenizer


def translate(prompt: list[int], response: list[int], source: Tokenizer, target: Tokenizer) -> list[int]:
    """The same text in another tokenizer's ids, opened as its texts are, and closed if it was closed."""
    if again := _laid_out_again(prompt, response, source, target):
        return [*again[0], *again[1]]
    ids = prompt + response
    if source.hash == target.hash:
        return ids
    closed = len(ids) > 1 and ids[-1] in source.ends
    return [target.bos, *target.encode(source.decode(ids)), *[target.eot] * closed]


def _read_alike(source: Tokenizer, target: Tokenizer) -> bool:
    """Whether texts of one tokenizer are read by the other as they are."""
    one_layout = layout_of(source).name == layout_of(target).name or not layout_of(source).prompts
    return source.hash == target.hash and one_layout


def _laid_out_again(
    prompt: list[int], response: list[int], source: Tokenizer, target: Tokenizer
) -> tuple[list[int], list[int]] | None:
    """(prompt, response) of a conversation in the target's layout; None where no template is involved."""
    conversation = layout_of(source).prompts.get(tuple(prompt))
    layouts = {layout_of(source).name, layout_of(target).name}
    if conversation is None or TEMPLATE not in layouts or _read_alike(source, target):
        return None
    answer = " " + source.decode(response).removeprefix(" ")  # as transcripts have it; templates take it off
    laid = lay_out(target, conversation, answer)
    closed = bool(response) and response[-1] in source.ends
    ids = laid.ids if closed or laid.ids[-1] not in target.ends else laid.ids[:-1]
    return ids[: laid.n_prompt], ids[laid.n_prompt :]


def rows_of(texts: Texts) -> list[tuple[list[int], list[int]]]:
    """(prompt, response) of each text in ids, without padding."""
    begun = texts.prompts.shape[1]
    rows = zip(texts.tokens.cpu(), texts.mask.cpu(), strict=True)
    parts = [(row[:begun][real[:begun]], row[begun:][real[begun:]]) for row, real in rows]
    return [(prompt.tolist(), response.tolist()) for prompt, response in parts]


def whole(texts: Texts, source: Tokenizer, target: Tokenizer, context: int) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, mask [B, T] of prompt and response as one text, and which of them were cut [B]."""
    tokens, mask = texts.tokens, texts.mask
    if _read_alike(source, target):
        return tokens, mask, torch.zeros(len(texts), device=tokens.device)
    rows = [translate(prompt, response, source, target) for prompt, response in rows_of(texts)]
    cut = torch.tensor([float(len(row) > context) for row in rows])
    found = *data.collate([row[:context] for row in rows], target.pad), cut
    return tuple(x.to(tokens.device) for x in found)


def apart(texts: Texts, source: Tokenizer, target: Tokenizer, context: int) -> tuple[Texts, Tensor]:
    """The texts, prompt and response encoded apart so that the boundary stays, and which were cut [B]."""
    device = texts.tokens.device
    if _read_alike(source, target):
        return texts, torch.zeros(len(texts), device=device)
    prompts, responses, cut = [], [], []
    for prompt, response in rows_of(texts):
        again = _laid_out_again(prompt, response, source, target)
        end = any(token in source.ends for token in response)
        if again is None and source.hash == target.hash:
            again = prompt, response
        head, ids = again or (
            [target.bos, *target.encode(source.decode(prompt))],
            [*target.encode(source.decode(response)), *[target.eot] * end],
        )
        prompts.append(head[: context - 1])
        ids, room = ids or [target.eot], context - len(prompts[-1])
        responses.append(ids[:room])
        cut.append(float(len(ids) > room))
    parts = *data.collate(prompts, target.pad, "left"), *data.collate(responses, target.pad)
    return Texts(*(x.to(device) for x in parts)), torch.tensor(cut, device=device)

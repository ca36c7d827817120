"""Texts that must fit into a model's context: what is cut, and which prompts are too long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from minirlhf import UserError
from minirlhf.support.conversation import Conversation
from minirlhf.support.layout import (
    LaidOut,
    Learn,
    answered,
    by_template,
    lay_out,
    layout_of,
    of_row,
    prompt_ids,
    without_oldest_turn,
)

TooLong = Literal["error", "drop", "cut"]


@dataclass(frozen=True)
class Fitted:
    """Texts after one prompt, in token ids."""

    sequences: list[list[int]]  # prompt and text of each text, within the context
    n_prompt: int  # how many of these ids are the prompt: the same number, and the same ids, in each
    cuts: list[str]  # what was cut off, as keys of a ledger
    loss_mask: list[bool]  # True = learn this token, of the first text


def fit(
    tok: Any,
    prompt: str,
    texts: Sequence[str],
    context: int,
    too_long: TooLong,
    where: str = "",
    eos: bool = True,
    learn: Learn | None = None,
) -> Fitted | None:
    """The ids of the texts, or None where the prompt leaves no room for one token of them.

    `learn`: what SFT learns of them; then None, too, where none of that is within the context.

    What exceeds the context is cut on the right, the end of the text with it.  With `too_long` "cut" the
    prompt loses its beginning instead, as far as that lets the longest text fit; with "error" a prompt that
    leaves no room is a UserError.  A conversation in a chat template loses its oldest turns.
    """
    with of_row(where):
        laid = [lay_out(tok, prompt, text, learn or "last", eos) for text in texts]
        n = _shared(laid, prompt)
    ids, learnt = laid[0].ids, laid[0].learnt
    room = max(1, context - max(len(each.ids) - n for each in laid)) if too_long == "cut" else context - 1
    if too_long == "cut" and n > room and by_template(tok, prompt):
        if shorter := without_oldest_turn(prompt):
            found = fit(tok, shorter, texts, context, too_long, where, eos, learn)
            cuts = ["cut: the beginning of the prompt", *(found.cuts if found else [])]
            return found and replace(found, cuts=list(dict.fromkeys(cuts)))
        room = context - 1  # one question is left: the text loses its end
        head = ids[:n] if n <= room else None
    elif too_long != "cut" and True in learnt[: room + 1]:
        head = ids[:n]  # of several turns to learn, those that fit are learnt
    else:
        head = fit_prompt(ids[:n], room, too_long, where or repr(prompt[:30]))
        head = head if head and len(head) < context else None
    if head is None:
        return None
    cuts = ["cut: the beginning of the prompt"] * (len(head) < n)
    cuts += ["cut: the end of the text"] * any(len(head) + len(each.ids) - n > context for each in laid)
    sequences = [(head + each.ids[n:])[:context] for each in laid]
    kept = (learnt[:1] + learnt[n - len(head) + 1 : n] + learnt[n:])[:context]
    if learn and not any(kept[1:]):
        return None
    return Fitted(sequences, min(len(head), context), cuts, kept)


def _shared(laid: list[LaidOut], prompt: str) -> int:
    """How many ids are the prompt: the same ones in all texts, and at least one, which opens them."""
    n = max(1, min(each.n_prompt for each in laid))
    same = next((i for i in range(n) if len({each.ids[i] for each in laid}) > 1), n)
    if same < n and (prompt or not same):
        raise UserError("the chat template writes the prompt otherwise before each of the two texts")
    return same


def opening(
    tok: Any, prompt: str, text: str, prompt_tokens: int, room: int, too_long: TooLong, where: str
) -> tuple[list[int] | None, list[str]]:
    """(the ids of a prompt to practise on, at most `room`, or None; what became of its row, for a ledger).

    Without a prompt of its own a conversation has what stands before its last answer, and a plain text its
    first `prompt_tokens` tokens.  The tokenizer remembers conversations, to show them as turns.
    """
    if not prompt and by_template(tok, prompt, text):
        prompt, text = answered(text)
        if not prompt.messages:
            return None, ["dropped: texts that are too short to cut a prompt from"]
    with of_row(where):
        ids = prompt_ids(tok, prompt or text)
    whole = ids if prompt else ids[: prompt_tokens + 1]
    if not prompt and whole == ids:
        return None, ["dropped: texts that are too short to cut a prompt from"]
    if by_template(tok, prompt) and too_long == "cut" and len(whole) > room:
        if shorter := without_oldest_turn(prompt):
            found, counts = opening(tok, shorter, text, prompt_tokens, room, too_long, where)
            return found, list(dict.fromkeys([*counts, *["cut: the beginning of the prompt"] * bool(found)]))
        too_long = "drop"
    found = fit_prompt(whole, room, too_long, where)
    if found is None:
        return None, ["dropped: prompt leaves no room for the response"]
    if isinstance(prompt, Conversation):
        layout_of(tok).prompts[tuple(found)] = prompt
    counts = ["used"] + [f"cut: texts to their first {prompt_tokens} tokens"] * (not prompt)
    return found, counts + ["cut: the beginning of the prompt"] * (len(found) < len(whole))


def fit_prompt(ids: list[int], room: int, too_long: TooLong, where: str) -> list[int] | None:
    """The ids of `<bos> prompt`, at most `room` of them: where there are more, what `too_long` says.

    "drop": None; "cut": <bos> and the end of the prompt; "error": a UserError.
    """
    if len(ids) <= room:
        return ids
    if too_long == "error":
        raise UserError(
            f"{where or 'a row'}: prompt: {len(ids)} tokens with <bos>, where the context has room for "
            f"{max(room, 0)}: shorten it, use --too-long drop or cut, or a model with a longer --context"
        )
    return None if too_long == "drop" or room < 1 else [ids[0], *ids[len(ids) - room + 1 :]]

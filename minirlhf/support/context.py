"""Texts that must fit into a model's context: what is cut, and which prompts are too long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from minirlhf import UserError

TooLong = Literal["error", "drop", "cut"]


@dataclass(frozen=True)
class Fitted:
    """Texts after one prompt, in token ids."""

    sequences: list[list[int]]  # `<bos> prompt text <eot>` of each text, within the context
    n_prompt: int  # how many of these ids are `<bos> prompt`: the same number, and the same ids, in each
    cuts: list[str]  # what was cut off, as keys of a ledger

    @property
    def loss_mask(self) -> list[bool]:
        """True = learn this token, of the first text: its prompt is masked."""
        return [i >= self.n_prompt for i in range(len(self.sequences[0]))]


def fit(
    tok, prompt: str, texts: Sequence[str], context: int, too_long: TooLong, where="", eos=True
) -> Fitted | None:
    """The ids of the texts, or None where the prompt leaves no room for one token of them.

    Prompt and text are encoded apart, so that the prompt's ids are a prefix.  What exceeds the context is cut
    on the right, <eot> with it.  With `too_long` "cut" the prompt loses its beginning instead, as far as that
    lets the longest text fit; with "error" a prompt that leaves no room is a UserError.
    """
    bodies = [[*tok.encode(text), *[tok.eot] * eos] for text in texts]
    whole = [tok.bos, *tok.encode(prompt)]
    room = max(1, context - max(map(len, bodies))) if too_long == "cut" else context - 1
    head = fit_prompt(whole, room, too_long, where or repr(prompt[:30]))
    if head is None or len(head) >= context:
        return None
    cuts = ["cut: the beginning of the prompt"] * (len(head) < len(whole))
    cuts += ["cut: the end of the text"] * any(len(head) + len(body) > context for body in bodies)
    return Fitted([(head + body)[:context] for body in bodies], len(head), cuts)


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

"""Prompts to practise on: which records have one, and in which token ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from minirlhf.support import ledger as ledgers
from minirlhf.support.context import TooLong, opening


def encode_prompts(*args, **kwargs) -> list[list[int]]:
    """The prompts alone of prompts_and_records()."""
    return prompts_and_records(*args, **kwargs)[0]


def prompts_and_records(
    tok,
    records: Sequence[Any],
    prompt_tokens: int,
    room: int,
    too_long: TooLong = "drop",
    ledger: Counter[str] | None = None,
) -> tuple[list[list[int]], list[Any]]:
    """(prompts in ids, each opened as every training text is, by <bos>; the record of each prompt).

    A prompt is a record's own, or the first `prompt_tokens` tokens of a longer text without one.  `room` is
    how many ids it may have, <bos> included, beside the response.  The ledger counts all records.  Raises
    UserError where nothing is left.
    """
    found, of, counts = [], [], Counter()
    for record in records:
        prompt, reasons = opening(
            tok, record.prompt, record.texts[0], prompt_tokens, room, too_long, record.where
        )
        if prompt:
            found.append(prompt)
            of.append(record)
        counts.update(reasons)
    ledgers.enter(counts, ledger, "no prompt")
    return found, of

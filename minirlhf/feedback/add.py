"""Ready-made items to judge."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minirlhf import UserError
from minirlhf.feedback.store import CHOICES, SCALE, Store, plain
from minirlhf.support.shapes import columns_of, names_of, renamed
from minirlhf.support.sources import raw_rows
from minirlhf.support.text import one_line

MAX_TEXT = 100_000  # characters


def add(file: Path, path: Path, fields: Sequence[str] = ()) -> None:
    """Store the rows of a file, all or none; `fields` are the words of --fields.

    A row is {prompt?, response_a, response_b, gold?} or {prompt?, response, gold?}.
    """
    names, items = names_of(fields), []
    for number, raw in raw_rows(file, hashlib.sha256(), names, {"gold"}):
        try:
            items.append(item_of(renamed(columns_of(raw, plain=False), names)))
        except UserError as e:
            raise UserError(f"{file}:{number}: {e}") from None
    if not items:
        raise UserError(f"{file}: no rows")
    store = Store(path, create=True)
    report_added(store, *store.add(items))


def item_of(row: dict[str, Any]) -> dict:
    """A row -> an item.  Raises UserError('field: reason')."""
    pair = "response_a" in row or "response_b" in row
    fields = ["prompt", *(["response_a", "response_b"] if pair else ["response"])]
    if unknown := sorted({*row} - {*fields, "gold"}):
        wanted = "prompt, response_a and response_b or response, gold"
        raise UserError(f"{one_line(unknown[0], 60)}: unknown; expected {wanted}")
    prompt = plain(row.get("prompt", ""), "prompt", MAX_TEXT)
    texts = [plain(row.get(field), field, MAX_TEXT) for field in fields[1:]]
    if not all(text.strip() for text in texts) or len({*texts}) < len(texts):
        raise UserError(f"{fields[-1]}: empty, or the same as the other")
    answers, gold = CHOICES if pair else range(SCALE[0], SCALE[1] + 1), row.get("gold")
    if gold is not None and (type(gold) not in (str, int) or gold not in answers):
        raise UserError(f"gold: expected one of {', '.join(map(str, answers))}")
    item = {"mode": "pair" if pair else "rating", "prompt": prompt, "gold": gold}
    return item | dict(zip("ab", texts, strict=False))


def report_added(store: Store, new: int, known: int) -> None:
    """Print how many items were new, and what to do next."""
    print(f"{store.path}: {new} new items, {known} already there")
    print(f"next: python -m minirlhf.feedback serve --store {store.path}")

"""Ready-made items to judge."""

import json
from pathlib import Path

from minirlhf import UserError
from minirlhf.feedback.store import CHOICES, SCALE, Store, plain
from minirlhf.support.text import one_line

MAX_TEXT = 100_000  # characters


def add(file: Path, path: Path) -> None:
    """Store the rows of a JSONL file, all or none.

    A row is {prompt?, response_a, response_b, gold?} or {prompt?, response, gold?}.
    """
    try:
        lines = file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as e:
        raise UserError(f"{file}: cannot be read: {e.strerror}") from None
    items = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                items.append(item_of(line))
            except UserError as e:
                raise UserError(f"{file}:{number}: {e}") from None
    if not items:
        raise UserError(f"{file}: no rows")
    store = Store(path, create=True)
    report_added(store, *store.add(items))


def item_of(line: bytes) -> dict:
    """One line -> an item.  Raises UserError('field: reason')."""
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError) as e:
        raise UserError(f"row: not JSON in UTF-8: {e}") from None
    if not isinstance(row, dict):
        raise UserError("row: expected an object")
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

"""What became of every row, in words.

A ledger is a Counter with these keys: "rows" (all of them), "used", "dropped: why" (nothing can be learnt
from the row), "skipped: why" (it could not be read) and "left: where" (another split or genre).  Used,
dropped, skipped and left rows add up to "rows".  "cut: what" counts rows that are used, but shortened.
"""

from __future__ import annotations

from collections import Counter

from minirlhf import UserError

LOSSES = ("dropped", "skipped", "left")
REMEDIES = {
    "dropped: thumbs down": "SFT learns from thumbs up only",
    "dropped: nothing to learn": "they are bare prompts or have empty answers: give them a `completion`",
    "dropped: prompt longer than the context": "use --too-long cut, or a model with a longer --context",
    "dropped: pairs that the cut makes equal": "use a model with a longer --context",
    "dropped: pairs that the tokenizer makes equal": "use a tokenizer that keeps capitals and spaces",
    "dropped: no second response to the prompt": "rate several responses to each prompt",
    "dropped: texts that are too short to cut a prompt from": "lower --prompt-tokens",
    "dropped: prompt leaves no room for the response": "lower --response-tokens, or use --too-long cut",
}


def account(ledger: Counter[str]) -> str:
    """One line: "8,500 rows: 8,388 used (12 cut: the end of the text), 100 dropped (thumbs down), ...".

    Rows that a ledger says nothing of are "kept": that is what load() knows of them.
    """
    lost = sum(n for key, n in ledger.items() if key.startswith(LOSSES))
    rows = ledger["rows"] or lost + ledger["used"]
    kept = rows - lost - ledger["used"]
    parts = [f"{kept:,} kept"] if kept else []
    if "used" in ledger:
        cuts = [f"{n:,} cut: {what}" for what, n in _reasons(ledger, "cut").items()]
        parts.append(f"{ledger['used']:,} used" + (f" ({', '.join(cuts)})" if cuts else ""))
    return f"{rows:,} row{'s' * (rows != 1)}: {', '.join(parts + losses(ledger)) or 'none'}"


def losses(ledger: Counter[str]) -> list[str]:
    """["112 dropped (100 thumbs down, 12 empty texts)", "12 skipped (malformed)"]"""
    found = []
    for group in LOSSES:
        reasons = _reasons(ledger, group)
        named = [f"{n:,} {reason}" for reason, n in reasons.items()] if len(reasons) > 1 else reasons
        if reasons:
            found.append(f"{sum(reasons.values()):,} {group} ({', '.join(named)})")
    return found


def _reasons(ledger: Counter[str], group: str) -> dict[str, int]:
    prefix = f"{group}: "
    return {key.removeprefix(prefix): n for key, n in ledger.items() if key.startswith(prefix) and n}


def enter(counts: Counter[str], ledger: Counter[str] | None, problem: str) -> None:
    """Add what an encoder counted to a ledger.  Raises UserError, with a remedy, where nothing is used."""
    ledger = Counter() if ledger is None else ledger
    ledger.update(+counts)  # without zeros
    if not counts["used"]:
        reasons = [key for key, _ in counts.most_common() if key in REMEDIES]
        raise UserError(": ".join([f"{problem} in {account(ledger)}", *map(REMEDIES.get, reasons[:1])]))


def why_empty(there: Counter[str], what: str, wanted: str) -> str:
    """Why no row is in the wanted split, genre or part (`what`), where the rows that there are fell."""
    counts = ", ".join(f"{n:,} in {name or 'none'}" for name, n in there.most_common(8))
    found = f"no row is in the {what} {wanted}: of {there.total():,} rows there are {counts}"
    if what != "split":
        return f"{found}: choose another {what}, or add rows"
    return (
        f"{found}. A hash of a row's prompt, or of its text without one, puts it into train, val or test, "
        "8 to 1 to 1: add rows with other prompts (50 different ones nearly always fill each split)"
    )

"""A source's records as a whole: their splits, their genres, and the account of all its rows."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from minirlhf import UserError
from minirlhf.support import cli
from minirlhf.support.ledger import why_empty


def _key(prompt: str, text: str) -> str:
    """What decides where a record goes: its prompt, or its text where there is none [D15].

    Only the words count: "Enjoy!" stays with "enjoy."; an emoticon, without any, is itself.
    """
    return " ".join(re.findall(r"\w+", (prompt or text).casefold())) or prompt or text


def split_of(prompt: str, text: str = "") -> str:
    """'train' | 'val' | 'test' (80/10/10), by a hash: all records of one prompt are in one split."""
    digest = hashlib.sha256(_key(prompt, text).encode()).hexdigest()
    return (["train"] * 8 + ["val", "test"])[int(digest, 16) % 10]


def part_of(record: Any) -> str:
    """'a' | 'b': halves of any split, by another hash, for two models that share no item."""
    key = _key(record.prompt, record.texts[0])
    return "ab"[hashlib.sha256(("part " + key).encode()).digest()[0] % 2]


@dataclass(frozen=True)
class Dataset:
    """The records of a source; its ledger says what became of each row (see ledger.py)."""

    name: str
    kind: str
    records: list  # of Response or of Preference
    sources: list[str]
    sha256: str  # of the content, decompressed
    ledger: Counter[str]
    skipped: Sequence[str] = ()  # what was wrong with the first rows that were skipped
    note: str = ""  # who rated, and on which scale
    remarks: Sequence[str] = ()  # columns and files that are not used

    def describe(self) -> str:
        """One line: what was detected, and what of the source is not used; account() says the rest."""
        found = f"{self.name}: {len(self.records):,} {self.kind} rows{self.note}"
        return "; ".join([found, *self.remarks, f"sha256 {self.sha256[:12]}"])

    def genres_among(self, wanted: Sequence[str]) -> Sequence[str] | None:
        """`wanted` where the rows have genres at all, else None: no choice to make.

        Raises UserError where the command line makes one nevertheless.
        """
        if any(_genre(r) for r in self.records):
            return wanted
        cli.refuse_unread(("--genres", "--genre"), f"with {self.name}, whose rows have no genre")
        return None

    def select(
        self, split: str | None = None, genres: Sequence[str] | None = None, part: str = "all"
    ) -> Dataset:
        """The records of a split, of some genres and of a part ('a' or 'b'); None and 'all': of any.

        Its own ledger counts the others as left.  Raises UserError where no record is there.
        """
        found = replace(self, ledger=self.ledger.copy())
        if genres is not None:
            found = found._only("genre", genres, [_genre(r) for r in found.records])
        if split is not None:
            found = found._only("split", [split], [split_of(r.prompt, r.texts[0]) for r in found.records])
        if part != "all":
            found = found._only("part", [part], [part_of(r) for r in found.records])
        return found

    def _only(self, what: str, wanted: Sequence[str], values: list[str]) -> Dataset:
        kept = [r for r, value in zip(self.records, values, strict=True) if value in wanted]
        if not kept:
            raise UserError(f"{self.name}: {why_empty(Counter(values), what, ' or '.join(wanted))}")
        left = Counter({f"left: other {what}s": len(values) - len(kept)})
        return replace(self, records=kept, ledger=self.ledger + left)


def _genre(record: Any) -> str:
    return getattr(record, "genre", "")

"""The data's own rows, as reward functions see them, and which of their fields a function reads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from minirlhf import UserError
from minirlhf.support.dataset import Dataset
from minirlhf.support.text import one_line

EVERYTHING = "*"  # among the columns that are read: a function that does not say which it reads
Check = Callable[[Any], object]  # of a value; raises ValueError for one that the function cannot use


class MissingField(KeyError):
    """A row was asked for a field that it does not have; the message is "file:line: field: missing"."""

    def __str__(self) -> str:
        return str(self.args[0])


class OwnRow(dict):
    """A row as its file holds it, without nulls, and what --fields renames under our names, too.

    `where` is "file:line".  To ask for a field that is not there raises MissingField.
    """

    def __init__(self, columns: dict[str, Any], where: str = ""):
        super().__init__((name, value) for name, value in columns.items() if value is not None)
        self.where = where

    def __missing__(self, field: str) -> Any:
        raise MissingField(f"{self.where or 'a row'}: {field}: missing")

    def copy(self) -> OwnRow:
        """A deep copy: what is done to it changes nothing here."""
        return OwnRow(copy.deepcopy(dict(self)), self.where)


@dataclass(frozen=True)
class Needs:
    """What a reward function reads of a row: its attribute `fields`, a tuple of names or {name: Check}.

    A name may be a tuple of names, of which one must be there; without the attribute it may read any.
    """

    function: str  # its name, as --reward gives it
    fields: dict[tuple[str, ...], Check | None] | None

    @classmethod
    def of(cls, name: str, function: Any) -> Needs:
        said = getattr(function, "fields", None)
        if said is None:
            return cls(name, None)
        said = (said,) if isinstance(said, str) else said
        try:
            checks = said if isinstance(said, dict) else dict.fromkeys(said)
            found = {(f,) if isinstance(f, str) else tuple(f): check for f, check in checks.items()}
        except TypeError:
            raise UserError(f"--reward {name}: its attribute `fields` must hold names of fields") from None
        return cls(name, found)

    def check(self, row: OwnRow) -> None:
        """Raises UserError("field: reason") for a row that the function cannot judge by."""
        for names, check in (self.fields or {}).items():
            there = [name for name in names if name in row]
            if not there:
                raise UserError(f"{' or '.join(names)}: missing, which --reward {self.function} reads")
            try:
                if check:
                    check(row[there[0]])
            except Exception as error:  # a check may be anybody's code
                raise UserError(f"{there[0]}: {one_line(error)}, for --reward {self.function}") from None


Reads = Sequence[Needs]  # of all functions that take rows; (): rows are not kept


def columns_read(reads: Reads) -> set[str]:
    """The columns that somebody reads; EVERYTHING among them where somebody may read any."""
    found: set[str] = set()
    for needs in reads:
        found |= {EVERYTHING} if needs.fields is None else {n for names in needs.fields for n in names}
    return found


def own_row(columns: dict[str, Any], where: str, reads: Reads) -> OwnRow:
    """The row that reward functions will see.  Raises UserError where it lacks what one of them reads."""
    row = OwnRow(columns, where)
    for needs in reads:
        needs.check(row)
    return row


def with_rows(dataset: Dataset, reads: Reads) -> Dataset:
    """A built-in dataset whose records have rows: what is known of each, its prompt in any case."""
    if not reads:
        return dataset
    records = []
    for number, record in enumerate(dataset.records, 1):
        known = {f.name: getattr(record, f.name) for f in fields(record) if f.compare}
        columns = {k: v for k, v in known.items() if v not in ("", ()) or k == "prompt"}
        try:
            records.append(replace(record, row=own_row(columns, f"{dataset.name}:{number}", reads)))
        except UserError as error:
            raise UserError(f"{dataset.name}:{number}: {error}") from None
    return replace(dataset, records=records)


def rows_of(records: Sequence[Any] | None, name: str, count: int) -> list[OwnRow]:
    """Copies of the rows of `count` records, for the function `name`."""
    if records is None or any(record.row is None for record in records):
        raise UserError(f"--reward {name}: reads rows, and none came with the texts: see data.load(reads=)")
    if len(records) != count:
        raise ValueError(f"{len(records)} rows for {count} texts")
    return [record.row.copy() for record in records]

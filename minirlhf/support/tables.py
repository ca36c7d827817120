"""Files that hold a table and not lines: .json, read as a whole, and .parquet, read in batches."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from minirlhf import UserError
from minirlhf.support.formats import COLUMNS, check
from minirlhf.support.rows import EVERYTHING

Rows = Iterator[tuple[int, Any]]  # (number, what columns_of() takes)
BATCH = 64  # rows of a Parquet file in memory at a time
EXPECTED = "expected an array of objects, or an object with one list of them, such as {data: [...]}"


def json_rows(name: str, blocks: Iterable[bytes], ours: set[str]) -> Rows:
    """(number, row) of a .json file: an array, an object that holds one, or lines of objects.

    `ours`: an object with one of these keys is a row itself.  Raises UserError for anything else.
    """
    content = b"".join(blocks).removeprefix(b"\xef\xbb\xbf")  # a byte order mark
    try:
        found = json.loads(content.decode())
    except UnicodeError as error:
        raise UserError(f"{name}: not UTF-8: {error}") from None
    except (ValueError, RecursionError) as error:
        lines = [(n, line) for n, line in enumerate(content.split(b"\n"), 1) if line.strip()]
        if len(lines) > 1 and _is_object(lines[0][1]):
            yield from lines  # JSON lines under another name, which many tools write
            return
        check(lines, f"{name}: the file is empty")
        raise UserError(f"{name}: not JSON: {error}: {EXPECTED}") from None
    if isinstance(found, dict) and ours & found.keys():
        found = [found]
    if isinstance(found, dict):
        lists = [key for key, value in found.items() if _is_table(value)]
        there = f"{len(lists)} such lists: {', '.join(lists)}" if lists else f"the keys {sorted(found)}"
        check(len(lists) == 1, f"{name}: {EXPECTED}; found {there:.200}")
        found = found[lists[0]]
    check(isinstance(found, list), f"{name}: {EXPECTED}; found {found!r:.40}")
    yield from enumerate(found, 1)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def parquet_rows(file: Path, name: str, theirs: set[str], limit: int) -> Rows:
    """(number, row) of a Parquet file: only the columns that formats know, and those named in `theirs`.

    Other columns are not read, whatever they hold, unless EVERYTHING is in `theirs`; then they may be
    damaged.  Raises UserError for a file that cannot be read, and for one that unpacks to more than `limit`
    bytes.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        remedy = "pip install 'minirlhf[hub]'"
        raise UserError(f"{name}: reading Parquet needs the pyarrow package: {remedy}") from None
    too_large = f"{name}: holds more than {limit:,} bytes: split it first"
    failures = (pyarrow.ArrowException, OSError, ValueError, KeyError, NotImplementedError, OverflowError)
    number, size = 1, 0
    try:
        with parquet.ParquetFile(file, buffer_size=1 << 20) as table:
            there = table.schema_arrow.names
            needed = COLUMNS | theirs
            wanted = [c for c in dict.fromkeys(there) if c in needed or EVERYTHING in theirs]
            check(wanted, f"{name}: columns: {sorted(there)!r:.200} match no format: see --fields")
            twice = [column for column in wanted if there.count(column) > 1]
            check(not twice, f"{name}: {len(twice)} columns are there twice: {', '.join(twice):.100}")
            # Of groups: metadata of columns, where they are damaged, end the process inside of pyarrow.
            groups = map(table.metadata.row_group, range(table.num_row_groups))
            check(sum(group.total_byte_size for group in groups) <= limit, too_large)
            for batch in table.iter_batches(BATCH, columns=wanted, use_threads=False):
                size += batch.nbytes
                check(size <= limit, too_large)
                columns = [(column, batch.column(column)) for column in wanted]
                for i in range(batch.num_rows):
                    yield number, _row(columns, i, failures, needed)
                    number += 1
    except failures as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name}: cannot be read: {reason:.200}") from None


def _row(
    columns: list[tuple[str, Any]], i: int, failures: tuple, needed: set[str]
) -> dict[str, Any] | UserError:
    found = {}
    for name, values in columns:
        try:
            found[name] = plain(values[i].as_py())
        except failures as error:  # bytes that are no text, a date beyond Python's
            if name in needed:
                return UserError(f"{name}: cannot be read: {error!s:.100}")
    return found


def plain(value: Any) -> Any:
    """A Parquet value as JSON would hold it: no nan, no nulls inside structs, maps as objects."""
    if isinstance(value, float):
        return None if value != value else value
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items() if v is not None}
    if isinstance(value, list) and value and all(_is_entry(entry) for entry in value):
        return {key: plain(v) for key, v in value if v is not None}
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    if isinstance(value, Decimal) and value.is_finite():
        return int(value) if value == value.to_integral_value() else float(value)
    return value.item() if hasattr(value, "item") else value


def _is_entry(entry: Any) -> bool:
    """An entry of a map, which pyarrow returns as a list of pairs."""
    return isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)

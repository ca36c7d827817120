"""Files to rows: a file, a folder or a pipe, read within limits, and what became of each of its rows."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib
import math
import os
import stat
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from io import BufferedReader
from itertools import chain
from pathlib import Path
from typing import Any

from minirlhf import UserError
from minirlhf.support.formats import COLUMNS, Fields, Row, Scale, check, parse
from minirlhf.support.ledger import account
from minirlhf.support.rows import EVERYTHING, Reads, columns_read, own_row
from minirlhf.support.shapes import JUDGED, Drop, Names, columns_of, names_of, rows_of
from minirlhf.support.tables import Rows, json_rows, parquet_rows

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".txt")
KINDS = ".jsonl, .jsonl.gz, .json, .json.gz, .parquet or .txt"
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # of Hugging Face
USUAL_SCALES = ((1, 5), (0, 4), (-4, 4), (1, 10), (0, 10))
MAX_MESSAGES = 100  # about skipped rows
BLOCK = 1 << 20  # bytes per read
# A small .gz file can hold terabytes.  Text shrinks 3 to 20 times; what grows 200 times and more is refused.
MAX_BYTES, FREE_BYTES, MAX_RATIO = 2 << 30, 64 << 20, 200


def shown(path: object) -> str:
    """A path as it can be printed in one line: control characters and bytes that are no text as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(path))


def read(
    path: str | Path,
    skip_bad: bool = False,
    scale: Scale | None = None,
    fields: Sequence[str] = (),
    reads: Reads = (),
) -> tuple[list[Fields], dict[str, Any]]:
    """(the rows of a source, what else a Dataset holds): all rows are of one kind and on one scale.

    `scale` is that of ratings which record none; `fields` are the words of --fields; `reads` is what reward
    functions read, for whom the rows themselves are kept.  Raises UserError('file:line: field: reason') for a
    bad row, unless `skip_bad` counts it and goes on, and where no row is left.  In a .json or .parquet file
    the number is that of the row.
    """
    check(str(path), "the source of the data has an empty name: name a file, a folder, vader or toy")
    name, names, scale = shown(path), names_of(fields), tuple(scale) if scale else None
    if str(path).startswith("hub:"):
        files, recorded = importlib.import_module("minirlhf.interop.hub").dataset_files(str(path))
        others = []
    else:
        files, others = files_of(Path(path))
        recorded = [*map(str, files)]
    rows, skipped, first = [], [], None
    ledger, remarks, digest = Counter(), Counter(), hashlib.sha256()
    sets_of_columns: dict[tuple, tuple] = {}  # each once, however many rows it is from
    of_rewards = columns_read(reads)
    for file in files:
        for where, columns, row in _rows_in(file, digest, names, scale, of_rewards):
            ledger["rows"] += 1
            try:
                if isinstance(row, UserError):
                    raise row
                if isinstance(row, Drop):
                    ledger[str(row)] += 1
                    continue
                row.read |= row.columns.keys() if EVERYTHING in of_rewards else of_rewards
                kind, record, unused = _parsed(row, scale)
                first = first or (kind, record.get("scale"))
                if (kind, record.get("scale")) != first:
                    _refuse_other(row, kind, record.get("scale"), *first)
                if reads:
                    renamed = {ours: row.columns[ours] for ours in names if ours in row}
                    record["row"] = own_row(columns | renamed, where, reads)
            except (UserError, RecursionError) as error:  # RecursionError: from showing a deeply nested value
                if not skip_bad:
                    raise UserError(f"{where}: {error}") from None
                ledger["skipped: malformed"] += 1
                if len(skipped) < MAX_MESSAGES:
                    skipped.append(f"{where}: {error}")
                continue
            remarks.update(unused)
            if reason := _teaches_nothing(record):
                ledger[f"dropped: {reason}"] += 1
            else:
                used = row.used()
                columns = sets_of_columns.setdefault(used, used)
                rows.append(record | {"where": where, "columns": columns})
    if not rows:
        raise UserError("; ".join([f"{name}: no usable row: {account(ledger)}", *skipped[:1]]))
    kind, scale = first
    note = ""
    if kind == "rated":
        note = f" on the scale {scale}" if scale else f" on the scale {_infer_scale(name, rows)} (inferred)"
    notes = [f"{remark} ({n:,} rows)" for remark, n in sorted(remarks.items())]
    notes += [f"the first bad row: {message}" for message in skipped[:1]]
    if others:
        names = ", ".join(others[:3]) + ", ..." * (len(others) > 3)
        notes.append(f"passed over {len(others):,} other files: {names}")
    about = {"name": name, "kind": kind, "sources": recorded, "sha256": digest.hexdigest()}
    return rows, about | {"ledger": ledger, "skipped": skipped, "note": note, "remarks": notes}


def _rows_in(
    file: Path, digest: Any, names: Names, scale: Scale | None, more: Collection[str] = ()
) -> Iterator[tuple[str, dict[str, Any], Row | UserError | Drop]]:
    """("file:number", its columns, a row under our names or what is wrong with it) of all rows of a file."""
    name, plain = shown(file), file.name.endswith(".txt")
    for number, raw in raw_rows(file, digest, names, more):
        columns = {}
        try:
            columns = columns_of(raw, plain)
            rows = rows_of(columns, names, scale)
        except (UserError, RecursionError) as error:
            rows = [error if isinstance(error, UserError) else UserError("row: nested too deeply")]
        for row in rows:
            yield f"{name}:{number}", columns, row


def raw_rows(file: Path, digest: Any, names: Names, more: Collection[str] = ()) -> Rows:
    """(number, row as the file holds it) of a file of any kind; `digest` is updated with its bytes.

    Of a Parquet file the columns are read that formats know, and those that `names` or `more` name.
    """
    theirs = {*more, *names.values(), *(name.split(".")[0] for name in names.values())}
    if file.name.endswith((".json", ".json.gz")):
        with opened(file) as raw:
            yield from json_rows(shown(file), _blocks(file, raw, digest), COLUMNS | theirs)
    elif file.name.endswith(".parquet"):
        check(file.is_file(), f"{shown(file)}: a Parquet file cannot be read from a pipe: save it first")
        with opened(file) as raw:
            size = sum(map(len, _blocks(file, raw, digest)))
        yield from parquet_rows(file, shown(file), theirs, max(FREE_BYTES, MAX_RATIO * size))
    else:
        yield from lines_of(file, digest)


@contextlib.contextmanager
def opened(file: Path) -> Iterator[BufferedReader]:
    """A file's bytes; a file that cannot be read is a UserError."""
    try:
        with open(file, "rb") as raw:
            yield raw
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{shown(file)}: cannot be read: {_reason(error)}") from None


def _parsed(row: Row, scale: Scale | None) -> tuple[str, Fields, list[str]]:
    """What parse() says of a row; an error names the columns as the file does."""
    try:
        return parse(row, scale)
    except UserError as error:
        raise UserError(row.in_the_files_words(str(error))) from None


def _teaches_nothing(fields: Fields) -> str | None:
    """Why a row teaches nothing; None if it does teach something."""
    if "chosen" in fields:  # identical pairs: [D15]
        return "identical pairs" if fields["chosen"].strip() == fields["rejected"].strip() else None
    return None if (fields["prompt"] + fields["response"]).strip() else "empty texts"


def _refuse_other(
    row: Row, kind: str, scale: Scale | None, first_kind: str, first_scale: Scale | None
) -> None:
    nulls = [field for field in JUDGED if field in row.nulls]
    hint = f" ({nulls[0]} is null here: --fields {nulls[0]}={nulls[0]} drops such rows)" if nulls else ""
    check(kind == first_kind, f"keys: a {kind} row after {first_kind} rows: keep one kind in a source{hint}")
    check(scale == first_scale, f"scale: {scale} after rows with {first_scale}: keep one scale in a source")


def _infer_scale(name: str, rows: list[Fields]) -> Scale:
    """The first usual scale that holds all ratings, which is recorded on the rows."""
    low, high = min(min(row["ratings"]) for row in rows), max(max(row["ratings"]) for row in rows)
    scale = next((s for s in USUAL_SCALES if s[0] <= low and high <= s[1]), None)
    check(scale, f"{name}: rating: {low:g} to {high:g} is no usual scale: record `scale` on the rows")
    for row in rows:
        row["scale"] = scale
    return scale


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def files_of(path: Path) -> tuple[list[Path], list[str]]:
    """(the files of a source, the names in a folder that are no such files).

    A source is a file, a folder (its files by name, without those that begin with a dot), or a pipe of JSON
    lines.  Raises UserError for everything else.
    """
    try:
        mode = path.stat().st_mode
        inside = sorted(path.iterdir()) if stat.S_ISDIR(mode) else []
    except FileNotFoundError:
        raise UserError(f"{shown(path)}: no such file or folder (built in: vader, toy)") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{shown(path)}: cannot be read: {_reason(error)}") from None
    if stat.S_ISDIR(mode):
        inside = [p for p in inside if not p.name.startswith(".")]
        files = [p for p in inside if p.name.endswith(SUFFIXES) and not p.is_dir()]
        files = [p for p in files if p.name not in METADATA]
        check(files, f"{shown(path)}: the folder holds no {KINDS} file")
        return files, [shown(p.name) for p in inside if p not in set(files)]
    device = stat.S_ISCHR(mode) or stat.S_ISBLK(mode)
    check(not device, f"{shown(path)}: a terminal or a device holds no rows: pipe them in, or name a file")
    # Streams have no suffix: pipes, and files under the names /dev/stdin (`< file`) and /dev/fd/N.
    known = (
        not stat.S_ISREG(mode) or str(path).startswith(("/dev/", "/proc/")) or path.name.endswith(SUFFIXES)
    )
    check(known, f"{shown(path)}: expected {KINDS}, or a folder of them")
    return [path], []


def lines_of(file: Path, digest: Any) -> Iterator[tuple[int, bytes]]:
    """(number, line) of each line that is not blank; `digest` is updated with all bytes, decompressed.

    Raises UserError for a file that cannot be read, or that decompresses to more than a text would.
    """
    number, parts = 1, []  # of the line under way: its number, and what earlier blocks hold of it
    with opened(file) as raw:
        for block in chain(_blocks(file, raw, digest), [b"\n"]):
            if block.isspace() and not parts:
                whole, rest = [], block.rpartition(b"\n")[2]
                number += block.count(b"\n")
            else:
                *whole, rest = block.split(b"\n")
            if whole:
                whole[0], parts = b"".join([*parts, whole[0]]), []
            for line in whole:
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
                if line and not line.isspace():
                    yield number, line.rstrip(b"\r")
                number += 1
            parts += [rest] if rest else []


def _blocks(file: Path, raw: BufferedReader, digest: Any) -> Iterator[bytes]:
    """The bytes of a file, decompressed, in blocks.  Raises UserError for more than its size can explain."""
    about, total = os.fstat(raw.fileno()), 0
    zipped = file.name.endswith(".gz")
    if not file.name.endswith(SUFFIXES):
        zipped = raw.peek(2)[:2] == b"\x1f\x8b"
    limit: float = MAX_BYTES
    if stat.S_ISREG(about.st_mode):
        limit = min(MAX_BYTES, max(FREE_BYTES, MAX_RATIO * about.st_size)) if zipped else math.inf
    if zipped and math.isfinite(limit) and raw.seekable():  # counted first: rows take more memory than bytes
        with gzip.GzipFile(fileobj=raw) as unpacked:
            while block := unpacked.read(BLOCK):
                total += len(block)
                _refuse_larger(file, total, limit)
        raw.seek(0)
        total = 0
    stream = gzip.GzipFile(fileobj=raw) if zipped else raw
    while block := stream.read(BLOCK):
        total += len(block)
        _refuse_larger(file, total, limit)
        digest.update(block)
        yield block


def _refuse_larger(file: Path, size: int, limit: float) -> None:
    check(size <= limit, f"{shown(file)}: holds more than {limit:,} bytes: unpack or split it first")

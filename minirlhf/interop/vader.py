"""The built-in dataset `vader`: human ratings of 31,000 sentences and words, out of a package's sources.

The ratings are those of Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of
Social Media Text" (ICWSM 2014; MIT licence).  pip fetches them by pinned version and sha256; named members
are read in memory, and the cleaned rows are cached.
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import os
import re
import tarfile
import tempfile
import zlib
from collections import Counter
from itertools import product
from pathlib import Path

from minirlhf import UserError
from minirlhf.data import Dataset, Response
from minirlhf.interop.fetch import download
from minirlhf.support.files import write_atomically
from minirlhf.support.formats import check

SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
PACKAGE, SDIST = "vaderSentiment==3.3.2", "vaderSentiment-3.3.2.tar.gz"
MAX_MEMBER = 16 << 20  # bytes; the largest real member has 2.3 MB
GENRES = {"movies": "movieReviewSnippets", "products": "amazonReviewSnippets", "tweets": "tweets"}
GENRES |= {"editorials": "nytEditorialSnippets"}  # genre -> files; a fifth genre, "words", is the lexicon
CACHE_FORMAT = 2  # raise it whenever the cached rows change
REASONS = {
    "mismatched": "two texts under one id",
    "duplicate": "duplicate texts",
}  # of the cache -> of the ledger

Rows = list[tuple[str, list[int], str]]  # text, ratings, genre


def load(data_dir: str | Path | None = None) -> Dataset:
    """The dataset, from the cache in `data_dir` (left out: the user's cache folder) or fetched into it.

    Raises UserError where the source cannot be had, is damaged or cannot be cached.
    """
    folder = Path(data_dir or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "minirlhf"))
    cache = folder / "vader.jsonl"
    head, body = _read(cache) or _write(cache, *_rows(_tables(_sdist(folder))))
    rows = map(json.loads, body.splitlines())
    records = [Response("", text, sum(r) / len(r), tuple(r), (-4, 4), genre) for text, r, genre in rows]
    ledger = Counter({"rows": len(records) + sum(head["dropped"].values())})
    ledger |= Counter({f"dropped: {REASONS[reason]}": n for reason, n in head["dropped"].items()})
    note = " by human raters"
    return Dataset("vader", "rated", records, [str(cache)], head["body"], ledger, note=note)


def _stamp(body: bytes) -> dict:
    return {"format": CACHE_FORMAT, "source": SHA256, "body": hashlib.sha256(body).hexdigest()}


def _read(cache: Path) -> tuple[dict, bytes] | None:
    """The head and the rows of the cache; None if it is absent, older or damaged."""
    try:
        line, body = cache.read_bytes().split(b"\n", 1)
        head = json.loads(line)
        fresh = head == head | _stamp(body) and set(head["dropped"]) <= set(REASONS)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return (head, body) if fresh else None


def _write(cache: Path, rows: Rows, dropped: dict[str, int]) -> tuple[dict, bytes]:
    body = "".join(json.dumps(row) + "\n" for row in rows).encode()
    head = _stamp(body) | {"dropped": dropped}
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cache, json.dumps(head).encode() + b"\n" + body)
    except OSError as e:
        raise UserError(f"{cache}: cannot be written: {e.strerror}: see --data-dir") from None
    return head, body


def _sdist(folder: Path) -> bytes:
    """The source distribution, from `folder` or fetched by pip.  Its hash is verified before its use."""
    with tempfile.TemporaryDirectory() as temporary:
        path, reason = folder / SDIST, ""
        if not path.exists():
            path = Path(temporary, SDIST)
            reason = download(Path(temporary), {PACKAGE: SHA256}, "--no-binary", "vaderSentiment")
        way_out = f"use --data toy, or put {SDIST} into --data-dir"
        check(path.exists(), f"vader: cannot be fetched ({reason}): {way_out}")
        content = path.read_bytes()
    same = hashlib.sha256(content).hexdigest() == SHA256
    check(same, f"{path}: sha256 is not {SHA256}: delete it")
    return content


def _tables(sdist: bytes) -> dict[str, list[list[str]]]:
    """The tables we need, name -> rows of cells.

    They are read in memory, by full name, and nothing is unpacked: no path or link in an archive can do harm.
    """
    outer = ["additional_resources/hutto_ICWSM_2014.tar.gz", "vaderSentiment/vader_lexicon.txt"]
    stems = product(GENRES.values(), ("GroundTruth", "anonDataRatings"))
    inner = [f"{stem}_{table}.txt" for stem, table in stems]
    found = _members(sdist, "vaderSentiment-3.3.2", outer)
    found |= _members(found.pop(outer[0]), "hutto_ICWSM_2014", inner)
    texts = {
        Path(name).stem: blob.decode("utf-8-sig") for name, blob in found.items()
    }  # one begins with a BOM
    return {stem: [line.split("\t") for line in text.splitlines()] for stem, text in texts.items()}


def _members(archive: bytes, root: str, names: list[str]) -> dict[str, bytes]:
    found = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            for name in names:
                member = tar.getmember(f"{root}/{name}")
                good = member.isreg() and member.size <= MAX_MEMBER
                check(good, f"{SDIST}: {name}: a link or too large")
                found[name] = tar.extractfile(member).read()
    except (tarfile.TarError, OSError, EOFError, zlib.error, KeyError) as e:
        raise UserError(f"{SDIST}: damaged: {e}") from None
    return found


def _rows(tables: dict[str, list[list[str]]]) -> tuple[Rows, dict[str, int]]:
    """(the rows, how many were dropped for which reason)."""
    found, mismatched = [], 0
    for genre, stem in GENRES.items():
        ratings = {row[0]: row for row in tables[f"{stem}_anonDataRatings"]}  # by id: one is in another order
        for key, mean, text in tables[f"{stem}_GroundTruth"]:
            # In 196 tweets, one id names two different items: their means differ.
            if abs(float(mean) - float(ratings[key][1])) < 0.01:
                found.append((clean(text), json.loads(ratings[key][3]), genre))
            else:
                mismatched += 1
    # A word has a space before it, as inside a sentence: to a BPE, "good" and " good" are two tokens.
    found += [(f" {word}", json.loads(scores), "words") for word, _, _, scores in tables["vader_lexicon"]]
    first = {row[0]: row for row in reversed(found)}  # of equal texts the first stays
    return [*first.values()][::-1], {"mismatched": mismatched, "duplicate": len(found) - len(first)}


def clean(text: str) -> str:
    """The text with quotation marks for '' (of three ' the last two), without HTML entities and spare spaces.

    Some entities were escaped twice.
    """
    return " ".join(re.sub(r"''(?!')", '"', html.unescape(html.unescape(text))).split())

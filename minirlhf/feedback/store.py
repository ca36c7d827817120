"""The store of items and judgements: one SQLite file that only grows.

Everything that people do (vote, skip, undo) is a row of `events`; a trigger refuses to change or remove one.
`current` follows from the events: the latest judgement of each rater on each item, written in the same
transaction.  A rater holds at most one lease: the item before them.  An acknowledged vote is on the disk
(WAL, synchronous=FULL).

The order in which a pair is shown depends on the store's seed, the item and the rater alone; a repeat has the
other order.
"""

import hashlib
import json
import math
import os
import random
import re
import secrets
import sqlite3
import threading
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import TypeVar

from minirlhf import UserError
from minirlhf.support.files import fsync
from minirlhf.support.text import one_line

Result = TypeVar("Result")
APPLICATION, FORMAT = 0x6D726C66, 1
SCALE = (1, 5)  # of ratings
CHOICES = ("a", "b", "tie", "bad")  # bad: neither is acceptable
LIMITS = {"rater": 40, "note": 2000}  # characters
JOINERS = "\u200c\u200d"  # part of a word in scripts whose letters join or stack, and invisible in all others
JOINING_SCRIPTS = ["ARABIC", "SYRIAC", "MANDAIC", "NKO", "MONGOLIAN", "DEVANAGARI", "BENGALI", "GURMUKHI"]
JOINING_SCRIPTS += ["GUJARATI", "ORIYA", "TAMIL", "TELUGU", "KANNADA", "MALAYALAM", "SINHALA", "TIBETAN"]
JOINING_SCRIPTS += ["MYANMAR", "KHMER", "BALINESE", "JAVANESE"]
DAMAGED = "go back to a copy of the store"
SCHEMA = f"""
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = {FORMAT};
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE items (
    id TEXT PRIMARY KEY, mode TEXT NOT NULL CHECK (mode IN ('pair', 'rating')),
    prompt TEXT NOT NULL, a TEXT NOT NULL, b TEXT, gold TEXT, source TEXT NOT NULL,
    place INTEGER NOT NULL,              -- random, the same for all raters: they meet on the same items
    votes INTEGER NOT NULL DEFAULT 0     -- raters whose current judgement is a vote
);
CREATE INDEX waiting ON items (gold, mode, votes DESC, place);
CREATE TABLE events (
    id INTEGER PRIMARY KEY, at REAL NOT NULL, kind TEXT NOT NULL CHECK (kind IN ('vote', 'skip', 'undo')),
    rater TEXT NOT NULL, item TEXT NOT NULL REFERENCES items, repeat INTEGER NOT NULL,
    lease TEXT UNIQUE,                   -- a lease is used once: a replayed vote has no place to go
    data TEXT NOT NULL
);
CREATE INDEX judged ON events (rater, item, repeat);
CREATE TRIGGER no_update BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'events are append-only'); END;
CREATE TRIGGER no_delete BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'events are append-only'); END;
CREATE TABLE current (
    rater TEXT NOT NULL, item TEXT NOT NULL, repeat INTEGER NOT NULL,
    event INTEGER NOT NULL REFERENCES events, PRIMARY KEY (rater, item, repeat)
) WITHOUT ROWID;
CREATE TABLE leases (
    rater TEXT PRIMARY KEY, lease TEXT NOT NULL, item TEXT NOT NULL REFERENCES items, repeat INTEGER NOT NULL,
    opened REAL NOT NULL, expires REAL NOT NULL
);
"""


TEXT, WHOLE, NUMBER = "'text'", "'integer'", "'real', 'integer'"
TYPES = {  # SQLite accepts any value in any column
    "meta": {"key": TEXT, "value": TEXT},
    "items": {"id": TEXT, "mode": TEXT, "prompt": TEXT, "a": TEXT, "b": "'text', 'null'", "source": TEXT}
    | {"gold": "'text', 'null'", "place": WHOLE, "votes": WHOLE},
    "events": {"at": NUMBER, "kind": TEXT, "rater": TEXT, "item": TEXT, "repeat": WHOLE, "data": TEXT},
    "current": {"rater": TEXT, "item": TEXT, "repeat": WHOLE, "event": WHOLE},
    "leases": {
        "rater": TEXT,
        "lease": TEXT,
        "item": TEXT,
        "repeat": WHOLE,
        "opened": NUMBER,
        "expires": NUMBER,
    },
}


class Refused(UserError):
    """A judgement that is not taken.  `why`: 'unknown', 'foreign', 'replayed' or 'taken'."""

    def __init__(self, why: str, message: str):
        super().__init__(message)
        self.why = why


@dataclass(frozen=True)
class Policy:
    """Who gets which item; 0 switches gold items or repeats off."""

    raters: int = 3  # votes that each item is to have, each from another person
    lease: float = 15.0  # minutes that an item is kept for one rater while others wait for it
    gold_every: int = 10  # one judgement of this many is of an item whose answer is known
    repeat_every: int = 10  # one judgement of this many is of an item that the rater has judged before


def plain(value: object, field: str, limit: int) -> str:
    """The value, if it is text that can be stored; UserError for anything else."""
    if not isinstance(value, str) or len(value) > limit:
        raise UserError(f"{field}: expected text of at most {limit:,} characters")
    if re.search("[\ud800-\udfff\0]", value):
        raise UserError(f"{field}: holds a NUL or half a surrogate pair, which is no text")
    return value


def rater_name(value: object) -> str:
    """'  Ann  Lee ' -> 'ann lee', so that a rater who writes other capitals on a telephone is the same rater.

    Raises UserError for no name, and for a character that nobody can see, which it names.  A zero-width
    joiner or non-joiner is accepted between two letters of a script that needs it.
    """
    name = " ".join(unicodedata.normalize("NFKC", plain(value, "rater", LIMITS["rater"])).casefold().split())
    if not name:
        raise UserError("rater: expected a name")
    for before, character, after in zip(" " + name, name, name[1:] + " ", strict=False):
        called = f"U+{ord(character):04X} {unicodedata.name(character, '')}".strip()
        if character in JOINERS:
            if not (_script(before) == _script(after) in JOINING_SCRIPTS):
                raise UserError(
                    f"rater: {called}: only stands between letters of scripts such as Arabic and Devanagari"
                )
        elif not character.isprintable():
            raise UserError(f"rater: {called}: cannot be part of a name")
    return name


def _script(character: str) -> str:
    """'ARABIC' for an Arabic letter or mark; '' for what is neither letter nor mark."""
    if unicodedata.category(character)[0] not in "LM":
        return ""
    return unicodedata.name(character, "").partition(" ")[0]


def make_private(path: Path) -> None:
    """Make a file that its owner alone can read, if there is none: it holds the key of raters' sessions."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise UserError(f"{path}: cannot be made: {error.strerror}") from None


def check_answer(mode: str, answer: object) -> tuple[str, dict]:
    """(kind, data) of an answer, in the order in which the texts were shown.

    {choice: left|right|tie|bad, strength?: 1|2} for a pair, {rating: 1..5} for a text, {skip: true} for
    either; each with {note?, seconds?}.  Raises UserError('field: reason').
    """
    if not isinstance(answer, dict):
        raise UserError("answer: expected an object")
    what = "skip" if answer.get("skip") is True else mode
    wanted = {"skip": {"skip"}, "pair": {"choice", "strength"}, "rating": {"rating"}}[what]
    if unknown := sorted(map(str, {*answer} - wanted - {"note", "seconds"})):
        raise UserError(f"{unknown[0][:20]}: does not belong to a {what}")
    note = plain(answer.get("note", ""), "note", LIMITS["note"]).strip()
    data = {"seconds": answer.get("seconds", 0.0)} | ({"note": note} if note else {})
    if type(data["seconds"]) not in (int, float) or not 0 <= data["seconds"] < math.inf:
        raise UserError("seconds: expected a number, 0 or more")
    if what == "skip":
        return "skip", data
    if mode == "rating":
        if type(answer.get("rating")) is not int or not SCALE[0] <= answer["rating"] <= SCALE[1]:
            raise UserError(f"rating: expected {SCALE[0]} to {SCALE[1]}")
        return "vote", {"rating": answer["rating"]} | data
    choice, strength = answer.get("choice"), answer.get("strength")
    if choice not in ("left", "right", "tie", "bad"):
        raise UserError("choice: expected left, right, tie or bad")
    if choice in ("left", "right"):
        strength = 1 if strength is None else strength
        if type(strength) is not int or strength not in (1, 2):
            raise UserError("strength: expected 1 (better) or 2 (much better)")
        return "vote", {"choice": choice, "strength": strength} | data
    if strength is not None:
        raise UserError("strength: belongs to left and right")
    return "vote", {"choice": choice} | data


def written(method: Callable) -> Callable:
    """A method of Store whose work is one transaction."""

    @wraps(method)
    def call(self: "Store", *args, **options):
        return self.write(partial(method, self, *args, **options))

    return call


class Store:
    """One connection that writes and one that reads, for all threads.

    Other processes (a terminal rater, an export, a second server) share the file through SQLite's own locks:
    all that decides who gets which item is in the file.
    """

    def __init__(
        self, path: str | Path, policy: Policy = Policy(), create: bool = False, seed: int | None = None
    ):  # noqa: B008
        self.path, self.policy, self.waiting = Path(path), policy, deque()
        self.lock, self.reading = threading.Lock(), threading.Lock()
        if not create and not self.path.is_file():
            raise UserError(
                f"{path}: no such store: make one with python -m minirlhf.feedback sample, or add"
            )
        if policy.raters < 1 or policy.gold_every < 0 or policy.repeat_every < 0 or not policy.lease > 0:
            wanted = "--raters must be 1 or more, --lease above 0, --gold-every and --repeat-every 0 or more"
            raise UserError(wanted)
        options = {"timeout": 5.0, "isolation_level": None, "check_same_thread": False}
        if create:
            make_private(self.path)
        try:
            self.db, self.reader = (sqlite3.connect(self.path, **options) for _ in range(2))
            self.db.row_factory = self.reader.row_factory = sqlite3.Row
            self._prepare(random.SystemRandom().randrange(2**31) if seed is None else seed)
        except (sqlite3.Error, UnicodeError) as e:  # SQLite's message may quote bytes that are no text
            raise UserError(f"{path}: not a store of feedback that can be opened: {one_line(e)}") from None

    def _prepare(self, seed: int) -> None:
        number = lambda name: self.db.execute(f"PRAGMA {name}").fetchone()[0]
        fresh = lambda: not number("application_id") and not number("schema_version")
        # Before anything is changed: it may be somebody else's database.
        if not fresh() and (number("application_id"), number("user_version")) != (APPLICATION, FORMAT):
            raise UserError(
                f"{self.path}: not a store of feedback, or one of another version: name another file"
            )
        self.db.execute("PRAGMA foreign_keys = ON")
        self.db.execute("PRAGMA journal_mode = WAL")
        self.db.execute("PRAGMA synchronous = FULL")  # NORMAL may lose the last commits with the power
        self.write(lambda: self._create(seed) if fresh() else None)  # asked again: two may have come at once
        self.meta = dict(tuple(row) for row in self.db.execute("SELECT key, value FROM meta"))
        self._check()

    def _check(self) -> None:
        """Raise UserError for a damaged file: pages of which SQLite can make nothing, values of a type that
        no command of ours has written."""
        found = [row[0] for row in self.db.execute("PRAGMA quick_check(1)")]
        if found != ["ok"]:
            raise UserError(f"{self.path}: damaged ({one_line(found[0], 80)}): {DAMAGED}")
        for table, kinds in TYPES.items():
            wrong = " OR ".join(f"typeof({column}) NOT IN ({kind})" for column, kind in kinds.items())
            if self.db.execute(f"SELECT 1 FROM {table} WHERE {wrong} LIMIT 1").fetchone():
                raise UserError(f"{self.path}: its table {table} is damaged: {DAMAGED}")
        if self.db.execute("SELECT 1 FROM items WHERE (mode = 'pair') != (b IS NOT NULL) LIMIT 1").fetchone():
            raise UserError(f"{self.path}: its table items is damaged: {DAMAGED}")
        if not {"seed", "secret", "guidelines"} <= self.meta.keys():
            raise UserError(f"{self.path}: its table meta is damaged: {DAMAGED}")

    def _create(self, seed: int) -> None:
        for statement in re.split(r";\n(?=PRAGMA|CREATE|$)", SCHEMA):  # executescript would commit in between
            self.db.execute(statement)
        meta = {"seed": str(seed), "secret": secrets.token_hex(32), "guidelines": ""}
        self.db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())

    def write(self, work: Callable[[], Result]) -> Result:
        """The result of `work`, once the disk has everything that it wrote.

        The thread that has the lock commits for all that wait for it, so that many raters share one wait for
        the disk.  Raises what `work` raises, having undone it alone, and sqlite3.Error where the disk is full
        or the file is locked.
        """
        job: Future[Result] = Future()
        self.waiting.append((work, job))
        with self.lock:
            if not job.done():
                self._commit([self.waiting.popleft() for _ in range(len(self.waiting))])
        return job.result()

    def _commit(self, jobs: list[tuple[Callable, Future]]) -> None:
        results = []
        try:
            self.db.execute("BEGIN IMMEDIATE")
            for work, _ in jobs:
                self.db.execute("SAVEPOINT job")
                try:
                    results.append((work(), None))
                except sqlite3.Error:
                    raise  # of the file or the disk: nobody's work is safe
                except Exception as e:
                    self.db.execute("ROLLBACK TO job")
                    results.append((None, e))
                self.db.execute("RELEASE job")
            self.db.execute("COMMIT")
        except BaseException as e:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            results = [(None, e)] * len(jobs)
        for (_, job), (result, error) in zip(jobs, results, strict=True):
            job.set_exception(error) if error else job.set_result(result)

    def rows(self, query: str, *values: object) -> list[sqlite3.Row]:
        """Rows as they are on the disk; those who write are not waited for."""
        with self.reading:
            return self.reader.execute(query, values).fetchall()

    def close(self) -> None:
        self.db.close()
        self.reader.close()

    def backup(self, out: Path) -> None:
        """Write a copy of the store, whole or not at all, while others may be writing.  Raises UserError."""
        temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
        if os.path.lexists(out):
            raise UserError(f"{out}: exists already: name another file")
        make_private(temporary)
        try:
            copy = sqlite3.connect(temporary)
            with closing(copy), self.reading:
                self.reader.backup(copy)
            Store(temporary).close()  # is it whole?
            fsync(temporary)
            os.replace(temporary, out)
        except (OSError, sqlite3.Error, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or one_line(error)
            raise UserError(f"{out}: cannot be written: {reason}") from None
        finally:
            for end in ("", "-wal", "-shm", "-journal"):
                Path(f"{temporary}{end}").unlink(missing_ok=True)

    @written
    def set_guidelines(self, text: str) -> None:
        self.db.execute("UPDATE meta SET value = ? WHERE key = 'guidelines'", [text])
        self.meta["guidelines"] = text

    # ------------------------------------------------------------------------- items

    @written
    def add(self, items: Iterable[dict]) -> tuple[int, int]:
        """Store items {mode, prompt, a, b?, gold?, source?} -> (number of new ones, of those already there).

        An item is its texts: a second import changes nothing, and a pair is the same pair the other way
        round.
        """
        counts = [0, 0]
        for item in items:
            texts = [item["a"], *([item["b"]] if item["mode"] == "pair" else [])]
            key = hashlib.sha256(
                json.dumps([item["mode"], item["prompt"], sorted(texts)]).encode()
            ).hexdigest()[:20]
            gold = None if item.get("gold") is None else str(item["gold"])
            source, place = json.dumps(item.get("source", {})), self._hash("place", key)
            values = (key, item["mode"], item["prompt"], item["a"], item.get("b"), gold, source, place)
            done = self.db.execute("INSERT OR IGNORE INTO items VALUES (?, ?, ?, ?, ?, ?, ?, ?, 0)", values)
            counts[done.rowcount == 0] += 1
        return counts[0], counts[1]

    def _hash(self, *parts: object) -> int:
        """A number below 2^62 that depends on the store's seed and the parts."""
        return int(hashlib.sha256(json.dumps([self.meta["seed"], *parts]).encode()).hexdigest(), 16) % 2**62

    def shown(self, item: str, rater: str, repeat: int) -> str:
        """'ab' or 'ba': the order in which this rater sees the pair."""
        return ("ab", "ba")[(self._hash("order", item, rater) + repeat) % 2]

    # ------------------------------------------------------------------------- a rater at work

    @written
    def next(self, rater: str, release: bool = False) -> dict | None:
        """The item before the rater, the one they left off or a new one; None when there is none for them.

        {item, lease, mode, prompt, texts in the order shown, previous answer or None}.  With `release`, the
        lease is given back first.
        """
        if release:
            self.db.execute("DELETE FROM leases WHERE rater = ?", [rater])
        return self._next(rater)

    @written
    def vote(self, rater: str, item: str, lease: str, answer: object) -> dict | None:
        """The next item, after an answer (see `check_answer`) to a leased one was stored.

        Raises UserError or Refused.
        """
        held = self.db.execute("SELECT * FROM leases WHERE lease = ?", [lease]).fetchone()
        mode = self.db.execute("SELECT mode FROM items WHERE id = ?", [item]).fetchone()
        if mode is None:
            raise Refused("unknown", "no such item in this store")
        if held is None:
            used = self.db.execute("SELECT rater FROM events WHERE lease = ?", [lease]).fetchone()
            if used and used["rater"] == rater:
                raise Refused("replayed", "this judgement is already stored; it is not stored twice")
        if held is None or held["rater"] != rater or held["item"] != item:
            reason = "this item is not before you (any more): another page or another rater has it"
            raise Refused("foreign", reason)
        kind, data = check_answer(mode["mode"], answer)
        if not self._room(item, rater, held["repeat"]):
            reason = "you were away for long and others have judged this item: take the next one"
            raise Refused("taken", reason)
        now = time.time()
        data["seconds"] = round(min(data["seconds"], max(0.0, now - held["opened"])), 3)
        if mode["mode"] == "pair":
            data["shown"] = self.shown(item, rater, held["repeat"])
            if data.get("choice") in ("left", "right"):
                data["choice"] = data["shown"][data["choice"] == "right"]
        self._append(kind, rater, item, held["repeat"], lease, data)
        self.db.execute("DELETE FROM leases WHERE rater = ?", [rater])
        return self._next(rater)

    @written
    def undo(self, rater: str) -> dict | None:
        """Take the rater's latest judgement back and put its item before them again."""
        last = self.db.execute(
            "SELECT * FROM current WHERE rater = ? ORDER BY event DESC LIMIT 1", [rater]
        ).fetchone()
        if last is None:
            raise Refused("unknown", "nothing to undo")
        self._append("undo", rater, last["item"], last["repeat"], None, {"undoes": last["event"]})
        if self._room(last["item"], rater, last["repeat"]):
            return self._open(rater, last["item"], last["repeat"])
        return self._next(rater)  # a skipped item that others have judged meanwhile

    @written
    def edit(self, rater: str, item: str, repeat: int) -> dict:
        """Put a judged item before the rater again; what they said stands until they say otherwise."""
        if self._current(rater, item, repeat) is None:
            raise Refused("unknown", "you have not judged this item")
        if not self._room(item, rater, repeat):
            raise Refused("taken", "you skipped this item, and others have judged it meanwhile")
        return self._open(rater, item, repeat)

    def progress(self, rater: str) -> dict[str, int]:
        """{done: by this rater, left: open to them}."""
        done = self.rows("SELECT count(*) AS n FROM current WHERE rater = ?", rater)[0]["n"]
        # The difference of two counts: asking for each item whether this rater judged it is ten times slower.
        query = "SELECT count(*) AS n FROM items WHERE gold IS NULL AND votes < ?"
        mine = query.replace("items", "current JOIN items ON id = item") + " AND rater = ? AND repeat = 0"
        k = self.policy.raters
        return {"done": done, "left": self.rows(query, k)[0]["n"] - self.rows(mine, k, rater)[0]["n"]}

    def history(self, rater: str, limit: int = 30) -> list[dict]:
        """The rater's current judgements, latest first, in the order in which they saw the texts."""
        found = self.rows(JUDGEMENTS + " WHERE current.rater = ? ORDER BY event DESC LIMIT ?", rater, limit)
        keys = ("item", "repeat", "mode", "prompt")
        return [
            {key: row[key] for key in keys}
            | {"texts": self._texts(row, rater, row["repeat"]), "previous": self._answer(row)}
            for row in found
        ]

    def _current(self, rater: str, item: str, repeat: int) -> sqlite3.Row | None:
        query = """SELECT kind FROM current c JOIN events ON events.id = event
                   WHERE (c.rater, c.item, c.repeat) = (?, ?, ?)"""
        return self.db.execute(query, [rater, item, repeat]).fetchone()

    def _append(self, kind: str, rater: str, item: str, repeat: int, lease: str | None, data: dict) -> None:
        before = self._current(rater, item, repeat)
        values = (time.time(), kind, rater, item, repeat, lease, json.dumps(data))
        query = "INSERT INTO events (at, kind, rater, item, repeat, lease, data) VALUES (?, ?, ?, ?, ?, ?, ?)"
        event = self.db.execute(query, values).lastrowid
        if kind == "undo":
            self.db.execute("DELETE FROM current WHERE (rater, item, repeat) = (?, ?, ?)", values[2:5])
        else:
            self.db.execute("INSERT OR REPLACE INTO current VALUES (?, ?, ?, ?)", (*values[2:5], event))
        change = (kind == "vote") - (before is not None and before["kind"] == "vote")
        if change and not repeat:
            self.db.execute("UPDATE items SET votes = votes + ? WHERE id = ?", [change, item])

    def _room(self, item: str, rater: str, repeat: int) -> bool:
        """Whether this rater's judgement of the item is wanted still."""
        row = self.db.execute("SELECT gold, votes FROM items WHERE id = ?", [item]).fetchone()
        before = self._current(rater, item, repeat)
        if row["gold"] is not None or repeat or before is not None and before["kind"] == "vote":
            return True
        query = "SELECT count(*) FROM leases WHERE item = ? AND rater != ? AND repeat = 0 AND expires > ?"
        leased = self.db.execute(query, [item, rater, time.time()]).fetchone()[0]
        return row["votes"] + leased < self.policy.raters

    def _next(self, rater: str) -> dict | None:
        held = self.db.execute("SELECT * FROM leases WHERE rater = ?", [rater]).fetchone()
        if held is not None and self._room(held["item"], rater, held["repeat"]):
            return self._open(rater, held["item"], held["repeat"])
        self.db.execute("DELETE FROM leases WHERE rater = ?", [rater])
        picked = self._pick(rater)
        return self._open(rater, *picked) if picked else None

    def _pick(self, rater: str) -> tuple[str, int] | None:
        done = self.db.execute("SELECT count(*) FROM current WHERE rater = ?", [rater]).fetchone()[0]
        gold, repeat, found = self.policy.gold_every, self.policy.repeat_every, None
        if gold and done % gold == gold // 2:
            query = f"SELECT id FROM items WHERE gold IS NOT NULL AND {UNSEEN} ORDER BY place LIMIT 1"
            found = self.db.execute(query, [rater]).fetchone()
        if found is None and repeat and done % repeat == repeat - 1:  # the one longest ago
            query = """SELECT c.item AS id FROM current c
                       JOIN events e ON e.id = event JOIN items i ON i.id = c.item
                       WHERE c.rater = ? AND c.repeat = 0 AND e.kind = 'vote' AND i.gold IS NULL
                       AND NOT EXISTS (SELECT 1 FROM current r
                                       WHERE (r.rater, r.item, r.repeat) = (c.rater, c.item, 1))
                       ORDER BY event LIMIT 1"""
            if again := self.db.execute(query, [rater]).fetchone():
                return again["id"], 1
        if found is None:
            # Items that others have begun come first: so items are finished one after another.
            query = f"""SELECT id FROM items WHERE {OPEN}
                        AND votes + (SELECT count(*) FROM leases
                                     WHERE item = items.id AND repeat = 0 AND expires > ?) < ?
                        ORDER BY mode, votes DESC, place LIMIT 1"""
            values = [rater, self.policy.raters, time.time(), self.policy.raters]
            found = self.db.execute(query, values).fetchone()
        return (found["id"], 0) if found else None

    def _open(self, rater: str, item: str, repeat: int) -> dict:
        """Lease the item to the rater (in place of what they held), or prolong the lease they have on it."""
        row = self.db.execute("SELECT *, id AS item FROM items WHERE id = ?", [item]).fetchone()
        held = self.db.execute("SELECT * FROM leases WHERE rater = ?", [rater]).fetchone()
        same = held is not None and (held["item"], held["repeat"]) == (item, repeat)
        lease, now = held["lease"] if same else secrets.token_urlsafe(16), time.time()
        opened = held["opened"] if same else now
        expires = now + 60 * self.policy.lease
        values = [rater, lease, item, repeat, opened, expires]
        self.db.execute("INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?, ?, ?)", values)
        query = """SELECT * FROM events WHERE (rater, item, repeat) = (?, ?, ?) AND kind != 'undo'
                   ORDER BY id DESC LIMIT 1"""
        last = self.db.execute(query, [rater, item, repeat]).fetchone()
        return {
            "item": item,
            "lease": lease,
            "mode": row["mode"],
            "prompt": row["prompt"],
            "texts": self._texts(row, rater, repeat),
            "previous": self._answer(last) if last else None,
        }

    def _texts(self, row: sqlite3.Row, rater: str, repeat: int) -> list[str]:
        if row["mode"] == "rating":
            return [row["a"]]
        return [row[side] for side in self.shown(row["item"], rater, repeat)]

    def _answer(self, event: sqlite3.Row) -> dict:
        """The rater's answer, in the order in which they saw the texts: the page learns no other order."""
        data = self._decode(event["data"])
        shown, choice = data.pop("shown", "ab"), data.get("choice")
        if choice in ("a", "b"):
            data["choice"] = ("left", "right")[shown.index(choice)]
        return data | ({"skip": True} if event["kind"] == "skip" else {})

    # ------------------------------------------------------------------------- what came out

    def judgements(self) -> list[dict]:
        """The current votes of all raters on all items, in the order in which they were given.

        Each is {item, rater, repeat, at, mode, prompt, a, b, gold, source} with the vote's own data.
        """
        keys = ("item", "rater", "repeat", "at", "mode", "prompt", "a", "b", "gold")
        found = []
        for row in self.rows(JUDGEMENTS + " WHERE kind = 'vote' ORDER BY event"):
            data = self._decode(row["data"])
            if not _is_vote(row["mode"], row["gold"], data):
                raise UserError(f"{self.path}: event {row['event']} is damaged: {DAMAGED}")
            found.append({key: row[key] for key in keys} | {"source": self._decode(row["source"])} | data)
        return found

    def events(self) -> list[dict]:
        """Everything that was ever done, with its item."""
        query = """SELECT events.*, mode, prompt, a, b, gold, source
                   FROM events JOIN items ON items.id = item ORDER BY 1"""
        found = []
        for row in self.rows(query):
            decoded = {name: self._decode(row[name]) for name in ("data", "source")}
            found.append({key: row[key] for key in row.keys() if key != "lease"} | decoded)  # noqa: SIM118
        return found

    def _decode(self, text: str) -> dict:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise UserError(f"{self.path}: an event or an item is damaged: {DAMAGED}")
        return found


def _is_vote(mode: str, gold: str | None, data: dict) -> bool:
    """Whether this is what vote() stores of an answer to an item with this known answer."""
    seconds, note = data.get("seconds"), data.get("note", "")
    if type(seconds) not in (int, float) or not 0 <= seconds < math.inf or not isinstance(note, str):
        return False
    ratings = range(SCALE[0], SCALE[1] + 1)
    if gold is not None and gold not in (CHOICES if mode == "pair" else map(str, ratings)):
        return False
    if mode == "rating":
        return type(data.get("rating")) is int and data["rating"] in ratings
    known = data.get("choice") in CHOICES and data.get("shown") in ("ab", "ba")
    return known and data.get("strength", 1) in (1, 2)


UNSEEN = "NOT EXISTS (SELECT 1 FROM current WHERE rater = ? AND current.item = items.id)"
OPEN = f"gold IS NULL AND {UNSEEN} AND votes < ?"
JUDGEMENTS = """
    SELECT current.rater, current.item, current.repeat,
           event, kind, at, data, mode, prompt, a, b, gold, source
    FROM current JOIN events ON events.id = event JOIN items ON items.id = current.item"""

"""The store of items and judgements: one SQLite file that only grows.

What people did is a row of `events` (vote, skip, undo) that is never changed or removed, by a trigger; `current` is what
follows from them, the latest judgement of each rater on each item, kept in step within the same transaction. A rater holds
at most one lease: the item before them. An acknowledged vote is on the disk (WAL, synchronous=FULL).

Pairs are shown in an order that depends on (the store's seed, item, rater) alone; a repeat has the other order.
"""

import hashlib
import json
import math
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
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import TypeVar

from minirlhf import UserError

Result = TypeVar("Result")
APPLICATION, FORMAT = 0x6D726C66, 1
SCALE = (1, 5)  # of ratings
CHOICES = ("a", "b", "tie", "bad")  # bad: neither is acceptable
LIMITS = {"rater": 40, "note": 2000}  # characters
SCHEMA = f"""
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = {FORMAT};
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE items (
    id TEXT PRIMARY KEY, mode TEXT NOT NULL CHECK (mode IN ('pair', 'rating')), prompt TEXT NOT NULL, a TEXT NOT NULL,
    b TEXT, gold TEXT, source TEXT NOT NULL,
    place INTEGER NOT NULL,              -- random, and the same for all raters, so that they meet on the same items
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
    rater TEXT NOT NULL, item TEXT NOT NULL, repeat INTEGER NOT NULL, event INTEGER NOT NULL REFERENCES events,
    PRIMARY KEY (rater, item, repeat)
) WITHOUT ROWID;
CREATE TABLE leases (
    rater TEXT PRIMARY KEY, lease TEXT NOT NULL, item TEXT NOT NULL REFERENCES items, repeat INTEGER NOT NULL,
    opened REAL NOT NULL, expires REAL NOT NULL
);
"""


class Refused(UserError):
    """A judgement that is not taken. `why`: 'unknown', 'foreign', 'replayed' or 'taken'."""

    def __init__(self, why: str, message: str):
        super().__init__(message)
        self.why = why


@dataclass(frozen=True)
class Policy:
    """Who gets what; 0 switches gold items or repeats off."""

    raters: int = 3  # votes an item is to have, each of another person
    lease: float = 15.0  # minutes an item is kept for one rater while others wait for it
    gold_every: int = 10  # one judgement of so many is of an item whose answer is known
    repeat_every: int = 10  # one of so many is of an item that the rater has judged before


def plain(value: object, field: str, limit: int) -> str:
    """Text as it may be stored. Raises UserError for anything else."""
    if not isinstance(value, str) or len(value) > limit:
        raise UserError(f"{field}: expected text of at most {limit:,} characters")
    if re.search("[\ud800-\udfff\0]", value):
        raise UserError(f"{field}: holds a NUL or half a surrogate pair, which is no text")
    return value


def rater_name(value: object) -> str:
    """'  Ann  Lee ' -> 'ann lee': whoever writes it with other capitals on a telephone resumes where they left off."""
    name = " ".join(unicodedata.normalize("NFKC", plain(value, "rater", LIMITS["rater"])).casefold().split())
    if not name or not name.isprintable():
        raise UserError("rater: expected a name")
    return name


def check_answer(mode: str, answer: object) -> tuple[str, dict]:
    """(kind, data) of an answer in the order shown: {choice: left|right|tie|bad, strength?: 1|2} for a pair, {rating: 1..5}
    for a text, {skip: true} for either, each with {note?, seconds?}. Raises UserError('field: reason')."""
    if not isinstance(answer, dict):
        raise UserError("answer: expected an object")
    wanted = (
        {"skip"} if answer.get("skip") is True else {"choice", "strength"} if mode == "pair" else {"rating"}
    )
    if unknown := sorted(map(str, {*answer} - wanted - {"note", "seconds"})):
        raise UserError(
            f"{unknown[0][:20]}: does not belong to {'a skip' if 'skip' in wanted else 'a ' + mode}"
        )
    note = plain(answer.get("note", ""), "note", LIMITS["note"]).strip()
    data = {"seconds": answer.get("seconds", 0.0)} | ({"note": note} if note else {})
    if type(data["seconds"]) not in (int, float) or not 0 <= data["seconds"] < math.inf:
        raise UserError("seconds: expected a number, 0 or more")
    if "skip" in wanted:
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
    """A method of the store whose work is one transaction."""

    @wraps(method)
    def call(self: "Store", *args, **options):
        return self.write(partial(method, self, *args, **options))

    return call


class Store:
    """One connection to write and one to read, for all threads. Other processes (a terminal rater, an export) share the file
    through SQLite's own locks."""

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
            raise UserError(
                "--raters must be 1 or more, --lease above 0, --gold-every and --repeat-every 0 or more"
            )
        try:
            connect = lambda: sqlite3.connect(
                self.path, timeout=5.0, isolation_level=None, check_same_thread=False
            )
            self.db, self.reader = connect(), connect()
            self.db.row_factory = self.reader.row_factory = sqlite3.Row
            self._prepare(random.SystemRandom().randrange(2**31) if seed is None else seed)
        except sqlite3.Error as e:
            raise UserError(f"{path}: not a store of feedback that can be opened: {e}") from None

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
        self.db.execute(
            "PRAGMA synchronous = FULL"
        )  # WAL's usual NORMAL may lose the last commits with the power
        self.write(lambda: self._create(seed) if fresh() else None)  # asked again: two may have come at once
        self.meta = dict(tuple(row) for row in self.db.execute("SELECT key, value FROM meta"))

    def _create(self, seed: int) -> None:
        for statement in re.split(r";\n(?=PRAGMA|CREATE|$)", SCHEMA):  # executescript would commit in between
            self.db.execute(statement)
        meta = {"seed": seed, "secret": secrets.token_hex(32), "guidelines": ""}
        self.db.executemany(
            "INSERT INTO meta VALUES (?, ?)", [(key, str(value)) for key, value in meta.items()]
        )

    def write(self, work: Callable[[], Result]) -> Result:
        """What `work` returns, once what it wrote is on the disk. Whoever has the lock commits for all who wait for it, so that
        many raters share one wait for the disk. Raises what `work` raises, having undone it alone, and sqlite3.Error where the
        disk is full or the file locked."""
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
        """What is on the disk, without waiting for those who write."""
        with self.reading:
            return self.reader.execute(query, values).fetchall()

    @written
    def set_guidelines(self, text: str) -> None:
        self.db.execute("UPDATE meta SET value = ? WHERE key = 'guidelines'", [text])
        self.meta["guidelines"] = text

    # ------------------------------------------------------------------------- items

    @written
    def add(self, items: Iterable[dict]) -> tuple[int, int]:
        """Put items {mode, prompt, a, b?, gold?, source?} in; (new, already there). An item is its texts: a second import
        changes nothing, and a pair is the same pair the other way round."""
        counts = [0, 0]
        for item in items:
            texts = [item["a"], *([item["b"]] if item["mode"] == "pair" else [])]
            key = hashlib.sha256(
                json.dumps([item["mode"], item["prompt"], sorted(texts)]).encode()
            ).hexdigest()[:20]
            gold = None if item.get("gold") is None else str(item["gold"])
            values = (key, item["mode"], item["prompt"], item["a"], item.get("b"), gold, json.dumps(item.get("source", {})),
                      self._hash("place", key))  # fmt: skip
            done = self.db.execute("INSERT OR IGNORE INTO items VALUES (?, ?, ?, ?, ?, ?, ?, ?, 0)", values)
            counts[done.rowcount == 0] += 1
        return counts[0], counts[1]

    def _hash(self, *parts: object) -> int:
        """A number below 2^62 that the store's seed and the parts decide."""
        return int(hashlib.sha256(json.dumps([self.meta["seed"], *parts]).encode()).hexdigest(), 16) % 2**62

    def shown(self, item: str, rater: str, repeat: int) -> str:
        """'ab' or 'ba': the order in which this rater sees the pair."""
        return ("ab", "ba")[(self._hash("order", item, rater) + repeat) % 2]

    # ------------------------------------------------------------------------- a rater at work

    @written
    def next(self, rater: str, release: bool = False) -> dict | None:
        """The item before the rater: the one left off, or a new one (`release`: give the lease back first); None when
        there is none for them. {item, lease, mode, prompt, texts in the order shown, previous answer or None}."""
        if release:
            self.db.execute("DELETE FROM leases WHERE rater = ?", [rater])
        return self._next(rater)

    @written
    def vote(self, rater: str, item: str, lease: str, answer: object) -> dict | None:
        """Store an answer (see `check_answer`) to a leased item, and return the next one. Raises UserError or Refused."""
        held = self.db.execute("SELECT * FROM leases WHERE lease = ?", [lease]).fetchone()
        mode = self.db.execute("SELECT mode FROM items WHERE id = ?", [item]).fetchone()
        if mode is None:
            raise Refused("unknown", "no such item in this store")
        if held is None:
            used = self.db.execute("SELECT rater FROM events WHERE lease = ?", [lease]).fetchone()
            if used and used["rater"] == rater:
                raise Refused("replayed", "this judgement is already stored; it is not stored twice")
        if held is None or held["rater"] != rater or held["item"] != item:
            raise Refused(
                "foreign", "this item is not before you (any more): another page or another rater has it"
            )
        kind, data = check_answer(mode["mode"], answer)
        if not self._room(item, rater, held["repeat"]):
            raise Refused(
                "taken", "you were away for long and others have judged this item: take the next one"
            )
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
        # The difference of two counts: to ask of every item whether this rater has judged it takes ten times as long.
        query = "SELECT count(*) AS n FROM items WHERE gold IS NULL AND votes < ?"
        mine = query.replace("items", "current JOIN items ON id = item") + " AND rater = ? AND repeat = 0"
        k = self.policy.raters
        return {"done": done, "left": self.rows(query, k)[0]["n"] - self.rows(mine, k, rater)[0]["n"]}

    def history(self, rater: str, limit: int = 30) -> list[dict]:
        """The rater's current judgements, latest first, in the order in which they saw the texts."""
        found = self.rows(JUDGEMENTS + " WHERE current.rater = ? ORDER BY event DESC LIMIT ?", rater, limit)
        return [{"item": r["item"], "repeat": r["repeat"], "mode": r["mode"], "prompt": r["prompt"],
                 "texts": self._texts(r, rater, r["repeat"]), "previous": self._answer(r)} for r in found]  # fmt: skip

    def _current(self, rater: str, item: str, repeat: int) -> sqlite3.Row | None:
        query = "SELECT kind FROM current JOIN events ON events.id = event WHERE (current.rater, current.item, current.repeat)"
        return self.db.execute(query + " = (?, ?, ?)", [rater, item, repeat]).fetchone()

    def _append(self, kind: str, rater: str, item: str, repeat: int, lease: str | None, data: dict) -> None:
        before = self._current(rater, item, repeat)
        values = (time.time(), kind, rater, item, repeat, lease, json.dumps(data))
        event = self.db.execute("INSERT INTO events (at, kind, rater, item, repeat, lease, data) VALUES (?, ?, ?, ?, ?, ?, ?)",
                                values).lastrowid  # fmt: skip
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
            query = """SELECT c.item AS id FROM current c JOIN events e ON e.id = event JOIN items i ON i.id = c.item
                       WHERE c.rater = ? AND c.repeat = 0 AND e.kind = 'vote' AND i.gold IS NULL AND NOT EXISTS (SELECT 1
                       FROM current r WHERE (r.rater, r.item, r.repeat) = (c.rater, c.item, 1)) ORDER BY event LIMIT 1"""
            if again := self.db.execute(query, [rater]).fetchone():
                return again["id"], 1
        if (
            found is None
        ):  # what others have begun comes first: items are finished, and agreement is known, one after another
            query = f"""SELECT id FROM items WHERE {OPEN} AND votes + (SELECT count(*) FROM leases WHERE item = items.id AND
                        repeat = 0 AND expires > ?) < ? ORDER BY mode, votes DESC, place LIMIT 1"""
            found = self.db.execute(
                query, [rater, self.policy.raters, time.time(), self.policy.raters]
            ).fetchone()
        return (found["id"], 0) if found else None

    def _open(self, rater: str, item: str, repeat: int) -> dict:
        """Lease the item to the rater (in place of what they held), or prolong the lease they have on it."""
        row = self.db.execute("SELECT *, id AS item FROM items WHERE id = ?", [item]).fetchone()
        held = self.db.execute("SELECT * FROM leases WHERE rater = ?", [rater]).fetchone()
        same = held is not None and (held["item"], held["repeat"]) == (item, repeat)
        lease, now = held["lease"] if same else secrets.token_urlsafe(16), time.time()
        opened = held["opened"] if same else now
        self.db.execute("INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?, ?, ?)",
                        [rater, lease, item, repeat, opened, now + 60 * self.policy.lease])  # fmt: skip
        query = "SELECT * FROM events WHERE (rater, item, repeat) = (?, ?, ?) AND kind != 'undo' ORDER BY id DESC LIMIT 1"
        last = self.db.execute(query, [rater, item, repeat]).fetchone()
        return {"item": item, "lease": lease, "mode": row["mode"], "prompt": row["prompt"],
                "texts": self._texts(row, rater, repeat), "previous": self._answer(last) if last else None}  # fmt: skip

    def _texts(self, row: sqlite3.Row, rater: str, repeat: int) -> list[str]:
        return (
            [row[side] for side in self.shown(row["item"], rater, repeat)]
            if row["mode"] == "pair"
            else [row["a"]]
        )

    @staticmethod
    def _answer(event: sqlite3.Row) -> dict:
        """What the rater said, in the order in which they saw the texts: the page must not learn which is which."""
        data = json.loads(event["data"])
        shown, choice = data.pop("shown", "ab"), data.get("choice")
        if choice in ("a", "b"):
            data["choice"] = ("left", "right")[shown.index(choice)]
        return data | ({"skip": True} if event["kind"] == "skip" else {})

    # ------------------------------------------------------------------------- what came out

    def judgements(self) -> list[dict]:
        """Every rater's current vote on every item, in the order in which they were given: {item, rater, repeat, at, mode,
        prompt, a, b, gold, source} and the vote's data."""
        found = self.rows(JUDGEMENTS + " WHERE kind = 'vote' ORDER BY event")
        keys = ("item", "rater", "repeat", "at", "mode", "prompt", "a", "b", "gold")
        return [
            {k: r[k] for k in keys} | {"source": json.loads(r["source"])} | json.loads(r["data"])
            for r in found
        ]

    def events(self) -> list[dict]:
        """Everything that was ever done, with its item."""
        found = self.rows(
            "SELECT events.*, mode, prompt, a, b, gold, source FROM events JOIN items ON items.id = item ORDER BY 1"
        )
        decoded = ({**r, "data": json.loads(r["data"]), "source": json.loads(r["source"])} for r in found)
        return [{k: v for k, v in row.items() if k != "lease"} for row in decoded]


UNSEEN = "NOT EXISTS (SELECT 1 FROM current WHERE rater = ? AND current.item = items.id)"
OPEN = f"gold IS NULL AND {UNSEEN} AND votes < ?"
JUDGEMENTS = """SELECT current.rater, current.item, current.repeat, event, kind, at, data, mode, prompt, a, b, gold, source
    FROM current JOIN events ON events.id = event JOIN items ON items.id = current.item"""

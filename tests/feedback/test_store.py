"""The store: what is in it, who gets what, and that it only grows."""

import json
import os
import sqlite3
import tempfile
import threading
import time
import unicodedata
from collections import Counter
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from minirlhf import UserError
from minirlhf.feedback import __main__ as feedback
from minirlhf.feedback import store as module
from minirlhf.feedback.store import Policy, Refused, Store, check_answer, rater_name
from tests.feedback.conftest import make_items


def test_importing_twice_changes_nothing(make_store):
    store = make_store(pairs=3, ratings=2)
    before = store.rows("SELECT * FROM items ORDER BY id")
    assert store.add(make_items(3, 2)) == (0, 5)
    swapped = [item | {"a": item["b"], "b": item["a"]} for item in make_items(3)]
    assert store.add(swapped) == (0, 3)
    assert store.rows("SELECT * FROM items ORDER BY id") == before
    assert store.add(make_items(3, 3)) == (1, 5)


def test_an_import_is_all_or_nothing(make_store):
    store = make_store()

    def items():
        yield from make_items(3)
        raise UserError("bad row")

    with pytest.raises(UserError, match="bad row"):
        store.add(items())
    assert not store.rows("SELECT * FROM items")


def test_events_are_append_only(make_store, judge):
    store = make_store(pairs=2)
    judge(store, "ann")
    for statement in ("UPDATE events SET data = '{}'", "DELETE FROM events"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            store.db.execute(statement)
    assert len(store.events()) == 2


def test_durability_settings(make_store):
    store = make_store()
    pragma = lambda name: store.db.execute(f"PRAGMA {name}").fetchone()[0]
    assert (pragma("journal_mode"), pragma("synchronous"), pragma("foreign_keys")) == ("wal", 2, 1)  # 2: FULL


def test_those_who_wait_share_one_commit_and_no_mistake(make_store):
    store, said, commits = make_store(ratings=4), {}, []

    def work(rater):
        try:
            said[rater] = store.vote(
                rater, items[rater]["item"], items[rater]["lease"], {"rating": 3 if rater != "bob" else 9}
            )
        except UserError as e:
            said[rater] = str(e)

    items = {rater: store.next(rater) for rater in ("ann", "bob", "cy")}
    store.db.set_trace_callback(
        lambda statement: commits.append(statement) if statement == "COMMIT" else None
    )
    threads = [threading.Thread(target=work, args=[rater]) for rater in items]
    with store.lock:
        for thread in threads:
            thread.start()
        while len(store.waiting) < 3:
            time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert (
        commits == ["COMMIT"]
        and "rating: expected" in said["bob"]
        and said["ann"]["lease"]
        and said["cy"]["lease"]
    )
    assert sorted(v["rater"] for v in store.judgements()) == ["ann", "cy"]


def test_the_order_is_blind_stored_and_the_seed_s_alone(make_store, judge):
    store, again = make_store(pairs=100, raters=2), make_store(pairs=100, raters=2, name="again.db")
    judge(store, "ann")
    judge(store, "bob")
    votes = store.judgements()
    # Left was chosen throughout: the choice is what stood there.
    assert all(v["choice"] == v["shown"][0] for v in votes)
    orders = {(v["rater"], v["item"]): v["shown"] for v in votes}
    assert all(again.shown(item, rater, 0) == order for (rater, item), order in orders.items())
    for rater in ("ann", "bob"):  # 100 tosses of a fair coin: outside 30..70 once in 30,000
        assert 30 <= sum(order == "ab" for (who, _), order in orders.items() if who == rater) <= 70
    assert 30 <= sum(orders["ann", item] == orders["bob", item] for _, item in list(orders)[:100]) <= 70
    other = Store(store.path.with_name("other.db"), create=True, seed=2)
    assert [other.shown(item, "ann", 0) for _, item in orders] != [
        store.shown(item, "ann", 0) for _, item in orders
    ]
    assert all(
        {store.shown(item, "ann", 0), store.shown(item, "ann", 1)} == {"ab", "ba"} for _, item in orders
    )


def test_what_the_page_gets_does_not_tell_which_is_which(make_store):
    item = make_store(pairs=1).next("ann")
    assert {*item} == {"item", "lease", "mode", "prompt", "texts", "previous"}


def test_k_votes_an_item_and_begun_ones_first(make_store, judge):
    store = make_store(pairs=10, raters=2)
    judge(store, "ann", 4)
    judge(store, "bob", 4)
    assert store.rows("SELECT count(*) AS n FROM items WHERE votes = 2")[0]["n"] == 4  # bob was given ann's
    assert store.progress("cy") == {"done": 0, "left": 6} and store.progress("bob") == {"done": 4, "left": 6}
    judge(store, "cy")
    assert store.progress("cy") == {
        "done": 5,
        "left": 1,
    }  # the sixth is before ann and bob, and has no room for a third
    judge(store, "ann")
    judge(store, "bob")
    assert [r["votes"] for r in store.rows("SELECT votes FROM items")] == [2] * 10
    assert store.next("dan") is None


def test_skips_leave_the_item_to_others(make_store, judge):
    store = make_store(ratings=3, raters=1)
    assert judge(store, "ann", answer={"skip": True}) is None
    judge(store, "bob")
    assert {v["rater"] for v in store.judgements()} == {"bob"} and len(store.judgements()) == 3
    skipped = store.history("ann")[0]
    with pytest.raises(Refused, match="others have judged it"):
        store.edit("ann", skipped["item"], 0)


def test_a_lease_runs_out_only_where_another_wants_the_item(make_store, monkeypatch):
    clock = [1e9]
    monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: clock[0]))
    store = make_store(ratings=1, raters=1, lease=10)
    item = store.next("ann")
    assert store.next("bob") is None
    clock[0] += 601
    assert store.next("ann")["lease"] == item["lease"]  # prolonged
    clock[0] += 601
    taken = store.next("bob")
    assert taken["item"] == item["item"]
    with pytest.raises(Refused, match="others have judged"):
        store.vote("ann", item["item"], item["lease"], {"rating": 1})
    store.vote("bob", taken["item"], taken["lease"], {"rating": 2})
    assert [(v["rater"], v["rating"]) for v in store.judgements()] == [("bob", 2)]


def test_undo_goes_back_step_by_step_and_shows_what_was_said(make_store, judge):
    store = make_store(pairs=3)
    judge(store, "ann", 2, {"choice": "right", "strength": 2, "note": "why not"})
    first, second = (v["item"] for v in store.judgements())
    back = store.undo("ann")
    assert back["item"] == second and [v["item"] for v in store.judgements()] == [first]
    assert back["previous"] == {"choice": "right", "strength": 2, "note": "why not", "seconds": 0.0}
    assert store.undo("ann")["item"] == first and store.judgements() == []
    with pytest.raises(Refused, match="nothing to undo"):
        store.undo("ann")
    assert [e["kind"] for e in store.events()] == ["vote", "vote", "undo", "undo"]


def test_an_edit_counts_once_and_the_latest_counts(make_store, judge):
    store = make_store(ratings=2, raters=1)
    judge(store, "ann", 1, {"rating": 1})
    item = store.judgements()[0]["item"]
    open_again = store.edit("ann", item, 0)
    assert [v["rating"] for v in store.judgements()] == [1]  # stands until there is another
    store.vote("ann", item, open_again["lease"], {"rating": 5})
    assert [v["rating"] for v in store.judgements()] == [5] and len(store.events()) == 2
    assert store.rows("SELECT votes FROM items WHERE id = ?", item)[0]["votes"] == 1


def test_gold_and_repeats(make_store, judge):
    store = make_store(pairs=30, raters=1, gold_every=10, repeat_every=10)
    store.add(make_items(pairs=2, prompt="gold", gold="a"))
    judge(store, "ann")
    votes = store.judgements()
    gold = [n for n, v in enumerate(votes) if v["gold"]]
    repeats = [n for n, v in enumerate(votes) if v["repeat"]]
    assert gold == [5, 15] and repeats == [9, 19, 29] and len(votes) == 35
    first = {v["item"]: v["shown"] for v in votes if not v["repeat"]}
    assert all(votes[n]["shown"] != first[votes[n]["item"]] for n in repeats)  # the other way round
    judge(store, "bob")
    assert sum(v["gold"] is not None for v in store.judgements()) == 2  # bob has no fifth item to be due one


def test_replayed_foreign_and_unknown(make_store):
    store = make_store(ratings=3, raters=1)
    item = store.next("ann")
    for rater, name, lease, why in (
        ("bob", item["item"], item["lease"], "foreign"),
        ("ann", item["item"], "made up", "foreign"),
        ("ann", "made up", item["lease"], "unknown"),
        ("ann", store.next("bob")["item"], item["lease"], "foreign"),
    ):
        with pytest.raises(Refused) as refused:
            store.vote(rater, name, lease, {"rating": 3})
        assert refused.value.why == why
    assert store.events() == []
    store.vote("ann", item["item"], item["lease"], {"rating": 3})
    with pytest.raises(Refused) as refused:
        store.vote("ann", item["item"], item["lease"], {"rating": 4})
    assert refused.value.why == "replayed" and len(store.events()) == 1


@pytest.mark.parametrize("mode, answer, message", [
    ("pair", None, "object"), ("pair", [], "object"), ("pair", {}, "choice"), ("pair", {"choice": "a"}, "choice"),
    ("pair", {"choice": ["left"]}, "choice"), ("pair", {"choice": "left", "strength": 3}, "strength"),
    ("pair", {"choice": "left", "strength": True}, "strength"), ("pair", {"choice": "tie", "strength": 1}, "strength"),
    ("pair", {"rating": 3}, "rating: does not belong"), ("rating", {"choice": "left"}, "choice: does not belong"),
    ("rating", {"rating": 0}, "1 to 5"), ("rating", {"rating": 6}, "1 to 5"), ("rating", {"rating": 3.0}, "1 to 5"),
    ("rating", {"rating": True}, "1 to 5"), ("rating", {"rating": "3"}, "1 to 5"), ("rating", {"rating": 10**400}, "1 to 5"),
    ("rating", {"rating": 3, "seconds": -1}, "seconds"), ("rating", {"rating": 3, "seconds": float("nan")}, "seconds"),
    ("rating", {"rating": 3, "seconds": float("inf")}, "seconds"), ("rating", {"rating": 3, "note": 4}, "note"),
    ("rating", {"rating": 3, "note": "x" * 2001}, "note"), ("rating", {"rating": 3, "note": "\ud800"}, "surrogate"),
    ("rating", {"skip": True, "rating": 3}, "rating: does not belong"), ("rating", {"rating": 3, "shown": "ab"}, "shown"),
])  # fmt: skip
def test_answers_that_are_none(mode, answer, message):
    with pytest.raises(UserError, match=message):
        check_answer(mode, answer)


def test_names():
    assert rater_name("  Ann\t Lee ") == rater_name("ANN LEE") == "ann lee"
    for bad in ("", "  ", None, 3, "x" * 41, "a\0b", "a\u202eb", "\ud800"):
        with pytest.raises(UserError, match="rater"):
            rater_name(bad)


@pytest.mark.parametrize(
    "name",
    ["علی\u200cرضا", "نیک\u200cپور", "ශ්\u200dරී", "ನ್\u200cನಾ", "क्\u200dषमा", "Zoë", "李 小龙", "O'Brien-Ng"],
)
def test_H18_joiners_belong_to_names_in_scripts_that_need_them(name):
    assert rater_name(name) == unicodedata.normalize("NFKC", name).casefold() and rater_name(
        rater_name(name)
    ) == rater_name(name)


@pytest.mark.parametrize("name, character", [
    ("an\u200cn", "U+200C ZERO WIDTH NON-JOINER: only stands between letters of scripts such as Arabic"),
    ("\u200dann", "U+200D ZERO WIDTH JOINER: only stands"), ("علی\u200c", "U+200C"), ("\u200cعلی", "U+200C"), ("علی\u200c رضا", "U+200C"),
    ("علی\u200c\u200cرضا", "U+200C"), ("علیa\u200cرضا", "U+200C"), ("👩\u200d💻", "U+200D"),
    ("ann\u202egnp", "U+202E RIGHT-TO-LEFT OVERRIDE: cannot be part of a name"), ("an\u200bn", "U+200B ZERO WIDTH SPACE"),
    ("an\u00adn", "U+00AD SOFT HYPHEN"), ("an\ufeffn", "U+FEFF ZERO WIDTH NO-BREAK SPACE"), ("an\x07n", "U+0007: cannot"),
    ("an\u2066n", "U+2066 LEFT-TO-RIGHT ISOLATE"), ("an\ue000n", "U+E000: cannot"),
])  # fmt: skip
def test_H18_other_characters_that_nobody_sees_are_named(name, character):
    with pytest.raises(UserError) as refused:
        rater_name(name)
    assert str(refused.value).startswith(f"rater: {character}") and str(refused.value).isprintable()


def test_files_that_are_no_store(tmp_path):
    with pytest.raises(UserError, match="no such store"):
        Store(tmp_path / "absent.db")
    (tmp_path / "text.db").write_text("not a database " * 100)
    with pytest.raises(UserError, match="not a store"):
        Store(tmp_path / "text.db")
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE t (x)")
    other.close()
    before = (tmp_path / "other.db").read_bytes()
    with pytest.raises(UserError, match="not a store"):
        Store(tmp_path / "other.db", create=True)
    assert (tmp_path / "other.db").read_bytes() == before
    with pytest.raises(UserError, match="--raters"):
        Store(tmp_path / "new.db", Policy(raters=0), create=True)


def test_a_full_disk_stores_nothing_and_says_so(make_store, judge):
    store = make_store(ratings=200)
    pages = store.db.execute("PRAGMA page_count").fetchone()[0]
    store.db.execute(f"PRAGMA max_page_count = {pages + 1}")
    with pytest.raises(sqlite3.OperationalError, match="full"):
        judge(store, "ann", answer={"rating": 1, "note": "x" * 2000})
    held, stored = store.rows("SELECT * FROM leases")[0], len(store.judgements())
    store.db.execute("PRAGMA max_page_count = 100000")
    store.vote("ann", held["item"], held["lease"], {"rating": 1, "note": "x" * 2000})  # the same again
    assert len(store.judgements()) == stored + 1 == len(store.events())


def test_a_store_is_its_owner_s_alone(tmp_path, judge):
    """It holds the key of the raters' sessions, and was made with the umask's mode."""
    before = os.umask(0)
    try:
        store = Store(tmp_path / "store.db", create=True, seed=1)
        store.add([{"mode": "rating", "prompt": "p", "a": f"a {i}"} for i in range(3)])
        judge(store, "ann")
        store.backup(tmp_path / "copy.db")
    finally:
        os.umask(before)
    files = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert {"store.db", "store.db-wal", "copy.db"} <= files.keys() and {*files.values()} == {0o600}, files


def test_a_backup_while_a_rater_works(make_store, judge, tmp_path):
    store = make_store(ratings=200)
    stop = threading.Event()
    worker = threading.Thread(
        target=lambda: [judge(store, f"r{i}", 5) for i in range(40) if not stop.is_set()]
    )
    worker.start()
    counts = []
    for i in range(5):
        store.backup(tmp_path / f"copy {i}.db")
        counts.append(len(Store(tmp_path / f"copy {i}.db").events()))
    stop.set()
    worker.join()
    assert counts == sorted(counts) and counts[-1] <= len(store.events())
    held = {event["id"] for event in store.events()}
    assert {event["id"] for event in Store(tmp_path / "copy 4.db").events()} <= held
    with pytest.raises(UserError, match="exists already"):
        store.backup(tmp_path / "copy 0.db")
    for out in (tmp_path / "no" / "x.db", tmp_path / "store.db" / "x"):
        with pytest.raises(UserError, match="cannot be made"):
            store.backup(out)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_item_of_another_mode_than_its_texts_is_damage(make_store, judge):
    """A rating with two texts was exported as a pair, and its votes have no choice."""
    store = make_store(ratings=1)
    judge(store, "ann")
    store.close()
    with closing(sqlite3.connect(store.path)) as db:
        db.execute("UPDATE items SET b = 'another'")
        db.commit()
    with pytest.raises(UserError, match="table items is damaged: go back to a copy"):
        Store(store.path)


VALUES = [b"\x00\xff", 3, 2.5, None, "", "{", "\x1b[31m", '{"choice": 5, "shown": "ab", "seconds": 1}']


@pytest.mark.parametrize(
    "place",
    ["items.prompt", "items.a", "items.gold", "items.source", "items.votes", "items.place", "events.at", "events.kind",
     "events.data", "events.rater", "current.event", "current.repeat", "meta.value", "leases.expires", "leases.item"],
)  # fmt: skip
def test_a_damaged_value_is_one_line_in_every_subcommand(
    make_store, judge, capsys, tmp_path, monkeypatch, place
):
    """SQLite stores any value in any column: SQLite's own check finds nothing wrong with these."""
    monkeypatch.setattr("builtins.input", lambda *_: "q")
    commands = (
        ["stats"],
        ["export", tmp_path / "out"],
        ["backup", tmp_path / "b.db"],
        ["rate", "--rater", "eve"],
    )
    table, column = place.split(".")
    refused = 0
    for i, value in enumerate(VALUES):
        store = make_store(pairs=2, ratings=2, name=f"{i}.db")
        judge(store, "ann", 3)
        store.close()
        with closing(sqlite3.connect(store.path)) as db:
            db.execute("DROP TRIGGER no_update")
            db.execute("PRAGMA ignore_check_constraints = ON")
            try:
                db.execute(f"UPDATE {table} SET {column} = ?", [value])
                db.commit()
            except sqlite3.IntegrityError:  # SQLite refuses it
                continue
        for command in commands:
            try:
                feedback.guarded(feedback.parse([*map(str, command), "--store", str(store.path)]))
            except UserError as error:
                assert str(store.path) in str(error)
                refused += 1
        (tmp_path / "b.db").unlink(missing_ok=True)
    capsys.readouterr()
    assert refused or place == "items.place"


K, RATERS = 2, ("ann", "bob", "cy")


class Work(RuleBasedStateMachine):
    """Raters in any order, with a clock that jumps; beside it the simplest account of what must come out."""

    @initialize(pairs=st.integers(0, 3), ratings=st.integers(1, 3))
    def begin(self, pairs, ratings):
        self.clock, self.said, self.before = 1e9, {}, {}
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(module, "time", SimpleNamespace(time=lambda: self.clock))
        self.folder = tempfile.TemporaryDirectory()
        self.store = Store(
            Path(self.folder.name, "store.db"),
            Policy(raters=K, lease=10, gold_every=4, repeat_every=3),
            create=True,
            seed=pairs,
        )
        self.store.add(make_items(pairs, ratings) + make_items(1, prompt="gold", gold="b"))
        self.order, self.count = [], 0

    def teardown(self):
        if hasattr(self, "patch"):
            self.patch.undo()
            self.store.db.close()
            self.store.reader.close()
            self.folder.cleanup()

    def key(self, rater):
        held = self.store.rows("SELECT * FROM leases WHERE rater = ?", rater)[0]
        return rater, held["item"], held["repeat"]

    @rule(rater=st.sampled_from(RATERS), release=st.booleans())
    def look(self, rater, release):
        self.before[rater] = self.store.next(rater, release)

    @rule(rater=st.sampled_from(RATERS), number=st.integers(1, 5), skip=st.booleans())
    def vote(self, rater, number, skip):
        if item := self.before.get(rater):
            held = self.store.rows("SELECT * FROM leases WHERE lease = ?", item["lease"])
            said = (
                {"rating": number}
                if item["mode"] == "rating"
                else {"choice": ("left", "right", "tie", "bad", "left")[number - 1]}
            )
            try:
                self.before[rater] = self.store.vote(
                    rater, item["item"], item["lease"], {"skip": True} if skip else said
                )
            except Refused:
                self.before[rater] = None
                return
            key = (rater, held[0]["item"], held[0]["repeat"])
            self.order = [k for k in self.order if k != key] + [key]
            self.said[key] = None if skip else said.get("rating", said.get("choice"))

    @rule(rater=st.sampled_from(RATERS))
    def undo(self, rater):
        mine = [key for key in self.order if key[0] == rater]
        if mine:
            self.before[rater] = self.store.undo(rater)
            self.order.remove(mine[-1])
            del self.said[mine[-1]]

    @rule(rater=st.sampled_from(RATERS), which=st.integers(0, 9))
    def edit(self, rater, which):
        mine = [key for key in self.order if key[0] == rater]
        if mine:
            try:
                self.before[rater] = self.store.edit(*mine[which % len(mine)])
            except Refused:
                assert self.said[mine[which % len(mine)]] is None  # a skip that others have filled

    @rule(minutes=st.sampled_from([1, 11]))
    def wait(self, minutes):
        self.clock += 60 * minutes

    @invariant()
    def what_was_said_is_what_counts(self):
        if not hasattr(self, "store"):
            return
        found = {(v["rater"], v["item"], v["repeat"]): v for v in self.store.judgements()}
        assert found.keys() == {key for key, said in self.said.items() if said is not None}
        for key, vote in found.items():
            side = {"left": vote.get("shown", "ab")[0], "right": vote.get("shown", "ab")[1]}
            assert vote.get("rating", vote.get("choice")) == side.get(self.said[key], self.said[key])

    @invariant()
    def no_item_has_more_votes_than_wanted(self):
        if not hasattr(self, "store"):
            return
        counted = Counter(v["item"] for v in self.store.judgements() if not v["repeat"])
        for row in self.store.rows("SELECT id, gold, votes FROM items"):
            assert row["votes"] == counted[row["id"]] and (row["gold"] or row["votes"] <= K)

    @invariant()
    def events_alone_tell_the_state(self):
        if not hasattr(self, "store"):
            return
        events, current = self.store.rows("SELECT * FROM events ORDER BY id"), {}
        for e in events:
            current[e["rater"], e["item"], e["repeat"]] = None if e["kind"] == "undo" else e["id"]
        held = {
            (r["rater"], r["item"], r["repeat"]): r["event"] for r in self.store.rows("SELECT * FROM current")
        }
        assert held == {key: event for key, event in current.items() if event is not None}
        assert len(events) >= self.count and all(json.loads(e["data"]) is not None for e in events)
        self.count = len(events)


Work.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None,
                                  suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
test_any_order_of_work = Work.TestCase

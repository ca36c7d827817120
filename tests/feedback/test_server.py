"""The server: what it refuses, and that it keeps what it acknowledged."""

import http.client
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("flask", reason="pip install 'minirlhf[feedback]'")
pytest.importorskip("waitress", reason="pip install 'minirlhf[feedback]'")

from benchmarks.feedback import Rater, audit, drive, half_sent, page_ms, running_server
from minirlhf import UserError
from minirlhf.feedback import server
from minirlhf.feedback.door import ROOM, TOKEN_VARIABLE, WINDOW, WRONG, Attempts, token_from
from minirlhf.feedback.server import create_app, is_ours
from tests.feedback.conftest import make_items

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "a-token-that-is-long-enough"
PAYLOADS = [
    "<script>window.pwned=1</script>",
    '<img src=x onerror="window.pwned=1">',
    "</p><svg onload=window.pwned=1>",
]


class Page:
    """Flask's client with what the page would send."""

    def __init__(self, store, rater: str | None = "ann", **options):
        self.client = create_app(store, **options).test_client()
        self.headers = {"Origin": "http://localhost"}
        self.headers["X-CSRF-Token"] = self.client.get("/api/me").json["csrf"]
        if rater:
            assert (
                self.post("/api/join", {"name": rater, "token": options.get("token", "")}).status_code == 200
            )

    def post(self, path: str, body: object, headers: dict | None = None, **options):
        sent = {k: v for k, v in (self.headers | (headers or {})).items() if v is not None}
        return self.client.post(path, json=body, headers=sent, **options)

    def vote(self, item: dict, answer: object = None, **options):
        answer = {"rating": 3} if answer is None else answer
        return self.post(
            "/api/vote", {"item": item["item"], "lease": item["lease"], "answer": answer}, **options
        )

    def next(self) -> dict:
        return self.post("/api/next", {}).json["item"]


def refused(response, status: int, message: str) -> None:
    assert response.status_code == status and message in response.json["error"], response.text


@pytest.fixture
def store(make_store):
    return make_store(ratings=5)


def test_a_vote(store):
    page = Page(store)
    item = page.next()
    response = page.vote(item, {"rating": 5, "note": "good", "seconds": 0.0})
    assert response.json["stored"] and response.json["progress"] == {"done": 1, "left": 4}
    assert response.json["item"]["item"] != item["item"]
    assert [(v["rater"], v["rating"], v["note"]) for v in store.judgements()] == [("ann", 5, "good")]


def test_H18_names_on_the_page(store):
    page = Page(store, "  علی\u200cرضا ")
    assert page.client.get("/api/me").json["rater"] == "علی\u200cرضا"
    refused(
        page.post("/api/join", {"name": "ann\u202e"}),
        400,
        "rater: U+202E RIGHT-TO-LEFT OVERRIDE: cannot be part of",
    )


def test_headers_forbid_everything_that_is_not_ours(store):
    for path in ("/", "/static/page.js", "/static/page.css", "/api/me", "/nowhere"):
        headers = Page(store).client.get(path).headers
        assert (
            "default-src 'none'" in headers["Content-Security-Policy"]
            and "unsafe" not in headers["Content-Security-Policy"]
        )
        assert headers["X-Content-Type-Options"] == "nosniff" and "Access-Control-Allow-Origin" not in headers
    cookie = create_app(store).test_client().get("/api/me").headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie


def test_the_page_asks_for_nothing_from_elsewhere_and_makes_no_markup():
    folder = Path(server.__file__).parent / "static"
    text = "".join(file.read_text() for file in folder.iterdir())
    assert sorted(file.name for file in folder.iterdir()) == ["page.css", "page.html", "page.js"]
    assert "://" not in text and "@import" not in text
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "DOMParser",
        "setHTML",
    ):
        assert word not in text


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.7", "[::1", "", "a@b"],
)
def test_wrong_host(store, host):
    page = Page(store)
    for response in (
        page.client.get("/", headers={"Host": host}),
        page.post("/api/next", {}, {"Host": host}),
    ):
        assert response.status_code == 400


def test_hosts():
    for name in ("127.0.0.1:8000", "localhost:9", "[::1]:8000", "127.0.0.1"):
        assert is_ours(name, "127.0.0.1") and is_ours(name, "0.0.0.0")
    for name in ("192.168.1.5:8000", "[fe80::1]:8000"):
        assert is_ours(name, "0.0.0.0") and not is_ours(name, "localhost")
    assert is_ours("box.lan:8000", "box.lan") and not is_ours("box.lan:8000", "0.0.0.0")


@pytest.mark.parametrize(
    "origin",
    [None, "", "null", "http://evil.example", "http://localhost.evil.example", "http://localhost:81"],
)
def test_wrong_origin(store, origin):
    page = Page(store)
    refused(page.vote(page.next(), headers={"Origin": origin}), 403, "wrong Origin")
    assert store.events() == []


def test_cross_site_posts(store):
    """A form or fetch of another page: neither our CSRF token nor a JSON content type without a preflight."""
    page = Page(store)
    item = page.next()
    for token in (None, "", "x", "é", Page(store, "bob").headers["X-CSRF-Token"]):
        refused(page.vote(item, headers={"X-CSRF-Token": token}), 403, "reload")
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        response = page.client.post("/api/vote", data='{"item": ""}', headers=page.headers, content_type=kind)
        refused(response, 415, "application/json")
    assert page.client.get("/api/vote").status_code == 405
    assert create_app(store).test_client().post("/api/next", json={}, headers=page.headers).status_code == 403
    assert store.events() == []


def test_who_has_not_said_their_name(store):
    page = Page(store, rater=None)
    refused(page.post("/api/next", {}), 401, "who you are")
    refused(page.client.get("/api/history"), 401, "who you are")
    for name in ("", "  ", None, 7, "x" * 50, "a\0", "\u202e"):
        refused(page.post("/api/join", {"name": name}), 400, "")
    assert page.client.get("/api/me").json["rater"] is None


def test_token(store):
    page = Page(store, rater=None, token=TOKEN)
    for token in ("", "wrong", TOKEN[:-1], "é"):
        refused(page.post("/api/join", {"name": "ann", "token": token}), 401, "wrong token")
    assert page.client.get("/api/me").json["needs_token"]
    refused(page.post("/api/next", {}), 401, "")
    page = Page(store, token=TOKEN)
    assert page.next()
    # The same cookie against a server with another token, or with none given at its start.
    later = Page(store, rater=None, token="another-token-long-enough")
    later.client.set_cookie(*[(c.key, c.value) for c in page.client._cookies.values()][0])
    later.headers = page.headers
    refused(later.post("/api/next", {}), 401, "")


@pytest.mark.parametrize("host, token, message", [
    ("0.0.0.0", None, "needs a --token"), ("192.168.0.1", None, "needs a --token"), ("::", None, "needs a --token"),
    ("0.0.0.0", "short", "16 characters"), ("127.0.0.1", "", "16 characters"), ("no such host", TOKEN, "cannot listen"),
])  # fmt: skip
def test_another_address_needs_a_token(store, host, token, message):
    with pytest.raises(UserError, match=message):
        server.serve(store, host, 0, token)


def test_oversized_and_malformed_bodies(store):
    page = Page(store)
    item = page.next()
    assert page.vote(item, {"rating": 3, "note": "x" * 20_000}).status_code == 413
    refused(page.vote(item, {"rating": 3, "note": "x" * 2001}), 400, "note")
    for body in (
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff",
        b"[" * 15_000,
        b'{"item": 3}',
        b'{"item": null, "lease": {}}',
    ):
        response = page.client.post(
            "/api/vote", data=body, headers=page.headers, content_type="application/json"
        )
        refused(response, 400, "expected a JSON object")
    for answer in (
        [],
        "left",
        {"rating": 9},
        {"rating": 3, "x": 1},
        {"choice": "left"},
        {"rating": 3, "seconds": "1"},
    ):
        assert page.vote(item, answer).status_code == 400
    refused(page.vote(item, {"rating": 3, "note": "\ud800"}), 400, "surrogate")
    for repeat in (None, "0", 2, True):
        assert page.post("/api/edit", {"item": item["item"], "repeat": repeat}).status_code == 400
    assert store.events() == [] and page.vote(item).status_code == 200


def test_unknown_foreign_and_replayed(store):
    page, other = Page(store), Page(store, "bob")
    item = page.next()
    refused(page.vote(item | {"item": "0" * 20}), 404, "no such item")
    refused(page.post("/api/edit", {"item": "0" * 20, "repeat": 0}), 404, "not judged")
    refused(other.vote(item), 403, "not before you")
    refused(page.vote(item | {"lease": other.next()["lease"]}), 403, "not before you")
    refused(page.post("/api/undo", {}), 404, "nothing to undo")
    assert store.events() == []
    assert page.vote(item).status_code == 200
    again = page.vote(item)
    refused(again, 409, "already stored")
    assert again.json["why"] == "replayed"
    refused(other.vote(item), 403, "not before you")
    assert len(store.events()) == 1


def test_payloads_leave_as_json_text(store):
    store.add(make_items(ratings=1, a=PAYLOADS[0], prompt=PAYLOADS[1]))
    page = Page(store)
    for _ in range(6):
        response = page.post("/api/next", {})
        assert response.mimetype == "application/json"
        page.vote(response.json["item"], {"rating": 1, "note": PAYLOADS[2]})
    texts = [
        text
        for row in page.client.get("/api/history").json["judged"]
        for text in (row["prompt"], *row["texts"])
    ]
    assert {PAYLOADS[0], PAYLOADS[1]} <= {*texts}
    assert {v["note"] for v in store.judgements()} == {PAYLOADS[2]}


def test_a_locked_database_is_an_error_and_the_same_vote_passes_later(store):
    page = Page(store)
    item = page.next()
    store.db.execute("PRAGMA busy_timeout = 20")
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    refused(page.vote(item), 503, "locked")
    other.execute("ROLLBACK")
    other.close()
    assert page.vote(item).status_code == 200 and len(store.events()) == 1


def test_a_full_disk_is_an_error_and_the_same_vote_passes_later(make_store):
    store = make_store(ratings=100)
    page, answer = Page(store), {"rating": 3, "note": "x" * 2000}
    item = page.next()
    store.db.execute(f"PRAGMA max_page_count = {store.db.execute('PRAGMA page_count').fetchone()[0] + 1}")
    for _ in range(100):
        if (response := page.vote(item, answer)).status_code != 200:
            break
        item = response.json["item"]
    refused(response, 503, "full")
    stored = len(store.events())
    store.db.execute("PRAGMA max_page_count = 100000")
    assert page.vote(item, answer).status_code == 200 and len(store.events()) == stored + 1


def test_an_unforeseen_error_tells_nothing_of_the_server(store, monkeypatch):
    page = Page(store)
    monkeypatch.setattr(store, "next", lambda *a, **k: 1 / 0)
    refused(page.post("/api/next", {}), 500, "an error of the server's")


# ----------------------------------------------------------------------------- the real server


def test_killed_at_any_moment_it_keeps_what_it_acknowledged(make_store):
    """SIGKILL while four raters work, three times over, each time on the store that the last kill left."""
    path, rng = make_store(ratings=400, raters=4).path, random.Random(0)
    acknowledged, sent = {}, {}

    def work(address: str, name: str) -> None:
        rater = Rater(address, name)
        try:
            item = rater.join()
            while item:
                key, rating = (name, item["item"], 0), 1 + len(acknowledged) % 5
                sent.setdefault(key, []).append(rating)
                following = rater.vote(item, {"rating": rating})
                acknowledged[key] = {"rating": rating}
                item = following
        except (OSError, http.client.HTTPException, RuntimeError) as e:  # the kill
            assert "409" not in str(e)

    for _ in range(3):
        before = len(acknowledged)
        with running_server(path, "--raters", 4, "--repeat-every", 0) as (process, address):
            threads = [threading.Thread(target=work, args=[address, f"rater {i}"]) for i in range(4)]
            for thread in threads:
                thread.start()
            deadline = time.monotonic() + 60
            while len(acknowledged) < before + 20 and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(rng.random() / 20)
            os.kill(process.pid, signal.SIGKILL)
            for thread in threads:
                thread.join()
        assert len(acknowledged) >= before + 20
        found = audit(path, acknowledged, 0)
        assert found["lost"] == found["double"] == 0
        # A vote may have been stored while its acknowledgement was killed, one a rater: it is the one that was sent.
        assert found["never acknowledged"] <= 4
        with sqlite3.connect(path) as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            rows = db.execute("SELECT rater, item, json_extract(data, '$.rating') FROM events").fetchall()
        for rater, item, rating in rows:
            assert rating in sent[rater, item, 0]
            acknowledged[rater, item, 0] = {"rating": rating}


def test_sixteen_raters_at_once_lose_and_double_nothing(make_store):
    path = make_store(ratings=30, raters=3).path
    with running_server(path, "--raters", 3, "--repeat-every", 0) as (_, address):
        found = drive(address, 16, 60)  # until nothing is left, if not for so long
    assert found["errors"] == []
    assert audit(path, found["acknowledged"], found["undone"]) | {"acknowledged": 0} == {
        "acknowledged": 0, "lost": 0, "never acknowledged": 0, "double": 0}  # fmt: skip
    with sqlite3.connect(path) as db:
        raters = db.execute(
            "SELECT item, count(*), count(DISTINCT rater) FROM current GROUP BY item"
        ).fetchall()
    assert len(raters) == 30 and {row[1:] for row in raters} == {(3, 3)}


def test_from_serve_to_the_first_vote(make_store):
    path = make_store(ratings=1).path
    start = time.monotonic()
    with running_server(path) as (_, address):
        rater = Rater(address, "ann")
        assert rater.vote(rater.join(), {"rating": 4}) is None
    assert time.monotonic() - start < 10


def test_serve_needs_no_torch(make_store):
    code = "import sys; import minirlhf.feedback.server, minirlhf.feedback.__main__; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "False"


# ----------------------------------------------------------------------------- who is let in


def test_F11_half_sent_requests_do_not_keep_the_page_from_others(make_store):
    """300 of them once held all of waitress' 100 connections, and nobody got an answer for two minutes."""
    store = make_store(ratings=3)
    with running_server(store.path) as (_, address):
        rater = Rater(address, "ann")
        item = rater.join()
        with half_sent(address, 300):
            assert max(page_ms(address, 5)) < 20_000  # a second, where the machine does nothing else
            rater.connection.close()  # perhaps it made room: a browser opens another by itself
            assert rater.vote(item, {"rating": 3})
        assert ROOM < 300
    assert len(store.judgements()) == 1


@pytest.mark.parametrize("field", ["item", "lease", "name", "token"])
@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\0"])
def test_F12_half_a_surrogate_pair_is_a_bad_request(store, field, text):
    page = Page(store, token=TOKEN)
    path = "/api/vote" if field in ("item", "lease") else "/api/join"
    body = {"item": "x", "lease": "y", "answer": {"rating": 1}, "name": "ann", "token": TOKEN} | {field: text}
    refused(page.post(path, body), 400, f"{field}: holds a NUL or half a surrogate pair")


@pytest.mark.parametrize("origin", ["http://[", "http://loc[alhost", "http://localhost]", "http://[::1"])
def test_an_origin_that_is_no_address_is_a_wrong_origin(store, origin):
    refused(Page(store).post("/api/next", {}, {"Origin": origin}), 403, "wrong Origin")


def test_F18_wrong_tokens_are_counted_and_reported_once(store, capsys):
    page = Page(store, token=TOKEN)
    for i in range(WRONG):
        stranger = page.client.application.test_client()
        csrf = stranger.get("/api/me").json["csrf"]
        sent = page.headers | {"X-CSRF-Token": csrf}
        answer = stranger.post("/api/join", json={"name": "eve", "token": f"wrong {i}"}, headers=sent)
        refused(answer, 401, "wrong token")
    answer = stranger.post("/api/join", json={"name": "eve", "token": TOKEN}, headers=sent)
    refused(answer, 429, f"wait {WINDOW:.0f} seconds")
    said = capsys.readouterr().err
    assert said.count("a wrong token from 127.0.0.1") == 1 and TOKEN not in said
    assert page.next() and page.post("/api/join", {"name": "ann", "token": "x"}).status_code == 200  # is in


def test_F18_an_address_is_forgiven_after_a_while(capsys):
    now = [0.0]
    attempts = Attempts(lambda: now[0])
    for _ in range(WRONG):
        assert not attempts.too_many("a")
        attempts.count("a")
    assert attempts.too_many("a") and not attempts.too_many("b")
    now[0] = WINDOW - 1
    assert attempts.too_many("a")
    now[0] = WINDOW + 1
    assert not attempts.too_many("a")
    attempts.count("\x1b[31m")
    assert "\x1b" not in capsys.readouterr().err


def test_F18_a_token_need_not_stand_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert token_from(None, None) is None
    monkeypatch.setenv(TOKEN_VARIABLE, "of the environment")
    assert token_from(None, None) == "of the environment" and token_from("given", None) == "given"
    (tmp_path / "token").write_text(f"  {TOKEN}\nnot this\n")
    assert token_from(None, tmp_path / "token") == TOKEN
    (tmp_path / "empty").write_text("\n")
    for given, file, message in (
        ("x", tmp_path / "token", "give one of them"),
        (None, tmp_path / "none", "cannot be read"),
        (None, tmp_path / "empty", "is empty"),
        (None, tmp_path, "cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            token_from(given, file)


def test_two_servers_on_one_store_lose_and_double_nothing(make_store):
    """All that decides who gets which item is in the file, and SQLite locks it: a second process is safe."""
    store = make_store(ratings=300)
    options = ("--raters", 2, "--repeat-every", 0)
    with running_server(store.path, *options) as (_, one), running_server(store.path, *options) as (_, two):
        found = []
        work = lambda address, first: found.append(drive(address, 4, 2.0, first=first))
        threads = [threading.Thread(target=work, args=job) for job in ((one, 0), (two, 4))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [error for part in found for error in part["errors"]] == []
    acknowledged = found[0]["acknowledged"] | found[1]["acknowledged"]
    counts = audit(store.path, acknowledged, sum(part["undone"] for part in found))
    assert counts.pop("acknowledged") > 0 and not any(counts.values()), counts
    items = Counter(vote["item"] for vote in store.judgements())
    assert max(items.values()) == 2

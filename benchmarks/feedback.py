"""Sixteen raters at once against the feedback server: latency, errors, lost and double votes.

    python benchmarks/feedback.py --check                 # two minutes; writes benchmarks/results/feedback.json

Each rater is a thread with a connection of its own that loads the page, then judges item after item; every twentieth time it
undoes its last judgement. At the end the store must hold exactly what was acknowledged. Twice: raters who take a second for
an item, faster than anybody reads, and raters who take no time at all, which measures how many answers a second there are
(each waits for the disk: synchronous=FULL). Then 300 clients send half a request each and keep their connections: how long
does another rater wait for the page? Client and server share the machine.
"""

import argparse
import http.client
import json
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from minirlhf.feedback.store import Store  # noqa: E402

GOAL_MS = 100  # 95 % of the answers within it
GOAL_PAGE_MS = 1000  # the page, beside half-sent requests


@contextmanager
def running_server(store: Path, *options: object, port: int = 0) -> Iterator[tuple[subprocess.Popen, str]]:
    """(process, address) of `feedback serve` on the store; killed at the end if it still runs."""
    command = [sys.executable, "-m", "minirlhf.feedback", "serve", "--store", store, "--port", port, *options]
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server did not start: exit code {process.wait()}")
        yield process, line.split()[0]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


class Rater:
    """A browser as far as the server can tell: one connection, a cookie, a CSRF token."""

    def __init__(self, address: str, name: str):
        self.host, self.name, self.cookie, self.csrf, self.seconds = (
            urlsplit(address).netloc,
            name,
            "",
            "",
            [],
        )
        self.connection = http.client.HTTPConnection(self.host, timeout=30)

    def request(self, path: str, body: dict | None = None) -> tuple[int, bytes]:
        headers = {"Cookie": self.cookie}
        if body is not None:
            headers |= {
                "Origin": f"http://{self.host}",
                "Content-Type": "application/json",
                "X-CSRF-Token": self.csrf,
            }
        start = time.perf_counter()
        self.connection.request(
            "GET" if body is None else "POST", path, body if body is None else json.dumps(body), headers
        )
        response = self.connection.getresponse()
        content = response.read()
        self.seconds.append(time.perf_counter() - start)
        if cookie := response.getheader("Set-Cookie"):
            self.cookie = cookie.split(";")[0]
        return response.status, content

    def call(self, path: str, body: dict | None = None) -> dict:
        status, content = self.request(path, body)
        if status != 200:
            raise RuntimeError(f"{path}: {status} {content[:200]!r}")
        return json.loads(content)

    def join(self) -> dict | None:
        """Open the page, say who we are; the first item."""
        for path in ("/", "/static/page.js", "/static/page.css"):
            assert self.request(path)[0] == 200, path
        self.csrf = self.call("/api/me")["csrf"]
        self.call("/api/join", {"name": self.name})
        return self.call("/api/next", {})["item"]

    def vote(self, item: dict, answer: dict) -> dict | None:
        """The next item, once this answer is acknowledged."""
        return self.call("/api/vote", {"item": item["item"], "lease": item["lease"], "answer": answer})[
            "item"
        ]


def audit(store: Path, acknowledged: dict[tuple[str, str, int], dict], undone: int) -> dict[str, int]:
    """What the store holds against what raters were told that it holds; double: an item judged twice by one rater."""
    with closing(Store(store).db) as db:
        rows = db.execute(
            "SELECT e.rater, e.item, e.repeat, e.data FROM current c JOIN events e ON e.id = c.event"
        ).fetchall()
        events = dict(tuple(row) for row in db.execute("SELECT kind, count(*) FROM events GROUP BY kind"))
    held = {(rater, item, repeat): json.loads(data) for rater, item, repeat, data in rows}
    same = lambda key: key in held and all(held[key].get(k) == v for k, v in acknowledged[key].items())
    return {
        "acknowledged": len(acknowledged) + undone,
        "lost": sum(not same(key) for key in acknowledged),
        "never acknowledged": len(held.keys() - acknowledged.keys()),
        "double": events.get("vote", 0) - events.get("undo", 0) - len(held),
    }


def drive(address: str, raters: int, seconds: float, pause: float = 0.0, first: int = 0) -> dict:
    """Let raters number `first` and on work for so long, pausing before each item.

    {seconds: of each request, acknowledged, undone, errors}"""
    found = {"seconds": [], "acknowledged": {}, "undone": 0, "errors": []}
    lock, stop = threading.Lock(), time.monotonic() + seconds

    def work(name: str) -> None:
        rater, mine, undone = Rater(address, name), {}, 0
        try:
            time.sleep(pause * random.random())  # they do not all come at once
            item, n = rater.join(), 0
            while item and time.monotonic() < stop:
                time.sleep(pause * (0.5 + random.random()))
                n, key = n + 1, (name, item["item"], 0)
                if n % 20 == 0:
                    last = list(mine)[-1]
                    item, undone = rater.call("/api/undo", {})["item"], undone + 1
                    assert (item["item"], len(mine)) == (last[1], len(mine))
                    del mine[last]
                    continue
                rating = 1 + n % 5
                item = rater.vote(item, {"rating": rating, "note": f"{name} {n}"})
                mine[key] = {"rating": rating, "note": f"{name} {n}"}
        except Exception as e:  # whatever it is, it is a result
            with lock:
                found["errors"].append(f"{name}: {type(e).__name__}: {e}")
        with lock:
            found["seconds"] += rater.seconds
            found["acknowledged"] |= mine
            found["undone"] += undone

    threads = [threading.Thread(target=work, args=[f"rater {first + i}"]) for i in range(raters)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@contextmanager
def half_sent(address: str, n: int) -> Iterator[None]:
    """n connections on which half of a request was sent; they are kept open, as long as the server keeps them."""
    url, clients = urlsplit(address), []
    try:
        for _ in range(n):
            clients.append(socket.create_connection((url.hostname, url.port), timeout=30))
            clients[-1].sendall(b"POST /api/vote HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        yield
    finally:
        for client in clients:
            client.close()


def page_ms(address: str, times: int) -> list[float]:
    """How long a new rater waits for the page, each time on a connection of its own."""
    found = []
    for i in range(times):
        start = time.perf_counter()
        assert Rater(address, f"late {i}").request("/")[0] == 200
        found.append(round(1000 * (time.perf_counter() - start), 1))
    return found


def measure_half_sent(folder: Path, n: int) -> dict:
    store = folder / "store.db"
    Store(store, create=True, seed=1).add([{"mode": "rating", "prompt": "p", "a": "a"}])
    with running_server(store) as (_, address), half_sent(address, n):
        return {"half_sent_requests": n, "page_ms": page_ms(address, 20)}


def fsync_ms(folder: Path) -> float:
    """Median time of the disk to keep 4 KiB: what every acknowledged vote waits for."""
    times = []
    with open(folder / "fsync", "wb") as file:
        for _ in range(50):
            file.write(b"x" * 4096)
            file.flush()
            start = time.perf_counter()
            os.fsync(file.fileno())
            times.append(1000 * (time.perf_counter() - start))
    return round(sorted(times)[25], 2)


def measure(folder: Path, raters: int, seconds: float, items: int, votes: int, pause: float) -> dict:
    store = folder / "store.db"
    Store(store, create=True, seed=1).add(
        {"mode": "rating", "prompt": f"{i}.", "a": f"Text {i}"} for i in range(items)
    )
    started = time.monotonic()
    with running_server(store, "--raters", votes, "--repeat-every", 0) as (_, address):
        up = time.monotonic() - started
        found = drive(address, raters, seconds, pause)
    times = sorted(found["seconds"])
    at = lambda share: round(1000 * times[min(len(times) - 1, int(share * len(times)))], 2)
    return {
        "raters": raters, "pause": pause, "seconds": seconds,
        "items": items, "votes_an_item": votes, "seconds_to_start": round(up, 2),
        "requests": len(times), "requests_a_second": round(len(times) / seconds, 1),
        "ms": {"p50": at(0.5), "p95": at(0.95), "p99": at(0.99), "max": at(1)},
        "errors": found["errors"], "audit": audit(store, found["acknowledged"], found["undone"]),
        "fsync_ms": fsync_ms(folder),
        "machine": {"cpus": os.cpu_count(), "load": os.getloadavg(), "python": platform.python_version()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--raters", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--items", type=int, default=5000)
    parser.add_argument("--votes", type=int, default=3, help="an item")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a goal is missed")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/feedback.json")
    args = parser.parse_args()
    found = {}
    for name, pause in ("a second an item", 1.0), ("no pause", 0.0):
        with tempfile.TemporaryDirectory() as folder:
            found[name] = measure(Path(folder), args.raters, args.seconds, args.items, args.votes, pause)
    with tempfile.TemporaryDirectory() as folder:
        found["half-sent requests"] = measure_half_sent(Path(folder), 300)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    lost_or_double = ("lost", "never acknowledged", "double")
    voted = [f for f in found.values() if "audit" in f]
    wrong = any(f["errors"] or any(f["audit"][key] for key in lost_or_double) for f in voted)
    slow = found["a second an item"]["ms"]["p95"] > GOAL_MS
    slow |= max(found["half-sent requests"]["page_ms"]) > GOAL_PAGE_MS
    sys.exit(int(args.check and (wrong or slow)))


if __name__ == "__main__":
    main()

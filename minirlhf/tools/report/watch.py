"""The page of a run while it goes, on loopback: `python -m minirlhf.report RUN --watch`.

Two things are served: / is the page as it is now, /data what was added since.  A request names, for each
file, the generation and the number of the rows that it has; only new rows are sent.  Nothing is ever written.
"""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from minirlhf import UserError
from minirlhf.support.loopback import is_ours
from minirlhf.support.text import escaped
from minirlhf.tools.report import facts, page
from minirlhf.tools.report.follow import Followed, Rows
from minirlhf.tools.report.results import load_results

HOST = "127.0.0.1"
EVERY = 2  # seconds between two questions of the page
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}
NAMES = {"sft": "SFT", "rm": "the reward model", "ppo": "PPO"}


class Watched:
    """A run that is followed, by any number of pages at once."""

    def __init__(self, run: Path):
        self.run, self.lock = run, threading.Lock()
        self.followed = Followed(run, strict=False)

    def files(self) -> dict[str, Rows]:
        return {**self.followed.metrics, "samples": self.followed.samples}

    def update(self) -> None:
        of_stage = (self.run / "metrics.jsonl").is_file()  # RUN turned out to be a stage's own folder
        if of_stage and self.followed.policy != self.run:
            self.followed = Followed(self.run, strict=False)
        self.followed.update()

    def stamp(self) -> str:
        """What changes when the results, or the explanations, are written again."""
        times = []
        for name in ("results.json", "why.json"):
            try:
                times.append(str((self.run / name).stat().st_mtime_ns))
            except OSError:
                times.append("0")
        return "-".join(times)

    def said(self) -> str:
        """Where the run is, in a sentence."""
        metrics = self.followed.metrics
        damages = ""
        for rows in self.files().values():
            if rows.damages:
                lines = "line is" if rows.damages == 1 else "lines are"
                damages += f" {rows.damages} damaged {lines} left out, the first: {rows.damaged}"
        for stage in ("ppo", "rm", "sft"):
            if rows := metrics[stage].rows:
                step = f"{rows[-1].get('step', 0):g}"
                noun = "iteration" if stage == "ppo" else "step"
                return f"Live: {NAMES[stage]}, {noun} {step}.{damages}"
        return f"Waiting for {self.run} to begin: no metrics.jsonl is there yet.{damages}"

    def page(self) -> str:
        with self.lock:
            self.update()
            said = self.said()
            results = explained = None
            try:
                if (self.run / "results.json").is_file():
                    results = load_results(self.run / "results.json")
                explained = facts.load(self.run / "why.json")
            except UserError as error:
                said += f" {error}"
            have = {name: [rows.generation, len(rows.rows)] for name, rows in self.files().items()}
            live = {"every": EVERY, "have": have, "said": said, "stamp": self.stamp()}
            run = page.Run(page.name_of(self.run), self.followed, results)
            return page.page(run.name, [run], explained, live)

    def data(self, query: str) -> dict[str, Any]:
        """What a page lacks that has so many rows of such generations: "ppo=0.12&samples=3.400"."""
        asked = {name: values[-1] for name, values in parse_qs(query).items()}
        with self.lock:
            self.update()
            parts = {
                name: self._since(name, rows, asked.get(name, "")) for name, rows in self.files().items()
            }
            left = self.followed.samples.left
            return {"parts": parts, "left": left, "said": self.said(), "stamp": self.stamp()}

    @staticmethod
    def _since(name: str, rows: Rows, has: str) -> dict[str, Any]:
        generation, _, count = has.partition(".")
        known = generation == str(rows.generation) and count.isascii() and count.isdigit() and len(count) < 9
        known = known and int(count) <= len(rows.rows)
        start = int(count) if known else 0
        new = page.short_samples(rows, start) if name == "samples" else page.short_metrics(rows, name, start)
        return {"generation": rows.generation, "total": len(rows.rows), "again": not known, "rows": new}


def handler_of(watched: Watched) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "minirlhf", ""
        timeout = 20  # seconds for a request to arrive

        def do_GET(self) -> None:
            if not is_ours(self.headers.get("Host", ""), HOST):
                return self.answer(
                    400, "text/plain", "wrong Host: open the address that the command printed\n"
                )
            where = urlsplit(self.path)
            if where.path == "/":
                return self.answer(200, "text/html", watched.page())
            if where.path == "/data":
                return self.answer(200, "application/json", json.dumps(watched.data(where.query)))
            self.answer(404, "text/plain", "there is nothing here but / and /data\n")

        def refuse(self) -> None:
            self.answer(405, "text/plain", "this server only answers GET\n")

        do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = do_OPTIONS = refuse

        def answer(self, status: int, kind: str, text: str) -> None:
            body = text.encode("utf-8", "replace")
            self.close_connection = True
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            for name, value in HEADERS.items():
                self.send_header(name, value)
            if kind == "text/html":
                self.send_header(
                    "Content-Security-Policy", page.policy(live=True) + "; frame-ancestors 'none'"
                )
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            """Nothing: a question every two seconds is no news."""

    return Handler


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A page that was closed while it was answered is no error."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def serve(run: Path, port: int) -> None:
    """Serve the page of a run until Ctrl-C."""
    watched = Watched(run)
    try:
        server = Server((HOST, port), handler_of(watched))
    except OSError as error:
        raise UserError(f"cannot listen on {HOST}:{port}: {error.strerror}: choose another --port") from None
    with server:
        watched.update()
        print(f"http://{HOST}:{server.server_port}/   (Ctrl-C stops)  {escaped(watched.said())}", flush=True)
        server.serve_forever()

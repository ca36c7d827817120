"""Who is let in: connections that send half a request, and raters who send a wrong token.

Waitress reads a request whole before a thread sees it, so that slow clients hold no thread.  But they hold
connections, of which it has a limited number.  Here the connection that has waited longest for the rest of
its request makes room for a new one, so that the page is there for whoever sends whole requests.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from waitress import create_server
from waitress.channel import HTTPChannel
from waitress.server import BaseWSGIServer

from minirlhf import UserError
from minirlhf.support.text import escaped

ROOM = 200  # connections; a browser holds six at most
WRONG, WINDOW = 10, 60.0  # wrong tokens that an address may send in so many seconds
ADDRESSES = 10_000  # that are remembered
TOKEN_VARIABLE = "MINIRLHF_FEEDBACK_TOKEN"


class Channel(HTTPChannel):
    """A connection that knows since when it waits for the rest of a request."""

    def __init__(self, server: BaseWSGIServer, *args: Any, **options: Any):
        self.began = time.monotonic()
        super().__init__(server, *args, **options)
        waiting = [c for c in server.active_channels.values() if not c.requests and not c.will_close]
        if len(waiting) > ROOM:
            # Half a request first, then connections on which nothing is under way: browsers open them again.
            oldest = min(waiting, key=lambda c: (c.request is None, c.began))
            oldest.will_close = True

    def received(self, data: bytes) -> bool:
        if self.request is None:
            self.began = time.monotonic()
        return super().received(data)


def listen(application: Callable, host: str, port: int, largest: int) -> Any:
    """A waitress server, not yet running, whose requests hold at most `largest` bytes."""
    parts: dict[int, Any] = {}
    server = create_server(
        application,
        map=parts,
        host=host,
        port=port,
        threads=16,
        max_request_body_size=largest,
        connection_limit=4 * ROOM,  # of all addresses of a name together
        asyncore_use_poll=True,  # select() takes no descriptor above 1023
        ident=None,
    )
    for part in parts.values():
        if isinstance(part, BaseWSGIServer):
            part.channel_class = Channel
    return server


class Attempts:
    """Wrong tokens, by the address that they came from."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock, self.lock = clock, threading.Lock()
        self.times: dict[str, list[float]] = {}

    def too_many(self, address: str) -> bool:
        """Whether this address has sent so many that its next token is not even looked at."""
        with self.lock:
            recent = [t for t in self.times.get(address, []) if t > self.clock() - WINDOW]
            return len(recent) >= WRONG

    def count(self, address: str) -> None:
        """Remember a wrong token.  The first from an address is reported in the terminal."""
        with self.lock:
            if address not in self.times:
                if len(self.times) >= ADDRESSES:
                    self.times.clear()
                print(
                    f"a wrong token from {escaped(address)}: {WRONG} in {WINDOW:.0f} seconds are answered, "
                    "and no more are reported",
                    file=sys.stderr,
                )
            kept = self.times.get(address, [])[-WRONG:]
            self.times[address] = [*kept, self.clock()]


def token_from(given: str | None, file: Path | None) -> str | None:
    """The raters' secret: --token, the first line of --token-file, or the environment's; None without any.

    What stands on a command line is seen by everybody who is logged in on this machine."""
    if given is not None and file is not None:
        raise UserError("--token and --token-file both say what the secret is: give one of them")
    if file is None:
        return os.environ.get(TOKEN_VARIABLE) if given is None else given
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"--token-file {file}: cannot be read: {error}") from None
    if not lines or not lines[0].strip():
        raise UserError(f"--token-file {file}: is empty: its first line is the secret")
    return lines[0].strip()

"""The web page's server: a JSON API over the store, and three static files.

Texts of models and notes leave here as JSON and enter the page as text nodes, never as markup.  A request is
served if its Host is ours (a name that an attacker points at us is not).  One that changes something must
also have that Host as its Origin, JSON as its body and the session's CSRF token.  There are no accounts:
raters are colleagues, and a name is what they say it is.

Waitress serves the page, not Flask's development server, which is not made for use.  Waitress reads a request
whole before a thread sees it, so that slow clients hold no thread.
"""

import hmac
import json
import logging
import secrets
import sqlite3
from hashlib import sha256
from urllib.parse import urlsplit

from minirlhf import UserError
from minirlhf.feedback.store import Refused, Store, rater_name
from minirlhf.support.loopback import is_loopback, is_ours

try:
    from flask import Flask, Response, abort, jsonify, request, session
    from waitress import create_server
    from werkzeug.exceptions import HTTPException
except ImportError as e:
    raise UserError(
        f"the page needs {e.name}: pip install 'minirlhf[feedback]', or use feedback rate in the terminal"
    ) from None

MAX_BODY = 16 << 10  # bytes; the longest note has 2,000 characters
MIN_TOKEN = 16
STATUS = {"unknown": 404, "foreign": 403, "replayed": 409, "taken": 409}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def create_app(store: Store, host: str = "127.0.0.1", token: str | None = None) -> Flask:
    """The WSGI application.  `token` is the secret that raters must have been given."""
    app = Flask(__name__)
    digest = sha256((token or "").encode()).hexdigest()
    app.config |= {
        "SECRET_KEY": store.meta["secret"],  # sessions outlive the server
        "SESSION_COOKIE_NAME": "minirlhf-"
        + sha256(store.meta["secret"].encode()).hexdigest()[:8],  # ports share cookies
        "SESSION_COOKIE_SAMESITE": "Strict",
        "MAX_CONTENT_LENGTH": MAX_BODY,
    }

    @app.before_request
    def guard() -> None:
        if not is_ours(request.host, host):
            abort(400, "wrong Host: open the page under the address that the server printed")
        if request.method == "POST":
            if urlsplit(request.headers.get("Origin", "")).netloc != request.host:
                abort(403, "wrong Origin: this page does not belong to this server")
            if request.mimetype != "application/json":
                abort(415, "expected application/json")
            sent = request.headers.get("X-CSRF-Token", "")
            if not hmac.compare_digest(sent.encode(), session.get("csrf", secrets.token_hex()).encode()):
                abort(403, "the session has ended: reload the page")

    @app.after_request
    def harden(response: Response) -> Response:
        response.headers.update(HEADERS)
        if request.path.startswith("/api/"):
            response.headers["Cache-Control"] = "no-store"
        return response

    @app.errorhandler(Exception)
    def refuse(error: Exception) -> tuple[Response, int]:
        """Every error is JSON with a sentence for the page to show."""
        more = {}
        if isinstance(error, HTTPException):
            status, message = error.code or 500, error.description or error.name
        elif isinstance(error, Refused):
            status, message, more = STATUS[error.why], str(error), {"why": error.why}
        elif isinstance(error, UserError):
            status, message = 400, str(error)
        elif isinstance(error, sqlite3.Error):
            status, message = (
                503,
                f"the store cannot be written ({error}): free the disk or the file, then send it again",
            )
        else:
            app.logger.exception("bug")
            status, message = 500, "an error of the server's: see its terminal"
        return jsonify(error=message, **more), status

    def body(*fields: str) -> list:
        try:
            found = json.loads(request.get_data())
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or any(type(found.get(f, "")) is not str for f in fields):
            raise UserError(f"body: expected a JSON object with the texts {', '.join(fields) or '(none)'}")
        return [found, *(found.get(f, "") for f in fields)]

    def rater() -> str:
        if "rater" not in session or (token and session.get("token") != digest):
            abort(401, "say who you are first: reload the page")
        return session["rater"]

    def answer(item: dict | None, **more) -> Response:
        return jsonify(item=item, progress=store.progress(rater()), **more)

    @app.get("/")
    def page() -> Response:
        return app.send_static_file("page.html")

    @app.get("/api/me")
    def me() -> Response:
        session.permanent = True  # resume tomorrow
        session.setdefault("csrf", secrets.token_hex(16))
        known = "rater" in session and (not token or session.get("token") == digest)
        said = (
            {"rater": session["rater"], "guidelines": store.meta["guidelines"]} if known else {"rater": None}
        )
        return jsonify(csrf=session["csrf"], needs_token=bool(token), **said)

    @app.post("/api/join")
    def join() -> Response:
        _, name, given = body("name", "token")
        if (
            token
            and session.get("token") != digest
            and not hmac.compare_digest(given.encode(), token.encode())
        ):
            abort(401, "wrong token: open the whole link that you were given")
        session["rater"], session["token"] = rater_name(name), digest
        return me()

    @app.post("/api/next")
    def next_item() -> Response:
        return answer(store.next(rater(), release=body()[0].get("release") is True))

    @app.post("/api/vote")
    def vote() -> Response:
        found, item, lease = body("item", "lease")
        return answer(store.vote(rater(), item, lease, found.get("answer")), stored=True)

    @app.post("/api/undo")
    def undo() -> Response:
        return answer(store.undo(rater()))

    @app.post("/api/edit")
    def edit() -> Response:
        found, item = body("item")
        if type(repeat := found.get("repeat")) is not int or repeat not in (0, 1):
            raise UserError("repeat: expected 0 or 1")
        return answer(store.edit(rater(), item, repeat))

    @app.get("/api/history")
    def history() -> Response:
        return jsonify(judged=store.history(rater()))

    return app


def serve(store: Store, host: str, port: int, token: str | None) -> None:
    """Serve until Ctrl-C; beyond loopback only with a token."""
    if token is not None and len(token) < MIN_TOKEN:
        raise UserError(
            f"--token must have {MIN_TOKEN} characters or more, such as {secrets.token_urlsafe(16)}"
        )
    if not is_loopback(host) and token is None:
        raise UserError(
            f"--host {host} lets others in: it needs a --token too, such as {secrets.token_urlsafe(16)}"
        )
    if not store.rows("SELECT 1 FROM items LIMIT 1"):
        raise UserError(
            f"{store.path}: no items yet: put some in with python -m minirlhf.feedback sample, or add"
        )
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # a short queue is no news
    try:
        server = create_server(
            create_app(store, host, token),
            host=host,
            port=port,
            threads=16,
            max_request_body_size=MAX_BODY,
            ident=None,
        )
    except (OSError, ValueError) as e:
        raise UserError(f"cannot listen on {host}:{port}: {e}: choose another --port or --host") from None
    port = getattr(server, "effective_port", port)
    # After #, the token stays in the browser: no log and no Referer has it.
    address = f"http://{host}:{port}/{f'#{token}' if token else ''}"
    print(f"{address}   (Ctrl-C stops; everything acknowledged is stored)", flush=True)
    server.run()

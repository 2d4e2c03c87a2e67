"""`python -m demos.serve`: the page of `demos.browser`, filled while a model generates, with a slider that changes the
budget of the tokens to come.

The server is Python's own, on 127.0.0.1 alone. One generation runs at a time, since a budget belongs to the model: it
ends with its reader, and when another one begins.

    GET  /            the page
    GET  /events      a generation as server-sent events: head, token ..., done; or refused
    POST /budget      mean=6: from the next token on; mean= empty: as trained
    POST /stop        ends the generation that runs
    GET  /page.html   the last generation as one file that works offline
"""

import foundation.starting  # noqa: F401

# isort: split

import contextlib
import dataclasses
import html
import json
import webbrowser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import tyro

from demos.live import LiveModel
from demos.page import page
from demos.runs import model_of
from demos.session import MOST_PROMPT, MOST_TOKENS, Session, asked, fields_of, number
from foundation.command import run_command
from foundation.numbers import check_numbers
from lm.generation_trace import Recorder

# How long a new generation waits for the one before it to end: a token, or a budget that is being set.
TAKE_OVER_S = 30

FORM = f"""<form class="start" id="start"><label>Prompt
<textarea name="prompt" rows="2" maxlength="{MOST_PROMPT}">{html.escape("def main(argv):")}
</textarea></label>
<label>Seed<input name="seed" type="number" value="0" min="0" step="1"></label>
<label>Tokens<input name="max_new_tokens" type="number" value="160" min="1" max="{MOST_TOKENS}" step="1"></label>
<label>Temperature<input name="temperature" type="number" value="0.8" min="0" step="0.1"></label>
<label>Tokens/s<input name="pace" type="number" value="20" min="0.1" step="any"></label>
<button class="plain strong" id="go">Start</button>
<button class="plain" type="button" id="stop" disabled>Stop</button></form>
<p class="state" role="status"><span id="state">ready</span>
<a id="keep" href="page.html" target="_blank" hidden>keep this text as one page</a></p>"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Generate text in a page of the browser.

    Attributes:
        run: folder of a trained model or of the run that trained it; the best finished one under runs/ by default.
        port: of 127.0.0.1; 0 for any that is free.
        open: also open the page in this machine's browser.
    """

    run: Path | None = None
    port: int = 8017
    open: bool = False

    def __post_init__(self) -> None:
        check_numbers(self, port=0)
        if self.port > 65535:
            raise ValueError(f"ServeConfig.port: {self.port}; legal: 0 to 65535")


class Handler(BaseHTTPRequestHandler):
    """One request. `session` and its page are set by `serve`."""

    protocol_version = "HTTP/1.1"
    session: Session
    page: str

    def do_GET(self) -> None:
        if not self.is_ours():
            return
        where = urlsplit(self.path)
        if where.path == "/":
            self.answer(200, self.page, "text/html")
        elif where.path == "/events":
            self.events(where.query)
        elif where.path == "/page.html" and self.session.last is not None:
            self.answer(200, recorded_page(self.session), "text/html")
        else:
            self.answer(404, f"{where.path}: nothing here; legal: /, /events, /page.html behind a generation")

    def do_POST(self) -> None:
        if not self.is_ours():
            return
        try:
            length = int(self.headers.get("Content-Length") or 0)
            if not 0 <= length <= 1000:
                raise ValueError(f"{length} bytes; legal: at most 1000")
            fields = fields_of(self.rfile.read(length).decode())
            if self.path == "/stop":
                self.session.stopping.set()
            elif self.path == "/budget":
                if fields.keys() - {"mean"}:
                    raise ValueError(f"unknown field {min(fields.keys() - {'mean'})!r}; legal: mean")
                mean = number(fields, "mean", float, None)
                self.session.set_budget(mean)
            else:
                self.answer(404, f"{self.path}: nothing here; legal: /budget, /stop")
                return
            self.answer(200, "ok")
        except ValueError as error:
            # The rest of a body that was not read would be taken for the next request.
            self.close_connection = True
            self.answer(400, str(error))

    def events(self, query: str) -> None:
        """Streams a generation until it or its reader ends."""
        session, wanted, refusal = self.session, None, ""
        try:
            wanted = asked(fields_of(query))
        except ValueError as error:
            refusal = str(error)
        # One that will begin ends the one before.
        if wanted is not None:
            session.stopping.set()
        if wanted is not None and not session.running.acquire(timeout=TAKE_OVER_S):
            self.answer(409, "another generation runs and does not end; stop it first")
            return
        try:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream; charset=utf-8")
            self.send_header("Cache-Control", "no-store")
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True
            try:
                if wanted is not None:
                    with contextlib.closing(session.events(wanted)) as events:
                        for name, data in events:
                            self.send_event(name, data)
            except ValueError as error:
                refusal = str(error)
            if refusal:
                self.send_event("refused", {"error": " ".join(refusal.split())})
        except ConnectionError:
            # Its reader has gone, and with it the generation.
            pass
        finally:
            if wanted is not None:
                session.running.release()

    def send_event(self, name: str, data: dict[str, Any]) -> None:
        self.wfile.write(f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode())
        self.wfile.flush()

    def answer(self, status: int, content: str, kind: str = "text/plain") -> None:
        body = content.encode()
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

    def is_ours(self) -> bool:
        """Refuses what a page of another origin asks for, under whatever name it reaches this machine."""
        host = self.headers.get("Host", "")
        origin = self.headers.get("Origin")
        name, _, port = host.rpartition(":")
        known = name in ("127.0.0.1", "localhost") and port == str(self.server.server_address[1])
        alone = self.headers.get("Sec-Fetch-Site", "none") in ("none", "same-origin")
        if known and alone and origin in (None, f"http://{host}"):
            return True
        self.close_connection = True
        self.answer(403, f"asked as {host!r} from {origin!r}; legal: the page of this server")
        return False

    def log_message(self, format: str, *arguments: object) -> None:
        """Requests are not printed."""


class Server(ThreadingHTTPServer):
    """Errors of a connection end that connection."""

    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A reader that goes away in the middle of a line is no news."""


def live_page(session: Session) -> str:
    """The page without a token."""
    live = session.live
    empty = Recorder(live.model, prompt=(), table=session.table(), source=str(live.folder))
    return page(empty.text(), empty.scores(), live.run, live.model.config, live=FORM)


def recorded_page(session: Session) -> str:
    """The last generation, as far as it has come."""
    assert session.last is not None
    with session.model:
        text, scores = session.last.text(), session.last.scores()
    return page(text, scores, session.live.run, session.live.model.config)


def serve(config: ServeConfig) -> Server:
    """The server, bound and not yet serving.

    Raises:
        ValueError: for a folder without a model, or a port that is taken.
    """
    session = Session(LiveModel(model_of(config.run)))
    handler = type("SessionHandler", (Handler,), {"session": session, "page": live_page(session)})
    try:
        return Server(("127.0.0.1", config.port), handler)
    except OSError as error:
        raise ValueError(f"--port {config.port}: {error.strerror}; legal: one that is free, 0 for any") from error


def main(config: ServeConfig) -> None:
    """Serves until it is stopped."""
    server = serve(config)
    handler: Any = server.RequestHandlerClass
    address = f"http://127.0.0.1:{server.server_address[1]}/"
    print(f"{handler.session.live.run}\n{address}   Ctrl-C ends it", flush=True)
    if config.open:
        webbrowser.open(address)
    with server:
        server.serve_forever()


if __name__ == "__main__":
    run_command(
        lambda arguments: tyro.cli(ServeConfig, prog="python -m demos.serve", description=__doc__, args=arguments),
        main,
    )

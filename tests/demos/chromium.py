"""A real browser for tests, driven by its own protocol over two pipes: pages, clicks, keys, screenshots.

https://chromedevtools.github.io/devtools-protocol/
"""

import base64
import contextlib
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars"),
    *("--disable-extensions", "--disable-background-networking", "--mute-audio", "--remote-debugging-pipe"),
)
KEYS = {"ArrowRight": 39, "ArrowLeft": 37, "ArrowUp": 38, "ArrowDown": 40, "Home": 36, "End": 35, "Tab": 9, "Enter": 13}
WAIT_S = 30


def browser_path() -> str | None:
    """The first browser of this family on the machine; CHROMIUM names another."""
    named = os.environ.get("CHROMIUM")
    return named or next((path for name in NAMES if (path := shutil.which(name))), None)


needs_browser = pytest.mark.skipif(
    browser_path() is None,
    reason=f"no headless browser: none of {', '.join(NAMES)} is installed (CHROMIUM=PATH names one)",
)


class Tab:
    """One page of a browser.

    Attributes:
        errors: what its scripts threw, and what the browser complained of.
        requests: addresses that were asked for.
    """

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read, self._rest = write, read, b""
        self._ids, self._session = itertools.count(1), None
        self._answers: dict[int, dict] = {}
        self._events: list[dict] = []
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict:
        """One command; its result."""
        number = next(self._ids)
        session = {} if self._session is None else {"sessionId": self._session}
        message = {"id": number, "method": method, "params": parameters, **session}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + WAIT_S
        while number not in self._answers:
            self._listen(until)
        answer = self._answers.pop(number)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _listen(self, until: float) -> None:
        assert select.select([self._read], [], [], max(until - time.monotonic(), 0))[0], "the browser does not answer"
        read = os.read(self._read, 1 << 20)
        assert read, "the browser has gone"
        *whole, self._rest = (self._rest + read).split(b"\0")
        for message in map(json.loads, whole):
            if "id" in message:
                self._answers[message["id"]] = message
            else:
                self._events.append(message)
                self._note(message["method"], message["params"])

    def _note(self, event: str, told: dict) -> None:
        if event == "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif event == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.errors.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")
        elif event == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])

    def open(self, address: str) -> None:
        """Goes to a page and waits until it is there."""
        self._events.clear()
        self.send("Page.navigate", url=address)
        until = time.monotonic() + WAIT_S
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._listen(until)

    def js(self, expression: str) -> Any:
        """The value of an expression."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, (expression, found["exceptionDetails"])
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = WAIT_S) -> None:
        """Until an expression is true."""
        until = time.monotonic() + seconds
        while not self.js(expression):
            assert time.monotonic() < until, f"never true: {expression}; {self.errors}"
            time.sleep(0.05)

    def window(self, width: int, height: int = 900, *, dark: bool = False) -> None:
        """A size in CSS pixels, and a theme."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def place(self, selector: str, across: float = 0.5) -> tuple[float, float]:
        """A point of an element, in the window: so far from its left edge, in its middle line."""
        box = self.js(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            " return [b.left, b.top, b.width, b.height]; })()"
        )
        return box[0] + across * box[2], box[1] + box[3] / 2

    def point(self, selector: str) -> None:
        """Moves the pointer over an element."""
        x, y = self.place(selector)
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str, across: float = 0.5) -> None:
        """Presses and lets go."""
        x, y = self.place(selector, across)
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for what in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=what, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        """A key, as a keyboard sends it."""
        text = {"text": "\r"} if key == "Enter" else {}
        for what in ("keyDown", "keyUp"):
            code = KEYS[key]
            self.send("Input.dispatchKeyEvent", type=what, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def type(self, text: str) -> None:
        """Text, where the keyboard writes."""
        self.send("Input.insertText", text=text)

    def overflows(self) -> list[str]:
        """What sticks out of the window to the right, but for what scrolls inside a box of its own."""
        return self.js(
            "(() => { const all = document.documentElement; const wide = all.clientWidth; const found = [];"
            " if (all.scrollWidth > wide) found.push(`page ${all.scrollWidth}`);"
            " for (const e of document.body.querySelectorAll('*')) {"
            "   const b = e.getBoundingClientRect();"
            "   if (b.width && b.right > wide + 1 && !e.closest('.scroll'))"
            "     found.push(`${e.tagName}.${e.getAttribute('class')} ${b.right}`); }"
            " return found; })()"
        )

    def screenshot(self, path: Path) -> None:
        """The window as a PNG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def opened_tab(folder: Path) -> Iterator[Tab]:
    """A tab of a browser that keeps its files in `folder` and ends with the block."""
    path = browser_path()
    assert path is not None
    theirs_read, write = os.pipe()
    read, theirs_write = os.pipe()
    # The browser reads from descriptor 3 and writes to 4; numbers above both cannot be overwritten on the way there.
    given = [fcntl.fcntl(end, fcntl.F_DUPFD, 100) for end in (theirs_read, theirs_write)]
    begin = f"import os, sys; os.dup2({given[0]}, 3); os.dup2({given[1]}, 4); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", begin, path, *FLAGS, f"--user-data-dir={folder}"]
    process = subprocess.Popen(command, pass_fds=given, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for end in (theirs_read, theirs_write, *given):
        os.close(end)
    try:
        yield Tab(write, read)
    finally:
        os.close(write)
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(read)

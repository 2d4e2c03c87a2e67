"""What is printed: it never ends a command, and on a terminal it does nothing but appear."""

import contextlib
import os
import re
from collections.abc import Callable
from typing import Any, TextIO

# All control characters but tab and line feed: C0, delete, C1.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
COLOUR = re.compile(r"(\x1b\[[0-9;]*m)")


def escaped(text: str) -> str:
    r"""Control characters as they are written in Python, `\x1b`: text from a model or a file may hold sequences that
    move a terminal's cursor or change its title."""
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


class Console:
    """A text stream that cannot fail: characters that its encoding lacks are replaced, a reader that has gone or a full
    disk costs the output and nothing else. On a terminal, control sequences other than colours are escaped.

    Everything else is the stream's own.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        shown = text
        if self._stream.isatty():
            parts = COLOUR.split(text)
            # Every second part is what the pattern matched.
            shown = "".join(part if index % 2 else escaped(part) for index, part in enumerate(parts))
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._attempt(lambda: self._stream.write(shown.encode(encoding, "replace").decode(encoding)))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def close_quietly(self) -> None:
        """Flushes; what cannot be written is given up, so that the interpreter does not try again when it leaves."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._give_up()

    def _attempt(self, do: Callable[[], object]) -> None:
        try:
            do()
        except BrokenPipeError:
            self._give_up()
        except (OSError, ValueError):
            # A full disk may have room again for the next line; a stream that was closed stays closed.
            pass

    def _give_up(self) -> None:
        # A captured stream has no file behind it.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

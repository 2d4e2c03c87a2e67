"""A terminal as a screen that is drawn again and again, and single keys from it. What was there before comes back."""

import contextlib
import os
import select
import shutil
import sys
import termios
import time
import tty
from collections.abc import Iterator, Sequence

ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
HOME, CLEAR_LINE, CLEAR_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
# What terminals send for arrows, by what it means here.
ARROWS = {
    "\x1b[A": "+",
    "\x1b[C": "+",
    "\x1b[B": "-",
    "\x1b[D": "-",
    "\x1bOA": "+",
    "\x1bOC": "+",
    "\x1bOB": "-",
    "\x1bOD": "-",
}


def is_screen() -> bool:
    """Whether there is a terminal to draw on and to read keys from."""
    streams = (sys.stdin, sys.stdout, sys.__stdin__, sys.__stdout__)
    return all(stream is not None and stream.isatty() for stream in streams)


class Screen:
    """The terminal while it is a screen; made by `opened_screen`."""

    def __init__(self) -> None:
        # The console of a command escapes control sequences; every text drawn here has had that done already.
        assert sys.__stdout__ is not None
        assert sys.__stdin__ is not None
        self._out, self._keyboard = sys.__stdout__, sys.__stdin__.fileno()

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines."""
        columns, lines = shutil.get_terminal_size()
        return columns, lines

    def draw(self, lines: Sequence[str]) -> None:
        """Replaces what is there."""
        text = f"{CLEAR_LINE}\r\n".join(lines[: self.size[1]])
        self.write(f"{HOME}{text}{CLEAR_LINE}{CLEAR_BELOW}")

    def write(self, text: str) -> None:
        encoding = self._out.encoding or "utf-8"
        self._out.write(text.encode(encoding, "replace").decode(encoding))
        self._out.flush()

    def keys(self, seconds: float) -> list[str]:
        """Keys that were pressed, after at most so long: at once where some wait already."""
        found: list[str] = []
        until = time.monotonic() + seconds
        while not found and select.select([self._keyboard], [], [], max(until - time.monotonic(), 0))[0]:
            read = os.read(self._keyboard, 64).decode("utf-8", "ignore")
            if not read:
                # The terminal has gone.
                return ["q"]
            found += [ARROWS[read]] if read in ARROWS else list(read)
        return found


@contextlib.contextmanager
def opened_screen() -> Iterator[Screen]:
    """The terminal as a screen, until the block ends, however it does."""
    screen = Screen()
    before = termios.tcgetattr(screen._keyboard)
    try:
        # Keys come one by one and are not shown; signals stay what they are.
        tty.setcbreak(screen._keyboard)
        screen.write(ENTER)
        yield screen
    finally:
        with contextlib.suppress(OSError, ValueError):
            screen.write(LEAVE)
        with contextlib.suppress(termios.error, OSError):
            termios.tcsetattr(screen._keyboard, termios.TCSADRAIN, before)

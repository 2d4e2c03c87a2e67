"""SIGTERM and Ctrl-C ask a run to save and leave; asking twice kills it at once."""

import signal
import threading
from types import FrameType

HANDLED = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
    """A run was asked to stop and has saved everything.

    `exit_code` is what a shell reports for that signal: 143 after SIGTERM, 130 after Ctrl-C.
    """

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class StopSignals:
    """While entered, `signal` is the number of the stop signal that came, or None. Does nothing outside the main
    thread."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._remember) for number in HANDLED}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        # The second signal finds the handlers of before: someone who asks twice does not want to wait for the save.
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        self._previous = {}

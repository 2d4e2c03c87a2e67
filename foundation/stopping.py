"""Signals that ask a process to stop: SIGTERM, Ctrl-C, a closed terminal, and SIGUSR1, which schedulers send ahead of
the end of a job."""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
# A terminal, a shell and torchrun each pass the same request on: copies of it come within moments.
ONE_REQUEST_S = 1.0


class Interrupted(BaseException):
    """A process was asked to stop.

    Not an `Exception`: what goes on after errors must not go on after this.

    `exit_code` is what a shell reports for that signal: 143 after SIGTERM, 130 after Ctrl-C, 129 after SIGHUP, 138
    after SIGUSR1.
    """

    def __init__(self, signal_number: int, message: str = "") -> None:
        super().__init__(message or f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number, self.exit_code = signal_number, 128 + signal_number

    # Processes send each other what stopped them.
    def __reduce__(self) -> tuple[type["Interrupted"], tuple[int, str]]:
        return type(self), (self.signal_number, str(self))


# When a handler ran last. Python runs them when the call that it is in returns.
_heard_at = -ONE_REQUEST_S


@contextlib.contextmanager
def not_held_up() -> Iterator[None]:
    """While entered, a stop signal also reaches someone who waits for one long call (learning a tokenizer, a large
    product): behind ONE_REQUEST_S a line says that the call has to return first, and the same or another signal then
    ends the process at once. Needs the main thread, and calls that let other threads run.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reading,), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)
        watcher.join()
        os.close(reading)


def _watch(reading: int) -> None:
    """Reads the number of each signal as it comes, until the other end is closed."""
    # When the oldest signal came whose handler has not run.
    came, said = None, False
    while True:
        ready, _, _ = select.select([reading], [], [], None if came is None else ONE_REQUEST_S)
        # A handler may have run before this thread did.
        if came is not None and _heard_at > came - ONE_REQUEST_S:
            came = None
        if not ready:
            if came is not None and not said:
                said = True
                _say("stopping when the call that is under way returns; asked again, at once")
            continue
        if not (numbers := os.read(reading, 1)):
            return
        if (number := numbers[0]) not in SIGNALS or signal.getsignal(number) is signal.SIG_IGN:
            continue
        if came is None:
            came = time.monotonic()
        elif time.monotonic() - came > ONE_REQUEST_S:
            _say(f"stopped by {signal.Signals(number).name}")
            os._exit(128 + number)


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"\n{line}\n".encode())


class StopSignals:
    """While entered, `signal` is the number of the stop signal that came, or None. Does nothing outside the main
    thread, and leaves alone what is ignored (nohup) or handled below Python.

    Copies of a request are the same request. Only Ctrl-C pressed again, later than a copy comes, reaches the handlers
    of before: someone who asks twice does not want to wait.

    Args:
        at_once: raise Interrupted wherever the process is. The second Ctrl-C then ends it without another word.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.at_once = at_once
        self.signal: int | None = None
        self._came = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.getsignal(number) for number in SIGNALS}
            self._previous = {
                number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)
            }
            for number in self._previous:
                signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        self._previous = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        global _heard_at
        _heard_at = time.monotonic()
        if self.signal is None:
            self.signal, self._came = number, time.monotonic()
            if self.at_once:
                raise Interrupted(number)
        elif number == signal.SIGINT and time.monotonic() - self._came > ONE_REQUEST_S:
            self.__exit__()
            if self.at_once:
                signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

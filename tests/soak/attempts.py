"""One attempt: a command in a process of its own that is forked from a parent which has imported everything, so that
it costs what the command costs and may die of anything.

What may end it is set up inside of it: at the n-th change of a folder's files, or at the n-th tensor file, which is
then left half written. Nothing in this file lets a killed process tidy up.
"""

import dataclasses
import os
import random
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import safetensors.torch

from staged_training import checkpoint

# Of the audited events those that change files; an "open" counts where it may write.
CHANGES = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "os.link", "os.symlink")
TRACEBACK = "Traceback (most recent call last)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
    """How an attempt ended.

    Attributes:
        code: exit code; minus the signal's number where one ended it.
        output: both streams, in the order in which they were written.
        timed_out: it was asked to stop because it took too long.
    """

    code: int
    output: str
    timed_out: bool = False

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL

    @property
    def problem(self) -> str:
        """What no attempt may end with, whatever happened to it; "" where it ended well."""
        if TRACEBACK in self.output:
            places = [line.strip() for line in self.output.splitlines() if line.startswith("  File ")]
            return f"traceback: {self.last_line} ({places[-1] if places else 'nowhere'})"
        if self.code < 0 and not self.killed and not self.timed_out:
            return f"ended by {signal.Signals(-self.code).name}"
        if self.timed_out and self.killed:
            return "did not stop when asked to"
        return ""

    @property
    def last_line(self) -> str:
        return next(iter(self.output.strip().splitlines()[::-1]), "(no output)")


class Attempt:
    """A forked process that runs `work`; its streams come through one pipe, so that a limit on files leaves them."""

    def __init__(self, work: Callable[[], object]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._pipe, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._pipe)
            _run_and_leave(work, writing)
        os.close(writing)
        self._said = b""

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def ask_to_stop(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def ended(self) -> Ended | None:
        """How it ended, if it has; reads what it says. Not to be called again after that."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        while select.select([self._pipe], [], [], 0)[0] and (piece := os.read(self._pipe, 1 << 16)):
            self._said += piece
        if not pid:
            return None
        os.close(self._pipe)
        return Ended(code=os.waitstatus_to_exitcode(status), output=self._said.decode("utf-8", "replace"))


def together(
    attempts: list[Attempt], *, timeout_s: float = 300.0, patience_s: float = 20.0, kill_after_s: float | None = None
) -> Ended:
    """Waits for processes that work together. As torchrun does, ends the others where one fails.

    Args:
        timeout_s: SIGTERM comes then, and SIGKILL `patience_s` later.
        kill_after_s: SIGKILL comes then.

    Returns:
        how the first that failed ended, or the first of all.
    """
    began, running, found, first, asked = time.monotonic(), list(attempts), {}, None, False
    while running:
        ends = {}
        # Twice: one that was killed after the first look is why another had failed by then.
        for _ in range(2):
            ends |= {process: end for process in running if (end := process.ended()) is not None}
            running = [process for process in running if process not in ends]
        found |= ends
        # The killed ones first: what they worked with fails in consequence.
        for end in sorted(ends.values(), key=lambda end: not end.killed):
            if end.code and first is None:
                first = end
                for other in running:
                    other.kill()
        taken = time.monotonic() - began
        if kill_after_s is not None and taken > kill_after_s:
            kill_after_s = None
            for process in running:
                process.kill()
        if taken > timeout_s + (patience_s if asked else 0):
            for process in running:
                process.kill() if asked else process.ask_to_stop()
            asked = True
        time.sleep(0 if ends else 0.005)
    return dataclasses.replace(first or found[attempts[0]], timed_out=asked)


def attempt(work: Callable[[], object], *, timeout_s: float = 300.0, patience_s: float = 20.0) -> Ended:
    """Runs `work` in a forked process to its end, whatever that is."""
    return together([Attempt(work)], timeout_s=timeout_s, patience_s=patience_s)


def _run_and_leave(work: Callable[[], object], writing: int) -> None:
    """In the child: never returns, and runs nothing of what the parent would run at its exit."""
    code = 1
    try:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for stream in (1, 2):
            os.dup2(writing, stream)
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, encoding="utf-8") for stream in (1, 2))
        work()
        code = 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def on_change(folder: Path, act: Callable[[int], object]) -> None:
    """From now on, `act` is called whenever this process is about to change names or files below `folder` (opening to
    write, making, renaming, removing), with the number of the change, from 1."""
    number, below = 0, str(folder)

    def watch(event: str, arguments: tuple) -> None:
        nonlocal number
        if event == "open":
            changes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        else:
            changes = event in CHANGES
        if changes and (str(arguments[0]) == below or str(arguments[0]).startswith(below + os.sep)):
            number += 1
            act(number)

    sys.addaudithook(watch)


def at_tensor_file(number: int) -> None:
    """From now on, the n-th tensor file is left half written, and the process is gone."""
    left, real = number, safetensors.torch.save_file

    def write(tensors: dict, path: Path) -> None:
        nonlocal left
        real(tensors, path)
        left -= 1
        if left == 0:
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    safetensors.torch.save_file = checkpoint.save_file = write


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def limit_files(n_bytes: int) -> None:
    """No file of this process grows beyond `n_bytes` from now on: what it sees of a disk that has run full. Python
    ignores the signal that comes with it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def log_uniform(draw: random.Random, lowest: float, highest: float) -> int:
    return round(lowest * (highest / lowest) ** draw.random())

"""Commands of this project as processes of their own that cost what the command does: forked from the process of the
tests, which has imported what they import. Starting Python and importing torch takes as long as the rest of most tests.

A forked process is one like any other: it has streams, a folder, an environment and an exit code of its own, is sent
signals, and so are those that it starts. What differs: modules are as the tests have left them, patches included
(reports without figures, say), and what is read from the environment once is not read again, see
`forget_our_modules`. Tests of how a process
starts, and some of each kind that are marked `long`, start real ones.
"""

import atexit
import contextlib
import gc
import importlib
import inspect
import logging
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

# The first optimizer of a process imports torch's compiler, which takes as long as torch, and several processes import
# more: here that has been done, once for all that are forked.
import torch
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.tensor

ROOT = Path(__file__).resolve().parent.parent
POPEN = subprocess.Popen
# Neither a GPU's driver nor macOS's libraries survive a fork.
FORKS = sys.platform == "linux" and not torch.cuda.is_available()


def nothing() -> None: ...


@contextlib.contextmanager
def forking(prepare: Callable[[], object] = nothing) -> Iterator[None]:
    """While entered, commands that tests and commands start are forked.

    Args:
        prepare: what every forked process does ahead of its command.
    """
    before = subprocess.Popen, Forked.prepare
    subprocess.Popen, Forked.prepare = Forked, staticmethod(prepare)
    try:
        yield
    finally:
        subprocess.Popen, Forked.prepare = before[0], staticmethod(before[1])


class Forked(POPEN):
    """`subprocess.Popen`, which forks where the command is `[sys.executable, "-m", a module of ours, ...]`,
    `[sys.executable, FILE.py, ...]` or `[sys.executable, "-c", PROGRAM, ...]`."""

    prepare: Callable[[], object] = staticmethod(nothing)

    def _execute_child(self, *values: Any, **named: Any) -> None:
        real: Any = POPEN._execute_child  # pyright: ignore[reportAttributeAccessIssue]
        given = inspect.signature(real).bind(self, *values, **named).arguments
        words = [os.fspath(word) for word in given["args"]] if isinstance(given["args"], (list, tuple)) else []
        if not FORKS or not _is_ours(words):
            real(self, *values, **named)
            return
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become(words[1:], given, self.prepare)
        self._child_created = True
        ends = [given[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")]
        self._close_pipe_fds(*ends)  # pyright: ignore[reportAttributeAccessIssue]


def _is_ours(words: list[str]) -> bool:
    if len(words) < 2 or words[0] != sys.executable:
        return False
    if words[1] == "-m":
        return (ROOT / words[2].split(".")[0]).is_dir()
    return words[1] == "-c" or words[1].endswith(".py")


def _become(words: list[str], given: dict[str, Any], prepare: Callable[[], object]) -> NoReturn:
    """In the child: what a new process would be, and its end."""
    code = 1
    try:
        # What the tests have left for the collector may wait, at its end, for a thread that is not here.
        gc.freeze()
        atexit._clear()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if given["start_new_session"]:
            os.setsid()
        for stream, end in enumerate((given["p2cread"], given["c2pwrite"], given["errwrite"])):
            if end not in (-1, stream):
                os.dup2(end, stream)
        _forget_logs_of_pytest()
        # As the start of another program does: an end of a pipe that stays open here would keep its reader waiting.
        os.closerange(3, 4096)
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", encoding="utf-8", closefd=False) for stream in (1, 2))
        if given["env"] is not None:
            os.environ.clear()
            os.environ.update(given["env"])
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
        if given["cwd"] is not None:
            os.chdir(given["cwd"])
        if Path.cwd() != ROOT and words[0] == "-m":
            forget_our_modules()
        prepare()
        _run(words)
        code = 0
    except SystemExit as stop:
        if stop.code is not None and not isinstance(stop.code, int):
            print(stop.code, file=sys.stderr)
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                code = code or 120
        os._exit(code & 0xFF)


def _forget_logs_of_pytest() -> None:
    """They go to a file that is not open here, and whose number becomes that of another file."""
    # Only those that exist, and without logging's own lock, which another thread may have held at the fork.
    there = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    for logger in (logging.root, *there):
        logger.handlers = [handler for handler in logger.handlers if not type(handler).__module__.startswith("_pytest")]
    logging.root.setLevel(logging.WARNING)


def _run(words: list[str]) -> None:
    if words[0] == "-m":
        module = words[1]
        sys.argv = ["-m", *words[2:]]
        for name in (module, f"{module}.__main__"):
            # One that is there already would run a second time, and Python warns of that.
            if not hasattr(sys.modules.get(name), "__path__"):
                sys.modules.pop(name, None)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def forget_our_modules() -> None:
    """They are imported anew, from the working folder: with what the environment says now, or those of another
    checkout."""
    ours = {path.name for path in ROOT.iterdir() if path.is_dir()}
    for name in [name for name in sys.modules if name.split(".")[0] in ours]:
        del sys.modules[name]
    sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()

"""How every command runs: what ends it early is one line and an exit code, and printing never ends it.

    def main(arguments=None):
        run_command(parse, run, arguments, continues=True)

Any command takes `--config FILE.toml`, see `foundation.option_files`.

Exit codes: 1 for data, options or a disk that cannot be used, 2 for a command line that is none, 128 + n for stop
signal n. A traceback is an error of ours.
"""

import contextlib
import functools
import io
import logging
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from foundation.console import Console, escaped
from foundation.option_files import OPTION, subcommand, with_option_files, write_options
from foundation.stopping import Interrupted, StopSignals, not_held_up

Parsed = TypeVar("Parsed")
ROOT = Path(__file__).resolve().parent.parent


class CannotGoOn(RuntimeError):
    """What ends a command in one line and is nobody's mistake on the command line: a loss that is not finite, say."""


def run_command(
    parse: Callable[[Sequence[str] | None], Parsed],
    run: Callable[[Parsed], object],
    arguments: Sequence[str] | None = None,
    *,
    continues: bool = False,
    nested: Sequence[str] = (),
) -> None:
    """Parses a command line and runs what it asks for.

    Args:
        parse: what it asks for, from its arguments; refuses by SystemExit, as argparse and tyro do.
        run: does it.
        arguments: those of the process by default.
        continues: the same command goes on where it was stopped, which is worth saying then.
        nested: subcommands that have subcommands of their own.

    Raises:
        SystemExit: when it ends early.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s")
    # A stream that was closed before the process began is None.
    out, err = (Console(stream or io.StringIO()) for stream in (sys.stdout, sys.stderr))
    with (
        StopSignals(at_once=True),
        not_held_up(),
        contextlib.redirect_stdout(out),  # pyright: ignore[reportArgumentType]
        contextlib.redirect_stderr(err),  # pyright: ignore[reportArgumentType]
    ):
        given: Sequence[str] = sys.argv[1:] if arguments is None else arguments
        try:
            given = with_option_files(given, nested)
            with _current(given[len(subcommand(given, nested)) :]):
                run(_parsed(parse, given))
        except Interrupted as stopped:
            message = str(stopped)
            if continues and "the same command continues" not in message:
                message += "; the same command continues"
            print(f"\n{escaped(message)}", file=sys.stderr)
            sys.exit(stopped.exit_code)
        except (ValueError, OSError, ImportError, CannotGoOn, MemoryError) as error:
            sys.exit(f"error: {_line(error, given)}")
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            sys.exit(f"error: not enough memory: {_line(error, given)}")
        finally:
            for console in (out, err):
                console.close_quietly()


def deferred(command: Callable[..., object]) -> Callable[..., Callable[[], object]]:
    """The same command for a parser that would call it while it parses: called, it says what to call."""

    # Parsers read signature, hints and help.
    @functools.wraps(command)
    def defer(*values: object, **named: object) -> Callable[[], object]:
        return functools.partial(command, *values, **named)

    return defer


def refuse_unwritable(option: str, path: Path | None, *, folder: bool = False) -> None:
    """Asks the file system whether a file, or files in a folder, can be written there: before the work, not behind it.

    Folders above the path are made; nothing else is left. None is no path, and fine.

    Raises:
        ValueError: naming option, path and reason.
    """
    if path is None:
        return
    try:
        if folder:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                return
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        with path.open("a"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise ValueError(f"{option} {path}: cannot be written ({error.strerror})") from error


def command_line() -> str:
    """The command of this process as it can be pasted at the root of the checkout: with the Python of its environment,
    by a relative path where that lies in the checkout."""
    # Not resolved: in an environment Python is a link, and what it finds depends on where the link lies.
    python = Path(sys.executable)
    beside = python.relative_to(ROOT) if python.is_relative_to(ROOT) else python
    return shlex.join([str(beside), *sys.orig_argv[1:]])


def given_words() -> list[str]:
    """The command line that is running, option files read, without program and subcommand; none of a call from
    Python."""
    return list(_words or ())


def leave_options(folder: Path) -> None:
    """Writes the options of the command that is running beside the results that it makes, as a file for `--config`;
    nothing where these are made by a call from Python."""
    if _words is not None:
        write_options(folder, _words)


# Those of the command that is running, with option files read; None outside of commands.
_words: Sequence[str] | None = None


@contextlib.contextmanager
def _current(words: Sequence[str]) -> Iterator[None]:
    global _words
    before, _words = _words, words
    try:
        yield
    finally:
        _words = before


def _parsed(parse: Callable[[Sequence[str] | None], Parsed], given: Sequence[str]) -> Parsed:
    """Parses; a value that one of our own configurations refuses is said in our words instead of the parser's."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse(given)
    except SystemExit as stop:
        if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0":
            # Of processes that were all given the same command line one says what is wrong with it.
            raise
        if (ours := _refusal(stop)) is not None:
            print(f"error: {_line(ours, given)}", file=sys.stderr)
            raise SystemExit(2) from None
        # An option that the parser itself refuses, or help.
        sys.stderr.write(said.getvalue())
        if not stop.code:
            print(f"Options can also stand in a file: {OPTION} FILE.toml; what is given beside it counts more.")
        raise


def _refusal(error: BaseException) -> ValueError | None:
    """The ValueError of this project that a parser wrapped, if there is one."""
    cause: BaseException | None = error
    while cause is not None:
        place = cause.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        if isinstance(cause, ValueError) and place is not None:
            file = Path(place.tb_frame.f_code.co_filename)
            if file.is_relative_to(ROOT) and ".venv" not in file.parts:
                return cause
        cause = cause.__context__
    return None


def _line(error: BaseException, given: Sequence[str]) -> str:
    """An error as one line that shows no control character; where it names a field that was set by an option, the
    option too."""
    text = escaped(" ".join(str(error).split("\n"))) or type(error).__name__
    if found := re.match(r"\w+\.(\w+)\b", text):
        for argument in given:
            option = argument.partition("=")[0]
            if option.startswith("--") and option.lstrip("-").split(".")[-1].replace("-", "_") == found[1]:
                return f"{option}: {text}"
    return text


def _out_of_memory(error: RuntimeError) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)

"""Printing never ends a command, and a terminal shows control sequences instead of obeying them."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

from foundation.command import CannotGoOn, refuse_unwritable, run_command
from foundation.console import Console, escaped

ROOT = Path(__file__).resolve().parents[2]
CHATTY = """
import sys
from foundation.command import run_command

def run(_):
    for number in range(3000):
        print(number, "± ø " + "x" * 60, flush=number % 2 == 0)
    open(sys.argv[1], "w").write("done")

run_command(lambda _: None, run)
"""


def chatty(file, redirect, encoding="utf-8"):
    program = (
        f'PYTHONIOENCODING={encoding} "{sys.executable}" -c "$PROGRAM" {file} {redirect}; echo ${{PIPESTATUS[0]}} >&2'
    )
    return subprocess.run(
        ["bash", "-c", program], cwd=ROOT, env={"PROGRAM": CHATTY, "PATH": "/usr/bin:/bin"}, capture_output=True
    )


@pytest.mark.parametrize("redirect", ["| head -1", "> /dev/full", ">&-", "2>&- | head -1"])
def test_work_goes_on_where_nobody_can_read(tmp_path, redirect):
    done = chatty(tmp_path / "file", redirect)
    assert (tmp_path / "file").read_text() == "done"
    if "2>&-" not in redirect:
        assert done.stderr == b"0\n"


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", b"0 ? ?"), ("latin-1", b"0 \xb1 \xf8"), ("cp1251", b"0 \xb1 ?")]
)
def test_a_narrow_encoding_gets_replacements(tmp_path, encoding, shown):
    done = chatty(tmp_path / "file", "", encoding)
    assert done.stdout.startswith(shown)
    assert done.stderr == b"0\n"
    assert (tmp_path / "file").read_text() == "done"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_control_sequences_and_keeps_colours():
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        print("a\x1b]0;title\x07\tb\r\x1b[2J\x9b1m \x1b[38;5;3mred\x1b[0m é", file=Console(stream))
    assert terminal.getvalue() == "a\\x1b]0;title\\x07\tb\\x0d\\x1b[2J\\x9b1m \x1b[38;5;3mred\x1b[0m é\n"
    assert file.getvalue() == "a\x1b]0;title\x07\tb\r\x1b[2J\x9b1m \x1b[38;5;3mred\x1b[0m é\n"
    assert escaped("\x1b[31m\n") == "\\x1b[31m\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("first\nsecond \x1b[2J"), r"error: first second \x1b[2J"),
        (OSError(28, "No space left on device"), "error: [Errno 28] No space left on device"),
        (CannotGoOn("loss nan"), "error: loss nan"),
        (MemoryError(), "error: MemoryError"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "error: not enough memory: DefaultCPUAllocator"),
    ],
)
def test_what_ends_a_command_is_one_line(error, message):
    def run(_):
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_command(lambda _: None, run, [])
    assert str(stopped.value.code).startswith(message)
    assert "\n" not in str(stopped.value.code)


def test_an_error_of_ours_keeps_its_traceback():
    def run(_):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        run_command(lambda _: None, run, [])


def test_unwritable_places_are_refused_and_nothing_is_left(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "table.csv", tmp_path):
        with pytest.raises(ValueError, match=r"--csv .*: cannot be written \("):
            refuse_unwritable("--csv", path)
    with pytest.raises(ValueError, match=r"--trace .*file: cannot be written"):
        refuse_unwritable("--trace", tmp_path / "file", folder=True)
    refuse_unwritable("--csv", tmp_path / "new" / "table.csv")
    refuse_unwritable("--trace", tmp_path / "folder", folder=True)
    refuse_unwritable("--csv", None)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "new"]

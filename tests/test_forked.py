"""A forked command is a process as one that is started is (tests/forked.py), and stop signals are heard by both."""

import subprocess
import sys

import pytest

from tests.forked import POPEN, ROOT, Forked

PROGRAMS = {
    "words and streams": "import sys; print(sys.argv, sys.stdin.read(), 'ø'); print('said', file=sys.stderr)",
    "folder and environment": "import os; print(os.getcwd(), os.environ.get('GIVEN'), os.environ.get('HOME'))",
    "a code": "import sys; sys.exit(3)",
    "a line": "import sys; sys.exit('one line')",
    "a fault": "raise RuntimeError('a fault')",
    "what is left to do": "import atexit; atexit.register(print, 'done')",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "signals": "import signal; print(*(signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)))",
    "a process of its own": "import os; print(os.getpid() == os.getsid(0))",
}


def ended(popen, program, **options):
    """Exit code, output and the last line of errors."""
    command = [sys.executable, "-c", program, "a", "word"]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = popen(command, **streams, text=True, encoding="utf-8", start_new_session=True, **options)
    output, errors = process.communicate("given")
    return process.returncode, output, errors.splitlines()[-1:]


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_a_forked_process_is_like_any_other(program, tmp_path):
    options = {"cwd": tmp_path, "env": {"GIVEN": "x", "PYTHONIOENCODING": "utf-8"}}
    assert ended(Forked, program, **options) == ended(POPEN, program, **options)


def test_what_it_starts_is_forked_too_and_the_tests_are_not_touched(forked, monkeypatch):
    monkeypatch.setattr("lm.__main__.main", lambda: None)
    inner = "import subprocess, sys; print(subprocess.run([sys.executable, '-m', 'lm', '--help']).returncode)"
    outer = subprocess.run([sys.executable, "-c", inner], capture_output=True, text=True)
    # A module is run anew.
    assert outer.stdout.endswith("\n0\n"), outer.stderr
    assert "generate" in outer.stdout
    assert sys.argv[0] != "-m"


def test_in_the_background_stop_signals_are_heard():
    """Where the suite is started by a script or under nohup."""
    program = (
        "import signal; names = ('SIGINT', 'SIGHUP'); numbers = [getattr(signal, name) for name in names];"
        "[signal.signal(number, signal.SIG_IGN) for number in numbers]; import tests.conftest;"
        "print(*(signal.getsignal(number) is signal.SIG_IGN for number in numbers))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False False\n", done.stderr

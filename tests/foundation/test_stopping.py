"""What counts as a request to stop, and what as a copy of it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from foundation import stopping
from foundation.stopping import SIGNALS, Interrupted, StopSignals

ROOT = Path(stopping.__file__).parents[1]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_remembered_or_raised(number):
    before = signal.getsignal(number)
    with StopSignals() as stop:
        os.kill(os.getpid(), number)
        assert stop.signal == number
    with pytest.raises(Interrupted, match=f"stopped by {number.name}") as stopped, StopSignals(at_once=True):
        os.kill(os.getpid(), number)
    assert stopped.value.exit_code == 128 + number
    assert signal.getsignal(number) is before


def test_copies_of_a_request_are_one_request():
    # torchrun and a terminal both pass Ctrl-C on; shells and the kernel both send SIGHUP.
    with StopSignals(at_once=True), StopSignals() as stop:
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.signal == signal.SIGHUP


def test_ctrl_c_pressed_again_does_not_wait(monkeypatch):
    monkeypatch.setattr(stopping, "ONE_REQUEST_S", 0.0)
    with StopSignals(at_once=True), StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGINT)


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals(at_once=True) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("module", "number"),
    [
        *(("ablations", signal.SIGTERM), ("ablations.top_p", signal.SIGINT), ("corpus", signal.SIGINT)),
        *(("demos.terminal", signal.SIGTERM), ("lm", signal.SIGINT), ("moe", signal.SIGTERM)),
        *(("staged_training", signal.SIGINT), ("triton_kernels", signal.SIGTERM)),
    ],
)
def test_a_signal_while_a_command_is_still_imported_is_one_line(module, number):
    command = [sys.executable, "-X", "importtime", "-m", module, "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        # The first of our modules has been imported, the large libraries have not.
        assert process.stderr is not None
        next(line for line in process.stderr if line.endswith(" foundation.starting\n"))
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert [line for line in error.splitlines() if line and "import time:" not in line] == [
        f"stopped by {number.name} before it began"
    ]
    assert process.returncode == 128 + number


LONG_CALL = """
import lzma, random, threading
from foundation.command import run_command

def run(_):
    data = random.Random(0).randbytes(1 << 25)
    # Said by another thread, so that this one is in the call by then.
    threading.Timer(0.5, lambda: print("ready", flush=True)).start()
    lzma.compress(data, preset=9)

run_command(lambda _: None, run, [])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_twice_a_command_leaves_even_a_long_call_at_once(number):
    command = [sys.executable, "-c", LONG_CALL]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.send_signal(number)
        # Copies of the request change nothing.
        process.send_signal(number)
        process.stderr.readline()
        assert "when the call that is under way returns; asked again, at once" in process.stderr.readline()
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert error.split() == ["stopped", "by", number.name]
    assert process.returncode == 128 + number

"""What counts as a request to stop, and what as a copy of it."""

import os
import signal

import pytest

from foundation import stopping
from foundation.stopping import SIGNALS, Interrupted, StopSignals


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

"""What tests of the one call of C share."""

import pytest

import lm.decode_step


@pytest.fixture
def steps(monkeypatch):
    """Grows by one entry with every step, or prompt, that is one call."""
    taken, call = [], lm.decode_step.call
    monkeypatch.setattr(lm.decode_step, "call", lambda *args: taken.append(args[0]) or call(*args))
    return taken

"""A move of code must not move a number: a small comparison of every method against what was recorded before the move.

`recorded.json` is the short record of `tests/unchanged/record.py` (one thread), with the processor and the torch
version that it was made on. There it must be equal bit for bit; elsewhere kernels round otherwise, and a few steps of
training may differ by what rounding can do. A commit that means to change a number records anew and says why: this
record is of the day when branches began to go on with the trunk's optimizer; its trunks are those of commit
c821516, step by step. Runs are trained by the torch forms; the one text is evaluated by what the machine has, and its
bits per byte moved by 1e-7 when linear layers were given a form in C.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tests.forked import forget_our_modules, forking

HERE = Path(__file__).parent
# Nats and bits per byte: what other kernels' rounding is granted after a dozen steps. Losses fall by 1 in them.
ROUNDING = 5e-3


def recorder() -> Any:
    spec = importlib.util.spec_from_file_location("record", HERE / "record.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers(value: Any) -> list[float]:
    """Losses and measured bits per byte, in a fixed order."""
    return [loss for _, run in sorted(value["runs"].items()) for loss in (*run["losses"], run["bits_per_byte"] or 0.0)]


def anew_and_without_figures() -> None:
    """By the torch forms: the environment says so, and is read when modules are imported."""
    forget_our_modules()
    from ablations.report import report

    report.svg = lambda draw, label: "<svg></svg>"


@pytest.mark.slow
def test_no_number_has_moved(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(HERE.parent.parent)
    tools, expected = recorder(), json.loads((HERE / "recorded.json").read_text())
    with forking(anew_and_without_figures):
        found = tools.record(tmp_path, short=True)
    if found["made_on"] == expected["made_on"]:
        assert tools.differences(expected, found) == []
    assert found["runs"].keys() == expected["runs"].keys()
    assert numbers(found) == pytest.approx(numbers(expected), abs=ROUNDING)


def test_a_difference_is_found():
    differences = recorder().differences
    assert differences({"a": [1.0, 2.0]}, {"a": [1.0, 2.0]}) == []
    assert differences({"a": [1.0, 2.0]}, {"a": [1.0, 2.0 + 2**-51]}) == ["/a[1]: 2.0 != 2.0000000000000004"]
    assert differences({"a": 1}, {}) == ["/a: 1 != None"]

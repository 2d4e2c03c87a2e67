"""Tables come back as they were written; the stopwatch calls what it is told to, in turns."""

import dataclasses

import pytest

from foundation import timing
from foundation.tables import read_rows, write_rows, write_table


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    count: int
    share: float


def test_rows_come_back(tmp_path):
    rows = [Row('a, "b"', 1, 0.1), Row("ü", -2, 1e-300)]
    write_rows(tmp_path / "new" / "rows.csv", Row, rows)
    assert read_rows(tmp_path / "new" / "rows.csv", Row) == rows
    assert read_rows(tmp_path / "none.csv", Row) == []


def test_a_table_is_utf_8_with_line_feeds_and_empty_cells(tmp_path):
    write_table(tmp_path / "t.csv", ("a", "b"), [(1, None), (0.1, "é")])
    assert (tmp_path / "t.csv").read_bytes() == "a,b\n1,\n0.1,é\n".encode()


def test_turns_go_round_and_the_first_does_not_count(monkeypatch):
    calls = []
    times = timing.in_turns(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        repeats=2,
        before_turn=lambda turn: calls.append(str(turn)),
    )
    assert "".join(calls) == "0ab1ab2ab"
    assert {name: len(taken) for name, taken in times.items()} == {"a": 2, "b": 2}


def test_the_median_is_over_what_counts():
    seconds = iter([100.0, 50.0, 3.0, 1.0, 2.0])
    median = timing.median_seconds(lambda: None, repeats=3, clock=lambda run, device: next(seconds))
    assert median == pytest.approx(2.0)

"""What a gate's ledger counts as a try."""

import pytest

from ablations.gate.ledger import LEDGER_FILE, Try, answer, enter, read_tries
from foundation.files import CorruptFileError


def asked(question, trunk="a"):
    return Try(number=0, trunk=trunk, question=question, method="top_p", margin=0.0, error=0.05, seeds=8, commit="abc")


def test_every_other_question_on_a_trunk_is_another_try(tmp_path):
    assert enter(tmp_path, asked("one")).number == 1
    assert enter(tmp_path, asked("two")).number == 2
    # Asked again, also behind others and behind its answer, it keeps its number.
    answer(tmp_path, asked("one"), "keep")
    assert enter(tmp_path, asked("one")) == enter(tmp_path, asked("one"))
    assert enter(tmp_path, asked("one")).number == 1
    assert enter(tmp_path, asked("one", trunk="b")).number == 1
    assert enter(tmp_path, asked("three")).number == 3
    assert [(known.trunk, known.question, known.number, known.answer) for known in read_tries(tmp_path / "gate")] == [
        ("a", "one", 1, "keep"),
        ("a", "two", 2, None),
        ("b", "one", 1, None),
        ("a", "three", 3, None),
    ]


def test_a_changed_ledger_is_refused(tmp_path):
    enter(tmp_path, asked("one"))
    path = tmp_path / "gate" / LEDGER_FILE
    path.write_text(path.read_text().replace('"number": 1', '"number": 0'))
    with pytest.raises(CorruptFileError, match=r"gate: ledger\.json does not match its own checksum; how many tries"):
        enter(tmp_path, asked("two"))

"""The calibration on records where the truth is known: nothing, and something."""

import csv
import sys

import numpy as np
import pytest

from ablations import cli
from ablations.comparison.calibration import calibration_rows, calibration_text
from ablations.comparison.records import read_records
from ablations.comparison.verdicts import bits_by_run

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def records(write_synthetic):
    return read_records(write_synthetic(branch_seeds=tuple(range(40)), methods=("baseline", "twin", "other_order")))


def test_nothing_stays_at_the_nominal_level_and_an_effect_is_found(records, monkeypatch):
    rows = calibration_rows(records)
    assert [(row.control, row.seeds, row.comparisons) for row in rows] == [
        ("twin", 1, 40),
        ("twin", 2, 20),
        ("twin", 3, 13),
        ("twin", 5, 8),
        ("other_order", 2, 20),
        ("other_order", 3, 13),
        ("other_order", 5, 8),
    ]
    assert all(row.low <= 0.05 and row.false_verdicts == round(row.share * row.comparisons) for row in rows)
    assert "nowhere above the nominal 5 %" in calibration_text(rows)

    def shifted(runs):
        """Twins that are worse by 0.02 bits per byte; their noise is 0.002."""
        bits, n_bytes_S = bits_by_run(runs), np.array([s.n_bytes for s in next(iter(runs.values())).sections])
        return {key: bits_S + 0.02 * n_bytes_S * (runs is records.branches["twin"]) for key, bits_S in bits.items()}

    monkeypatch.setattr("ablations.comparison.calibration.bits_by_run", shifted)
    found = calibration_rows(records)
    assert [row.share for row in found if row.control == "twin" and row.seeds >= 3] == [1.0, 1.0]
    assert "False verdicts are above the nominal 5 %: twin with 2 seeds, twin with 3 seeds" in calibration_text(found)


def test_command_trains_pairs_and_prints_their_share(text_folder, tiny_model, tmp_path, monkeypatch, capsys):
    options = {**tiny_model, "n_layers": 2, "vocab_size": 300, "tokens": 768, "batch_size": 4, "seq_len": 32}
    options |= {"freeze": 0.4, "budget_batches": 1, "seeds": 4, "out": tmp_path, "data": text_folder}
    flat = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    monkeypatch.setattr(sys, "argv", ["ablations", "calibrate", *flat])
    cli.main()
    printed = capsys.readouterr().out
    with open(printed.rsplit("calibration: ", 1)[1].strip()) as file:
        lines = list(csv.DictReader(file))
    assert [(line["control"], line["seeds"], line["comparisons"]) for line in lines] == [
        ("twin", "1", "4"),
        ("twin", "2", "2"),
        ("twin", "3", "1"),
        ("other_order", "2", "2"),
        ("other_order", "3", "1"),
    ]
    assert "False verdicts are nowhere above the nominal 5 %." in printed

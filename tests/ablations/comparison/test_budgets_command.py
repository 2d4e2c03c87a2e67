"""The table of budget errors, from synthetic records and through its command."""

import csv
import re

import pytest

from ablations import cli
from ablations.comparison.budgets import budget_rows, budget_text, write_budgets
from ablations.comparison.records import read_records

pytestmark = pytest.mark.usefixtures("undrawn")


def test_rows_are_what_the_runs_recorded(comparison_folder, tmp_path):
    rows = budget_rows(read_records(comparison_folder), last_steps=4)
    assert len(rows) == 6 * 3 * 6
    own = [row for row in rows if row.trained is not None]
    assert [(row.method, row.branch_seed) for row in own[:4]] == [
        ("baseline", 0),
        ("baseline", 1),
        ("baseline", 2),
        ("twin", 0),
    ]
    # Steps alternate between 11 and 12 experts, asked were 12.
    assert {(row.asked, row.trained, row.trained_error_percent) for row in own} == {(12.0, 11.5, 100 * (11.5 / 12 - 1))}
    top_p = next(row for row in own if row.method == "top_p")
    assert top_p.used_error_percent == pytest.approx(100 * (top_p.used / 12 - 1))
    assert abs(top_p.used_error_percent) > 1
    others = [row for row in rows if row.method == "top_p" and row.branch_seed == 0 and row.trained is None]
    assert [(row.asked, row.used_error_percent) for row in others] == [(k, 0.0) for k in (2, 4, 6, 8, 16)]
    write_budgets(rows, tmp_path / "budgets.csv")
    lines = list(csv.DictReader((tmp_path / "budgets.csv").open()))
    assert [(float(line["asked"]), float(line["used"])) for line in lines] == [(row.asked, row.used) for row in rows]
    text = budget_text(rows, last_steps=4)
    assert len(re.findall("^top_p .* 12 .* 11.500 .*-4.17%", text, re.MULTILINE)) == 3
    assert "mean of the last 4 steps" in text


def test_command_runs_every_method_with_a_budget(text_folder, tiny_model, tmp_path, monkeypatch, capsys):
    options = {
        **tiny_model,
        "n_layers": 2,
        "vocab_size": 300,
        "tokens": 4096,
        "batch_size": 4,
        "seq_len": 64,
        "freeze": 0,
        "budget_batches": 2,
    }
    flat = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    arguments = [
        "budgets",
        "--data",
        str(text_folder),
        "--seeds",
        "1",
        "--out",
        str(tmp_path),
        "--last-steps",
        "3",
        *flat,
    ]
    monkeypatch.setattr("sys.argv", ["ablations", *arguments])
    cli.main()
    printed = capsys.readouterr().out
    (path,) = (tmp_path / "comparisons").glob("*/budgets.csv")
    with path.open() as file:
        own = {line["method"]: line for line in csv.DictReader(file) if line["trained"]}
    budgeted = {
        "top_p",
        "null_experts",
        "zero_computation",
        "difficulty_head",
        "relu",
        "relu_penalty",
        "score_threshold",
        "learned_threshold",
        "relative_threshold",
        "expert_threshold",
        "sequence_budget",
        "skipping",
        "moe_plus_plus",
    }
    assert set(own) == {"baseline", *budgeted}
    assert own["baseline"]["trained_error_percent"] == own["baseline"]["used_error_percent"] == "0.0"
    # A few hundred tokens to calibrate on: far from exact, but controlled at all.
    assert all(abs(float(own[method]["used_error_percent"])) < 15 for method in budgeted)
    assert "worst other budget" in printed

"""`python -m moe bench` runs, and gives no time for a result that is wrong."""

import subprocess
import sys
from pathlib import Path

import torch

import moe.bench
from moe.bench import Problem, Shape, bench

SMALL = Shape(tokens=32, d_model=16, n_experts=4, d_expert=8, k=2)


def test_the_command_prints_a_row_per_way():
    root = Path(__file__).resolve().parents[2]
    options = ["--tokens", "32", "--d-model", "16", "--n-experts", "4", "--d-expert", "8", "--k", "2", "--repeats", "1", "--skew", "1.5"]
    printed = subprocess.run([sys.executable, "-m", "moe", "bench", *options], cwd=root, capture_output=True, text=True, check=True).stdout
    for name in ("dense", "cpu", "reference", "grouped_mm", "indexed loop"):
        assert sum(line.startswith(f"{name} ") for line in printed.splitlines()) == 2, printed
    assert "backend chosen by auto: cpu (tensors are on the CPU)" in printed
    assert "WRONG" not in printed


def test_a_wrong_result_gets_no_time(monkeypatch):
    def wrong(*arguments, backend):
        y_TD = original(*arguments, backend=backend)
        return y_TD * 1.5 if backend == "cpu" else y_TD

    original = moe.bench.grouped_mlp
    monkeypatch.setattr(moe.bench, "grouped_mlp", wrong)
    table = bench(SMALL, dtype="float32", weight_dtype="float32", skew=1.0, backends=["cpu", "reference"], repeats=1)
    (row,) = [line for line in table.splitlines() if line.startswith("cpu ")]
    assert "WRONG" in row
    assert "x" not in row.split("WRONG")[0]


def test_skew_is_the_load_of_the_busiest_expert():
    shape = Shape(tokens=400, d_model=8, n_experts=20, d_expert=8, k=2)
    problem = Problem(shape, dtype=torch.float32, weight_dtype=torch.float32, skew=4.5)
    rows_E = problem.assignments.rows_per_expert_E()
    assert int(rows_E.max()) == round(4.5 * 400 * 2 / 20)
    assert int(rows_E.sum()) == 800

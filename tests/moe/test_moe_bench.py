"""`python -m moe bench` runs, and gives no time for a result that is wrong."""

import csv
import subprocess
import sys
from pathlib import Path

import torch

import moe.bench
from moe.bench import Problem, Shape
from moe.bench_table import line, table
from moe.freed_memory import keep_freed_memory

SMALL = Shape(tokens=32, d_model=16, n_experts=4, d_expert=8, k=2)
WAYS = ("native", "cpu", "reference", "grouped_mm", "huggingface", "indexed loop")


def test_the_command_prints_and_writes_the_whole_table(tmp_path, forked):
    root, file = Path(__file__).resolve().parents[2], tmp_path / "table.csv"
    options = [
        "--tokens",
        "32",
        "--d-model",
        "16",
        "--n-experts",
        "8",
        "--d-expert",
        "8",
        "--k",
        "4",
        "--repeats",
        "1",
        "--load",
        "1",
        "1.5",
    ]
    command = [sys.executable, "-m", "moe", "bench", "--threads", "1", "--csv", str(file), *options]
    printed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    assert "backend chosen by auto: " in printed
    assert "WRONG" not in printed
    with file.open() as stream:
        rows = list(csv.DictReader(stream))
    fewer = ["k = 4", "k = 2", "k = 1", "top-p, mean 2"]
    expected = [("experts", load, way) for load in ("1.0", "1.5") for way in ("dense", *WAYS)]
    expected += [(part, "1.0", way) for part in ("experts, fewer", "layer, fewer") for way in fewer]
    for dtype in ("float32", "bfloat16"):
        assert [(row["part"], row["load"], row["way"]) for row in rows if row["dtype"] == dtype] == expected
    means = {row["way"]: float(row["mean_experts"]) for row in rows}
    assert [means[way] for way in fewer] == [4.0, 2.0, 1.0, 2.0], "the varying number holds its budget exactly"
    assert all(
        float(row["ms"]) > 0 and row["torch"] == torch.__version__ and row["threads"] == "1" and row["commit"]
        for row in rows
    )
    assert all(bool(row["of_full_k"]) == ("fewer" in row["part"]) for row in rows)
    of_libraries = {row["way"]: row for row in rows if row["part"] == "experts" and row["load"] == "1.0"}
    # One turn: the faster of both is as fast as itself.
    assert min(float(of_libraries[way]["of_libraries"]) for way in ("grouped_mm", "huggingface")) == 1.0
    assert all(row["of_libraries"] == row["of_libraries_lowest"] for row in rows)


def test_a_wrong_result_gets_no_time(monkeypatch):
    def wrong(*arguments, backend):
        y_TD = original(*arguments, backend=backend)
        return y_TD * 1.5 if backend == "cpu" else y_TD

    original = moe.bench.compute_experts
    monkeypatch.setattr(moe.bench, "compute_experts", wrong)
    rows = list(
        table(SMALL, dtypes=["float32"], weight_dtype="float32", loads=[1.0], ways=["cpu", "reference"], repeats=1)
    )
    by_way = {row.way: row for row in rows if row.part == "experts"}
    assert by_way["cpu"].ms is None
    assert "WRONG" in line(by_way["cpu"])
    assert by_way["reference"].ms is not None


def test_freed_memory_is_kept_where_the_c_library_can():
    """Page faults of ten tensors of 48 MB, one after the other, after some that may find their place first: above 32 MB
    glibc always returns."""
    code = (
        "import sys, torch; from resource import RUSAGE_SELF, getrusage; from moe.freed_memory import"
        " keep_freed_memory\n"
    )
    code += "if sys.argv[1] == 'keep': keep_freed_memory()\n"
    code += "for _ in range(30): torch.ones(12 * 2**20)\n"
    code += "before = getrusage(RUSAGE_SELF).ru_minflt\n"
    code += "for _ in range(10): torch.ones(12 * 2**20)\n"
    code += "print(getrusage(RUSAGE_SELF).ru_minflt - before)"
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", code]
    kept, returned = (
        int(subprocess.check_output([*command, what], cwd=root, text=True)) for what in ("keep", "return")
    )
    assert keep_freed_memory() == (sys.platform == "linux")
    assert 10 * kept < returned or sys.platform != "linux"


def test_skew_is_the_load_of_the_busiest_expert():
    shape = Shape(tokens=400, d_model=8, n_experts=20, d_expert=8, k=2)
    problem = Problem(shape, dtype=torch.float32, weight_dtype=torch.float32, skew=4.5)
    rows_E = problem.assignments.rows_per_expert_E()
    assert int(rows_E.max()) == round(4.5 * 400 * 2 / 20)
    assert int(rows_E.sum()) == 800

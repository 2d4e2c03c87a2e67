"""A comparison whose every run is trained by two gloo processes together: the numbers of one process up to rounding, in
the same folders; killed or not, and continued by any number of processes."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ablations import cli
from ablations.comparison.options import Options
from ablations.comparison.records import read_records

pytestmark = pytest.mark.usefixtures("undrawn")

ROOT = Path(__file__).resolve().parents[3]
# Bits per byte: what the order of a sum over rows does after a dozen steps.
ROUNDING = 1e-4
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]


@pytest.fixture(scope="module")
def words(text_folder, tiny_model):
    options = {
        **tiny_model,
        "n_layers": 2,
        "vocab_size": 300,
        "tokens": 2048,
        "batch_size": 4,
        "seq_len": 32,
        # The first of two blocks: what crosses the boundary is computed by both processes and stored by one.
        "freeze": 0.4,
        "budget_batches": 1,
        "seeds": 1,
        # A trunk has 14 steps, a branch 2: a kill finds checkpoints.
        "save_every": 3,
    }
    flat = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    return ["ablations", "compare", "top_p", "null_experts", "--data", str(text_folder), *flat]


def compared(words, out, *more, launcher=(sys.executable, "-m")):
    done = subprocess.run(
        [*launcher, *words, "--out", str(out), *more], cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def records_of(out):
    (folder,) = (out / "comparisons").iterdir()
    return read_records(folder)


@pytest.fixture(scope="module")
def one(words, tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    compared(words, out, "--jobs", "1")
    return out


@pytest.fixture(scope="module")
def two(words, tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    said = compared(words, out, "--processes", "2")
    assert said.count("processes  2 (gloo): 1 x data, 2 x experts") == 1
    assert said.count("trunk step=14/14") == 1
    assert said.count("estimated time") == 1
    return out


def test_processes_go_with_neither_jobs_nor_a_cluster():
    for other in ({"jobs": 2}, {"executor": "slurm"}):
        with pytest.raises(ValueError, match=r"Options\.processes: 2 train one run after the other"):
            Options(processes=2, **other)


def test_torchrun_and_processes_exclude_each_other(monkeypatch, text_folder):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    for given, message in (
        (["compare", "top_p", "--processes", "2"], "--processes 2: torchrun has started them already; legal: none"),
        (["gate", "top_p"], "torchrun: a gate starts processes of its own for each of its looks"),
    ):
        monkeypatch.setattr("sys.argv", ["ablations", *given, "--data", str(text_folder)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert message in str(stopped.value) or stopped.value.code == 65


@pytest.mark.long
def test_two_processes_give_the_numbers_of_one(one, two):
    expected, got = records_of(one), records_of(two)
    assert got.methods == expected.methods == ["baseline", "top_p", "null_experts"]
    for method, runs in expected.results.items():
        for key, result in runs.items():
            same = got.results[method][key]
            assert same.bits_per_byte == pytest.approx(result.bits_per_byte, abs=ROUNDING)
            assert same.mean_experts == pytest.approx(result.mean_experts, abs=0.01)
            for budget, other in zip(result.budgets, same.budgets, strict=True):
                assert other.bits_per_byte == pytest.approx(budget.bits_per_byte, abs=10 * ROUNDING)
    for name in ("table.csv", "figures/costs.csv"):
        tables = [list(csv.DictReader((found.folder / name).open())) for found in (expected, got)]
        assert [list(row) for row in tables[0]] == [list(row) for row in tables[1]]
    # The trunk's losses step by step, and every section of the validation text.
    (expected_trunk,), (trunk,) = expected.trunks.values(), got.trunks.values()
    assert trunk.losses == pytest.approx(expected_trunk.losses, abs=1e-4)
    assert [each.nats for each in trunk.sections] == pytest.approx(
        [each.nats for each in expected_trunk.sections], rel=1e-3
    )
    assert expected.folder.name == got.folder.name
    assert sorted(path.name for path in one.glob("*/*")) == sorted(path.name for path in two.glob("*/*"))


@pytest.mark.long
def test_what_two_have_trained_one_goes_on_with_and_the_other_way_round(words, one, two, tmp_path):
    """Another method forks from the trunk, whoever trained it."""
    words = [*words[:2], "fewer_experts", *words[4:]]
    copies = [tmp_path / "one", tmp_path / "two"]
    for copy, out in zip(copies, (one, two)):
        shutil.copytree(out, copy)
    for out, more in zip(copies, (["--processes", "2"], ["--jobs", "1"])):
        said = compared(words, out, *more)
        assert "finished before, taken from" in said
        assert "fewer_experts-seed0 valid bpb=" in said
        assert "trunk step=" not in said
    runs = [next((out / "branches").glob("fewer_experts_*")) for out in copies]
    bits = [json.loads((run / "result.json").read_text())["bits_per_byte"] for run in runs]
    assert bits[0] == pytest.approx(bits[1], abs=ROUNDING)


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_one_process_killed_ends_all_in_one_line_and_the_same_command_continues(words, two, tmp_path, victim):
    command = [sys.executable, "-m", *words, "--out", str(tmp_path), "--processes", "2"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("trunks/*/checkpoints/step_*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    found = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "comparison.together"], capture_output=True, text=True
    )
    os.kill(sorted(int(number) for number in found.stdout.split())[victim], signal.SIGKILL)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGKILL
    assert said == f"error: process {victim + 1} of 2 was killed by SIGKILL; the same command continues\n"
    assert "continues at step" in compared(words, tmp_path, "--processes", "2")
    for path in two.glob("*/*/metrics.jsonl"):
        again = tmp_path / path.relative_to(two)
        if again.exists():
            assert again.read_bytes() == path.read_bytes()
    weights = [
        {path.parts[-3].split("_trunk")[0]: path.read_bytes() for path in out.glob("branches/*/model/*.safetensors")}
        for out in (two, tmp_path)
    ]
    assert weights[1].items() <= weights[0].items()
    assert len(weights[1]) == 3


@pytest.mark.long
def test_an_error_in_one_process_ends_all_in_one_line(words, tmp_path):
    """A batch that has no rows for one of three, and a folder that another run holds."""
    done = subprocess.run(
        [sys.executable, "-m", *words, "--out", str(tmp_path), "--processes", "3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert done.returncode == 1
    assert done.stderr == "error: batch_size: 4 rows cannot be divided evenly over 3 processes\n"


@pytest.mark.long
def test_under_torchrun(words, one, tmp_path):
    said = compared(words, tmp_path, launcher=TORCHRUN)
    assert said.count("report: ") == 1
    bits = [
        {method: next(iter(runs.values())).bits_per_byte for method, runs in records_of(out).results.items()}
        for out in (one, tmp_path)
    ]
    assert bits[1] == pytest.approx({name: bits[0][name] for name in bits[1]}, abs=ROUNDING)

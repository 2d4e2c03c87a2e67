"""Runs side by side in processes of their own: the same folders and bits as one after the other, stopped or killed or
not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ablations.comparison.options import Options
from ablations.comparison.shares import jobs_of

ROOT = Path(__file__).resolve().parents[3]
# What a run measures of the machine, and where it lies.
MEASURED = {"seconds", "tokens_per_second"}


@pytest.fixture(scope="module")
def command(text_folder, tiny_model):
    options = {
        **tiny_model,
        "n_layers": 2,
        "vocab_size": 300,
        "tokens": 2048,
        "batch_size": 4,
        "seq_len": 32,
        "freeze": 0.4,
        "budget_batches": 1,
        "seeds": 1,
        "trunk_seeds": 2,
    }
    flat = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, "-m", "ablations", "compare", "top_p", "--data", str(text_folder), *flat]


@pytest.fixture(scope="module")
def one_after_the_other(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("serial")
    subprocess.run([*command, "--out", out, "--jobs", "1"], cwd=ROOT, check=True, capture_output=True)
    return results(out)


def results(out):
    """Everything but times, by run."""
    found = {}
    for path in sorted((*out.glob("trunks/*"), *out.glob("branches/*"))):
        found[path.name, "weights"] = (path / "model" / "weights.safetensors").read_bytes()
        found[path.name, "metrics"] = (path / "metrics.jsonl").read_bytes()
        found[path.name, "result"] = without_times(json.loads((path / "result.json").read_text()))
    return found


def without_times(value):
    if isinstance(value, dict):
        return {name: without_times(part) for name, part in value.items() if name not in MEASURED}
    return [without_times(part) for part in value] if isinstance(value, list) else value


def test_side_by_side_gives_the_same_bits(command, one_after_the_other, tmp_path):
    done = subprocess.run([*command, "--out", tmp_path, "--jobs", "2"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "trunks: 2 processes" in done.stdout
    assert "branches: 2 processes" in done.stdout
    assert "report: " in done.stdout
    # Nothing was left for the comparison itself to do.
    assert "ended with exit code" not in done.stdout
    assert results(tmp_path) == one_after_the_other
    assert len(one_after_the_other) == 3 * (2 + 4)


def children(parent):
    found = subprocess.run(["pgrep", "-P", str(parent), "-f", "comparison.shares"], capture_output=True, text=True)
    return [int(number) for number in found.stdout.split()]


def start_and_wait_for_children(command, out):
    process = subprocess.Popen(
        [*command, "--out", out, "--jobs", "2"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # As from a terminal of its own: a signal to the group would reach this test too.
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (found := children(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found
    return process, found


def test_what_a_killed_process_leaves_is_done_by_the_comparison(command, one_after_the_other, tmp_path):
    process, found = start_and_wait_for_children(command, tmp_path)
    os.kill(found[0], signal.SIGKILL)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "ended with exit code -9; what it left is done here" in said
    assert results(tmp_path) == one_after_the_other


def test_a_stop_signal_reaches_all_and_the_same_command_continues(command, one_after_the_other, tmp_path):
    process, found = start_and_wait_for_children(command, tmp_path)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 143, said
    assert "the same command continues" in said
    assert not [number for number in found if Path(f"/proc/{number}").exists()]
    subprocess.run([*command, "--out", tmp_path, "--jobs", "2"], cwd=ROOT, check=True, capture_output=True)
    assert results(tmp_path) == one_after_the_other


def test_as_many_as_threads_unless_told(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert jobs_of(Options()) == 3
    assert jobs_of(Options(jobs=2)) == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert jobs_of(Options()) == 1

"""Runs side by side in processes or jobs of their own: the same folders and bits as one after the other, stopped or
killed or not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import submitit
import torch

from ablations import cli
from ablations.comparison import shares
from ablations.comparison.options import Options
from ablations.comparison.shares import jobs_of
from ablations.comparison.slurm import TRIES, parameters_of, run_jobs, slurm_executor
from foundation.command import CannotGoOn
from foundation.stopping import Interrupted
from tests.forked import forking

pytestmark = pytest.mark.usefixtures("undrawn")

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
    with forking():
        subprocess.run([*command, "--out", out, "--jobs", "1"], cwd=ROOT, check=True, capture_output=True)
    return results(out)


def test_long_runs_are_not_all_in_one_share():
    # Eight arms, three seeds, one arm twice as long: in turn, one of two shares would have all that is long.
    lengths = 3 * [1, 1, 1, 1, 2, 1, 1, 1]
    first, second = shares.dealt(lengths, 2)
    assert sorted([*first, *second]) == list(range(24))
    assert abs(sum(lengths[run] for run in first) - sum(lengths[run] for run in second)) <= 1
    assert shares.dealt([1, 1, 1, 1], 3) == [[0, 3], [1], [2]]
    assert shares.dealt([1], 3) == [[0], [], []]


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


def test_side_by_side_gives_the_same_bits(command, one_after_the_other, tmp_path, forked):
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


@pytest.mark.long
def test_what_a_killed_process_leaves_is_done_by_the_comparison(command, one_after_the_other, tmp_path):
    process, found = start_and_wait_for_children(command, tmp_path)
    os.kill(found[0], signal.SIGKILL)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "ended with exit code -9; what it left is done here" in said
    assert results(tmp_path) == one_after_the_other


@pytest.mark.long
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


class KillsOnce(submitit.LocalExecutor):
    """Submits jobs to this machine; the first process of each command is killed a second after its start."""

    def __init__(self, folder):
        super().__init__(folder)
        self.seen = set()
        # Minutes.
        self.update_parameters(timeout_min=20)

    def submit(self, fn, *args, **kwargs):
        if (words := tuple(fn.command)) not in self.seen:
            self.seen.add(words)
            fn.command = ["sh", "-c", '"$@" & sleep 1; kill -9 $!; wait $!', "sh", *words]
        return super().submit(fn, *args, **kwargs)


@pytest.mark.long
def test_killed_jobs_are_submitted_again_and_give_the_same_bits(
    command, one_after_the_other, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(shares, "slurm_executor", lambda options: KillsOnce(options.out / "slurm"))
    words = [*command[2:], "--out", str(tmp_path), "--executor", "slurm", "--jobs", "2"]
    monkeypatch.setattr("sys.argv", words)
    cli.main()
    said = capfd.readouterr().out
    assert "trunks: 2 jobs submitted: " in said
    assert "branches: 2 jobs submitted: " in said
    assert said.count("died, submitted again") == 4
    # Nothing is trained where the command was given.
    assert "step=" not in said
    assert "report: " in said
    assert results(tmp_path) == one_after_the_other
    # What is finished is no job again.
    monkeypatch.setattr("sys.argv", words)
    cli.main()
    assert "jobs submitted" not in capfd.readouterr().out


def test_a_job_that_dies_again_and_again_is_named_once_the_others_have_ended(tmp_path, capfd):
    commands = [["sh", "-c", f"echo broken >&2; echo x >> {tmp_path}/tried; exit 3"], ["touch", str(tmp_path / "done")]]
    with pytest.raises(
        CannotGoOn, match=r"branches: job 1 of 2 \(\d+\) died 3 times, see .*; the same command continues"
    ):
        run_jobs(submitit.LocalExecutor(tmp_path / "jobs"), "branches", commands)
    assert (tmp_path / "tried").read_text() == "x\n" * TRIES
    assert (tmp_path / "done").exists()
    assert capfd.readouterr().out.count("branches: job 1 of 2 (") == TRIES - 1


def test_a_stop_cancels_jobs(tmp_path):
    cancelled = []

    class Job:
        job_id = "7"

        def done(self):
            raise Interrupted(15)

        def cancel(self, check):
            cancelled.append(check)

    class Executor:
        def submit(self, function):
            return Job()

    with pytest.raises(Interrupted):
        run_jobs(Executor(), "branches", [["true"], ["true"]])  # pyright: ignore[reportArgumentType]
    assert cancelled == [False, False]


def test_what_a_cluster_cannot_be_asked_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"Options\.slurm: 'gpu', must be KEY=VALUE"):
        Options(executor="slurm", slurm=("gpu",))
    with pytest.raises(ValueError, match=r"Options\.slurm: partition=gpu, needs --executor slurm"):
        Options(slurm=("partition=gpu",))
    with pytest.raises(ValueError, match="--slurm time=2:00:00: must be a whole number of minutes"):
        parameters_of(("time=2:00:00",))
    asked = Options(executor="slurm", slurm=("partition=gpu", "gpus_per_node=1"), out=tmp_path / "runs")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match='--executor slurm: Could not detect "srun"'):
        slurm_executor(asked)
    (tmp_path / "srun").touch(mode=0o755)
    executor = slurm_executor(asked)
    assert isinstance(executor, submitit.SlurmExecutor)
    text = executor._make_submission_file_text("true", "")
    assert "#SBATCH --partition=gpu\n" in text
    assert "#SBATCH --gpus-per-node=1\n" in text
    assert "#SBATCH --time=240\n" in text
    with pytest.raises(ValueError, match=r"Unavailable parameter\(s\): \['partitio'\]"):
        slurm_executor(Options(executor="slurm", slurm=("partitio=gpu",), out=tmp_path))
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho no\n")
    (tmp_path / "sbatch").chmod(0o755)
    with pytest.raises(CannotGoOn, match="branches: the cluster takes no job"):
        run_jobs(executor, "branches", [["true"]])

"""Training in 1, 2 and 4 gloo processes: losses, gradient norms, controllers and weights are those of the loop in one
process, through checkpoints of any number of processes; the command trains, continues, and refuses."""

import dataclasses
import importlib.util
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lm.pretrained import load_pretrained
from routing.policies.expert_choice import ExpertChoice
from staged_training import many_processes
from staged_training.__main__ import main
from staged_training.data import OwnRows, TokenBatches
from staged_training.diagnostics import read_diagnostics
from staged_training.progress import read_metrics
from tests.forked import forking

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("parallel_worker.py")
_spec = importlib.util.spec_from_file_location("parallel_worker", WORKER)
assert _spec is not None
assert _spec.loader is not None
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)


# One with a quantile, and one that counts, under Muon, which gathers the matrices of experts that are cut over data
# parallel processes; two processes run all policies.
IN_FOUR = ("top_p", "muon")


def start(folder: Path, n: int, n_expert: int, jobs: list[str]) -> list[subprocess.Popen]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    commands = [
        [sys.executable, str(WORKER), str(folder), str(rank), str(n), str(n_expert), *jobs] for rank in range(n)
    ]
    with forking():
        return [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) for command in commands]


def finish(started: list[subprocess.Popen]) -> None:
    errors = [process.communicate(timeout=1200)[1].decode() for process in started]
    assert all(process.returncode == 0 for process in started), "\n".join(errors)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """FOLDER/POLICY/NAME with NAME among alone, two, four, and cut, in two processes that share no experts; resumed_1
    and resumed_4 go on from step 3 of two; stopped was stopped and continued."""
    folder = tmp_path_factory.mktemp("runs")
    two = start(folder, 2, 2, [*(f"{policy}/two" for policy in worker.ROUTERS), "stop:top_p/stopped", "top_p/stopped"])
    for policy in worker.ROUTERS:
        alone = worker.train(policy, folder / policy / "alone")
        torch.save(alone.state_dict(), folder / policy / "alone.pt")
    finish(two)
    for name in ("top_p/resumed_1", "top_p/resumed_4", "muon/resumed_1"):
        shutil.copytree((folder / name).with_name("two"), folder / name)
        shutil.rmtree(folder / name / "checkpoints" / f"step_{worker.STEPS:08d}")
    four = start(folder, 4, 2, [*(f"{policy}/four" for policy in IN_FOUR), "top_p/resumed_4"])
    finish([*four, *start(folder, 1, 1, ["top_p/resumed_1", "muon/resumed_1"])])
    finish(start(folder, 2, 1, ["muon/cut"]))
    return folder


COMPARED = [(policy, "two") for policy in worker.ROUTERS] + [(policy, "four") for policy in IN_FOUR]
COMPARED += [("top_p", "resumed_1"), ("top_p", "resumed_4"), ("muon", "resumed_1"), ("muon", "cut")]


@pytest.mark.parametrize(("policy", "name"), COMPARED)
def test_losses_and_gradient_norms_are_those_of_one_process(runs, policy, name):
    expected, got = (read_metrics(runs / policy / which) for which in ("alone", name))
    assert [record["step"] for record in got] == list(range(1, worker.STEPS + 1))
    for one, other in zip(expected, got):
        assert other == pytest.approx(one, rel=2e-6)


@pytest.mark.parametrize(("policy", "name"), COMPARED)
def test_diagnostics_are_those_of_one_process(runs, policy, name):
    expected, got = (read_diagnostics(runs / policy / which) for which in ("alone", name))
    assert [line.step for line in got] == [worker.SAVE_EVERY, worker.STEPS]
    for one, other in zip(expected, got):
        for layer, same in zip(one.layers, other.layers, strict=True):
            for field, value in dataclasses.asdict(layer).items():
                assert getattr(same, field) == pytest.approx(value, rel=1e-5, abs=2e-6), field


@pytest.mark.parametrize(("policy", "name"), COMPARED)
def test_weights_and_controllers_are_those_of_one_process(runs, policy, name):
    expected, got = (torch.load(runs / policy / f"{which}.pt") for which in ("alone", name))
    assert list(expected) == list(got)
    for key, value in expected.items():
        if key.endswith("load_E"):
            assert torch.equal(got[key], value), key
        else:
            # Muon makes every direction of a gradient as large as the others, those that are nothing but rounding too.
            atol = 2e-5 if policy == "muon" else 1e-6
            torch.testing.assert_close(got[key], value, atol=atol, rtol=1e-5, msg=key)
    # They have moved, so there was something to compare.
    moved = {
        "top_k": "selection_bias_E",
        "muon": "selection_bias_E",
        "top_p": "policy.budget.threshold",
        "null_experts": "policy.budget.threshold",
        "relu": "policy.l1_coefficient",
    }
    fresh = worker.model_of(policy).state_dict()
    for layer in range(2):
        key = f"blocks.{layer}.moe.router.{moved[policy]}"
        assert not torch.equal(got[key], fresh[key]), key


def test_a_stop_signal_to_one_process_stops_all_and_the_run_goes_on_bit_for_bit(runs):
    folder = runs / "top_p"
    assert [(folder / f"stopped.exit_code_of_{rank}").read_text() for rank in range(2)] == ["143", "143"]
    assert (folder / "stopped" / "metrics.jsonl").read_bytes() == (folder / "two" / "metrics.jsonl").read_bytes()
    expected, got = (torch.load(folder / f"{name}.pt") for name in ("two", "stopped"))
    assert all(torch.equal(got[key], value) for key, value in expected.items())


TINY = [
    *(
        "--dtype",
        "float32",
        "--vocab-size",
        "300",
        "--d-model",
        "16",
        "--n-layers",
        "2",
        "--n-experts",
        "8",
        "--d-expert",
        "16",
    ),
    *("--n-heads", "2", "--n-kv-heads", "1", "--head-dim", "8"),
    *(
        "--policy",
        '{"type": "TopP", "target_mean": 2, "cap": 4}',
        "--tokens",
        "640",
        "--batch-size",
        "4",
        "--seq-len",
        "16",
    ),
]


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "staged_training", "parallel")
ITSELF = ("-m", "staged_training", "parallel", "--processes", "2")


@pytest.mark.parametrize(
    "started", [pytest.param(TORCHRUN, marks=pytest.mark.long), ITSELF], ids=["torchrun", "itself"]
)
def test_the_command_in_two_processes(documents, tmp_path, started, forked):
    command = [sys.executable, *started, "--out", str(tmp_path), "--data", str(documents), *TINY]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=1200
    )
    assert done.returncode == 0, done.stderr
    for part in ("2 (gloo): 1 x data, 2 x experts", "parallel step=10/10", "parallel valid bpb="):
        assert done.stdout.count(part) == 1, part
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, 11))
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == 10
    assert load_pretrained(tmp_path / "model").config.moe.router.policy.target_mean == 2


def test_what_ends_the_processes_is_said_once(documents, tmp_path, capsys, forked):
    # Refused ahead of them, and by all of them.
    with pytest.raises(SystemExit) as refused:
        main(["parallel", "--processes", "2", "--seed", "-1"])
    assert refused.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    command = [sys.executable, *ITSELF, "--out", str(tmp_path), "--data", str(documents), *TINY]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--expert-parallel", "3"], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_the_command_without_torchrun_is_one_process_and_knows_what_is_finished(
    documents, tmp_path, capsys, monkeypatch
):
    # Left over from another program; without torchrun they mean nothing.
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    command = ["parallel", "--out", str(tmp_path), "--data", str(documents), *TINY]
    main(command)
    assert "1 (gloo): 1 x data, 1 x experts" in capsys.readouterr().out
    main(command)
    assert "finished before" in capsys.readouterr().out


@pytest.mark.parametrize("n_bytes", [0, 600, 3000])
def test_a_disk_that_runs_full_under_the_shards_is_one_line_and_the_same_command_goes_on(
    documents, tmp_path, capsys, monkeypatch, n_bytes
):
    """Torch says so by an exception of its own that is no `Exception`, and from inside its writer of files."""
    command = ["parallel", "--out", str(tmp_path), "--data", str(documents), *TINY]
    real, limits = many_processes.save_shards, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(*values, **named):
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
        try:
            real(*values, **named)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(many_processes, "save_shards", save)
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert "error: checkpoint step_00000010 could not be written to" in str(stopped.value)
    assert "earlier checkpoints are untouched" in str(stopped.value)
    assert not list((tmp_path / "checkpoints").iterdir())
    monkeypatch.undo()
    main(command)
    assert "parallel valid bpb=" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--expert-parallel", "3"], "expert_parallel: 3 processes per set of experts do not divide the 1 processes"),
        (["--policy", "TopP"], "--policy 'TopP' is not JSON"),
        (["--policy", '{"type": "TopQ"}'], "unknown type 'TopQ'; did you mean 'TopP'"),
        (["--policy", '{"type": "ExpertChoice", "k": 2}'], "ExpertChoice ranks the tokens of a whole batch"),
    ],
    ids=str,
)
def test_what_cannot_be_run_is_refused(documents, tmp_path, changes, message):
    with pytest.raises(SystemExit, match=message):
        main(["parallel", "--out", str(tmp_path), "--data", str(documents), *TINY, *changes])


def test_a_command_line_that_is_none_is_refused_once(capsys, monkeypatch):
    """Of many processes with the same mistake the first one names it."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    said = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stopped:
            main(["parallel", "--tokens", "none"])
        assert stopped.value.code == 2
        said.append(capsys.readouterr().err)
    assert "--tokens" in said[0]
    assert said[1] == ""


PATIENT = """
import datetime, os, sys, time
import torch, torch.distributed as dist
from foundation.stopping import Interrupted
from staged_training.many_processes import ManyProcesses

folder, rank = sys.argv[1], int(sys.argv[2])
short = datetime.timedelta(seconds=2)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=short)
processes = ManyProcesses(0, torch.device("cpu"))

def long():
    time.sleep(5)
    return 7

def stopped():
    raise Interrupted(15)

assert processes.from_first(long) == 7
try:
    processes.from_first(stopped)
except Interrupted as stop:
    assert (stop.exit_code, str(stop)) == (143, "stopped by SIGTERM")
    os._exit(0)
os._exit(1)
"""


def test_the_others_wait_for_the_first_as_long_as_it_takes_and_stop_with_it(tmp_path, forked):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, "-c", PATIENT, str(tmp_path), str(rank)] for rank in range(2)]
    finish([subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) for command in commands])


def test_sizes_that_cannot_be_divided_are_refused(with_policy, model_config):
    from staged_training.many_processes import _refuse

    _refuse(model_config, 2, 2)
    with pytest.raises(ValueError, match=r"blocks\[0\]\.moe\.n_experts: 4 cannot be divided evenly over .* = 3"):
        _refuse(model_config, 1, 3)
    with pytest.raises(ValueError, match=r"d_model: 16 and blocks\[0\]\.moe\.d_expert: 8 must .* the 16 processes"):
        _refuse(model_config, 16, 2)
    with pytest.raises(ValueError, match="ExpertChoice"):
        _refuse(with_policy(ExpertChoice(k=2)), 1, 1)
    with pytest.raises(ValueError, match="batch_size: 4 rows cannot be divided evenly over 3 processes"):
        OwnRows(TokenBatches(list(range(100)), batch_size=4, seq_len=8), 0, 3)

import json
import re
import sys

import pytest

from staged_training.progress import METRICS, TIMING, MetricsFile, Progress, Tracker, read_metrics

RECORD = {"loss": 2.0, "routing_loss": 0.1, "grad_norm": 0.5, "lr": 1e-3, "mean_experts": 3.0}


def test_one_line_per_interval_that_grep_can_read(capsys):
    progress = Progress("top_p-seed1", n_steps=5, every=2, tokens_per_step=100, bytes_per_token=4.0)
    for step in range(1, 6):
        progress.step({**RECORD, "step": step, "loss": float(step)})
    lines = capsys.readouterr().out.splitlines()
    fields = [dict(re.findall(r"(\S+)=(\S+)", line)) for line in lines]
    assert [field["step"] for field in fields] == ["2/5", "4/5", "5/5"]
    assert [field["loss"] for field in fields] == ["1.5000", "3.5000", "5.0000"]
    assert fields[0]["bpb"] == f"{1.5 / 0.6931472 / 4:.4f}"
    assert list(fields[0]) == ["step", "loss", "bpb", "grad_norm", "tok/s", "mean_experts", "lr", "eta"]
    assert all(line.startswith("top_p-seed1 step=") for line in lines)
    assert fields[-1]["eta"] == "0s"


def test_files_are_cut_back_to_the_checkpoint(tmp_path):
    file = MetricsFile(tmp_path, 0)
    for step in range(1, 8):
        file.write({**RECORD, "step": step}, {"step": step, "seconds": 0.1})
    file.close()
    whole = (tmp_path / METRICS).read_bytes()
    # A killed process may leave half a line.
    (tmp_path / METRICS).write_bytes(whole[:-10])
    again = MetricsFile(tmp_path, 5)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    for step in (6, 7):
        again.write({**RECORD, "step": step}, {"step": step, "seconds": 0.2})
    again.close()
    assert (tmp_path / METRICS).read_bytes() == whole
    assert [json.loads(line)["step"] for line in (tmp_path / TIMING).read_text().splitlines()] == list(range(1, 8))


def test_an_unknown_tracker_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'wandbb' is not known; legal: none, wandb"):
        Tracker("wandbb", tmp_path, "run", {})


def test_a_missing_wandb_is_said_clearly(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"--track wandb needs the wandb package.*'track' extra"):
        Tracker("wandb", tmp_path, "run", {})


def test_wandb_offline_needs_no_account(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = Tracker("wandb", tmp_path, "run", {"seed": 0})
    progress = Progress("run", n_steps=2, every=1, tokens_per_step=100, bytes_per_token=4.0, tracker=tracker)
    for step in (1, 2):
        progress.step({**RECORD, "step": step})
    tracker.close()
    # The library writes in a process of its own; this waits for it.
    wandb.teardown()
    (stored,) = tmp_path.rglob("*.wandb")
    assert b"mean_experts" in stored.read_bytes()


def test_wandb_without_a_key_and_a_terminal_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    # No file of this user's may hold a key.
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ValueError, match=r"^--track wandb: .*WANDB_MODE=offline needs no account$"):
        Tracker("wandb", tmp_path, "run", {})

"""A stop signal outside of the training loop: one line, the signal's exit code, and the same command continues to the
same results."""

import os
import signal

import pytest

from staged_training import __main__ as command_line
from staged_training import execute
from tests.staged_training.test_staged_training_cli import TINY

# Where a run is when the signal comes, as the function that it is about to call, and the signal.
PHASES = {
    "preparing": (command_line, "prepare", signal.SIGINT),
    "calibrating": (execute, "calibrate_to_targets", signal.SIGTERM),
    "evaluating": (execute, "evaluate", signal.SIGHUP),
    "caching": (execute, "branch_batches", signal.SIGUSR1),
    "reporting": (execute, "finish_run", signal.SIGTERM),
}


def results(out):
    return {
        str(path.relative_to(out)): path.read_bytes()
        for name in ("metrics.jsonl", "result.json", "model/weights.safetensors")
        for path in sorted(out.glob(f"*/*/{name}"))
    }


def test_the_same_command_continues_wherever_it_was_stopped(documents, tmp_path, capfd, monkeypatch):
    def command(out):
        command_line.main(["run", "--out", str(tmp_path / out), "--data", str(documents), *TINY])

    command("straight")
    for phase, (module, name, number) in PHASES.items():
        real = getattr(module, name)

        def stop(*values, number=number, real=real, **named):
            os.kill(os.getpid(), number)
            return real(*values, **named)

        monkeypatch.setattr(module, name, stop)
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            command("stopped")
        monkeypatch.setattr(module, name, real)
        assert stopped.value.code == 128 + number, phase
        (line,) = capfd.readouterr().err.strip().splitlines()
        # Calibration of a trunk belongs to its last step, which is saved first.
        said = "trunk: saved at step 17 of 17" if phase == "calibrating" else f"stopped by {number.name}"
        assert line.startswith(said), phase
        assert line.endswith("; the same command continues"), phase
    command("stopped")
    assert results(tmp_path / "stopped") == results(tmp_path / "straight")
    assert len(results(tmp_path / "stopped")) == 6

"""A stop signal to a real process: it saves, and the same command continues to the same bits. Kills at random moments,
and while files are being written, are the soak's (tests/soak)."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from staged_training.__main__ import main
from tests.forked import forking

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = [
    *(
        "--dtype",
        "float32",
        "--vocab-size",
        "300",
        "--d-model",
        "16",
        "--n-layers",
        "4",
        "--n-experts",
        "4",
        "--d-expert",
        "8",
    ),
    *(
        "--n-heads",
        "2",
        "--n-kv-heads",
        "1",
        "--head-dim",
        "8",
        "--k",
        "2",
    ),
    *("--tokens", "2400", "--batch-size", "2", "--seq-len", "16", "--freeze", "0.5"),
    *("--save-every", "7", "--log-every", "50"),
]
TRUNK_STEPS = 64


def results(out):
    """What a finished run leaves that must not depend on its history, by path below `out`."""
    found = {}
    for pattern in ("trunks/*", "branches/*"):
        (folder,) = out.glob(pattern)
        newest = max((folder / "checkpoints").iterdir())
        for path in (
            newest / "weights.safetensors",
            newest / "optimizer.safetensors",
            folder / "metrics.jsonl",
            folder / "result.json",
        ):
            found[str(path.relative_to(out))] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def straight(documents, tmp_path_factory):
    """The results of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("straight")
    main(["run", "--out", str(out), "--data", str(documents), *OPTIONS])
    return results(out)


@pytest.fixture
def command(documents, tmp_path):
    return ["run", "--out", str(tmp_path), "--data", str(documents), *OPTIONS]


def start(*arguments):
    with forking():
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )


def newest_step(out):
    return max((int(path.name[5:]) for path in out.glob("trunks/*/checkpoints/step_*")), default=0)


def wait_for(process, condition):
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)


def test_sigterm_saves_leaves_and_the_same_command_continues(straight, command, tmp_path):
    process = start("-m", "staged_training", *command)
    wait_for(process, lambda: newest_step(tmp_path) >= 7)
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, output
    assert f"trunk: saved at step {newest_step(tmp_path)} of {TRUNK_STEPS}" in output
    assert "the same command continues" in output
    main(command)
    assert results(tmp_path) == straight

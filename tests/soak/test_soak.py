"""The short form of the soak, and how an attempt tells its end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FORKED = """
import os, signal, sys, time
from tests.soak.attempts import attempt, die

def fails():
    raise RuntimeError("a fault")

def deaf():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)

assert attempt(fails).problem == 'traceback: RuntimeError: a fault (File "<string>", line 6, in fails)'
assert attempt(os.abort).problem == "ended by SIGABRT"
assert attempt(lambda: sys.exit("one line")).problem == "" and attempt(lambda: sys.exit(3)).code == 3
killed = attempt(die)
assert killed.killed and not killed.problem
assert attempt(deaf, timeout_s=0.2, patience_s=0.2).problem == "did not stop when asked to"
assert attempt(lambda: time.sleep(60), timeout_s=0.2).code == -signal.SIGTERM
"""


def soak(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.long
def test_the_short_form_finds_nothing(tmp_path: Path) -> None:
    done = soak("-m", "tests.soak", "--short", "--failing", str(tmp_path / "failed.csv"), "--csv", str(tmp_path / "t"))
    assert done.returncode == 0, done.stdout + done.stderr
    for row in ("kills     all", "flips     all", "disk      all", "ops       all", "commands  all"):
        assert row in done.stdout, done.stdout
    assert not (tmp_path / "failed.csv").exists()
    assert (tmp_path / "t").read_text().startswith("attack,subject,cases,count,outcomes,faults\n")


@pytest.mark.long
def test_every_attack_finds_a_victim_that_is_broken_on_purpose() -> None:
    done = soak("-m", "tests.soak.sabotage")
    assert done.returncode == 0, done.stderr
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert "optimizer.safetensors differs" in said["kills"]
    # Whichever file was hit first is believed, or comes to grief further on.
    assert said["flips"]
    assert "traceback: RuntimeError: not expected" in said["disk"]
    assert "WRONG" in said["ops"]
    assert "traceback: RuntimeError: a fault" in said["commands"]


def test_an_attempt_tells_how_it_ended() -> None:
    done = soak("-c", FORKED)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_a_case_that_is_none_is_refused() -> None:
    for words, said in ((["--replay", "flops:1"], "must be ATTACK:SEED"), (["--minutes", "nan"], "finite")):
        done = soak("-m", "tests.soak", *words)
        assert done.returncode in (1, 2)
        assert said in done.stderr
        assert "Traceback" not in done.stderr

"""Follows notes/002-adding-a-method.md: its file, put where the note says, is found, listed, planned and compared by
the note's commands."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTE = (ROOT / "notes" / "002-adding-a-method.md").read_text()


def block(language):
    (content,) = re.findall(rf"```{language}\n(.*?)```", NOTE, re.DOTALL)
    return content


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """This checkout with the note's file added: everything but `ablations/` by reference, so that the real one stays as
    it is."""
    folder = tmp_path_factory.mktemp("checkout")
    for package in ("attention", "corpus", "foundation", "lm", "moe", "routing", "staged_training", "triton_kernels"):
        (folder / package).symlink_to(ROOT / package)
    shutil.copytree(ROOT / "ablations", folder / "ablations", ignore=shutil.ignore_patterns("__pycache__"))
    (path,) = re.findall(r"^`(ablations/\w+\.py)`", NOTE, re.MULTILINE)
    (folder / path).write_text(block("python"))
    return folder


def test_the_notes_commands_work(checkout, text_folder, tiny_model):
    commands = [shlex.split(line) for line in block("sh").splitlines()]
    tiny = {
        **tiny_model,
        "n_layers": 3,
        "vocab_size": 300,
        "tokens": 1024,
        "batch_size": 2,
        "seq_len": 32,
        "budget_batches": 1,
    }
    options = [
        "--data",
        str(text_folder),
        *(text for name, value in tiny.items() for text in (f"--{name.replace('_', '-')}", str(value))),
    ]
    printed = []
    for _, *arguments in commands:
        trains = arguments[-1] != "list"
        done = subprocess.run(
            [sys.executable, *arguments, *(options if trains else [])], cwd=checkout, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
        printed.append(done.stdout)
    listed, planned, alone, compared = printed
    assert "sigmoid_scores" in listed
    assert "blocks from 0 on start from the trunk's weights in every branch" in planned
    assert not re.search(r"sigmoid_scores .*±", planned)
    assert re.search(r"^sigmoid_scores .*±", alone, re.MULTILINE)
    # The trunk and two methods with three seeds each: the note says that what an earlier comparison trained is not
    # trained again.
    assert compared.count("finished before") == 1 + 2 * 3
    assert not (ROOT / "ablations" / "sigmoid_scores.py").exists()


def test_the_note_names_what_exists():
    for path in set(re.findall(r"`((?:\w+/)+\w+\.py)`", NOTE)) - {"ablations/sigmoid_scores.py"}:
        assert (ROOT / path).is_file(), path
    sources = "".join(
        (ROOT / path).read_text()
        for path in ("ablations/method.py", "routing/router.py", "routing/policy.py", "routing/budget.py")
    )
    for name in (
        "with_policy",
        "with_plan",
        "experts_of",
        "PolicyConfig",
        "held_mean",
        "assumed_experts",
        "BudgetController",
        "select",
        "losses",
    ):
        assert f"`{name}`" in NOTE
        assert name in sources

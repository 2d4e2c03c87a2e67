"""Follows notes/002-adding-a-method.md to the letter, in a copy of the checkout: its files, put where the note says,
and its edits make a method, a routing policy and a kind of attention that the note's commands find, test and compare.
"""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked import forking

ROOT = Path(__file__).resolve().parents[2]
NOTE = (ROOT / "notes" / "002-adding-a-method.md").read_text()
# A file is named by the last words before its block.
FILES = re.findall(r"`(\w+/(?:\w+/)*\w+\.py)`(?:; [^\n]*)?:\n\n```(python|diff)\n(.*?)```", NOTE, re.DOTALL)
COMMANDS = [
    shlex.split(line) for block in re.findall(r"```sh\n(.*?)```", NOTE, re.DOTALL) for line in block.splitlines()
]
MADE = ["ablations/sigmoid_scores.py", "routing/policies/margin.py", "ablations/margin.py"]
MADE += ["attention/running_mean.py", "attention/kinds.py", "ablations/running_mean_hybrid.py"]


def edited(text, difference):
    """A file with the lines that begin with + put behind the line that stands ahead of them."""
    lines = text.splitlines()
    place = 0
    for line in difference.splitlines():
        if line.startswith("+"):
            lines.insert(place, line[1:])
            place += 1
        else:
            place = lines.index(line[1:], place) + 1
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """This checkout with the note's files and edits: what they touch as a copy, so that the real one stays as it is."""
    folder = tmp_path_factory.mktemp("checkout")
    for package in ("corpus", "foundation", "lm", "moe", "staged_training", "triton_kernels", "pyproject.toml"):
        (folder / package).symlink_to(ROOT / package)
    (folder / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "conftest.py", folder / "tests")
    for copied in ("ablations", "attention", "routing", "tests/routing"):
        shutil.copytree(ROOT / copied, folder / copied, ignore=shutil.ignore_patterns("__pycache__"))
    assert [path for path, _, _ in FILES] == MADE
    for path, kind, content in FILES:
        assert (folder / path).exists() == (kind == "diff")
        (folder / path).write_text(content if kind == "python" else edited((folder / path).read_text(), content))
    return folder


@pytest.fixture(scope="module")
def options(text_folder, tiny_model):
    tiny = {
        **tiny_model,
        "n_layers": 3,
        "vocab_size": 300,
        "tokens": 4096,
        "batch_size": 4,
        "seq_len": 64,
        "budget_batches": 1,
    }
    sizes = (text for name, value in tiny.items() for text in (f"--{name.replace('_', '-')}", str(value)))
    return ["--data", str(text_folder), *sizes]


def without_figures():
    """In the modules of the copy, which a forked process imports anew."""
    from ablations.report import report

    report.svg = lambda draw, label: "<svg></svg>"


def run(checkout, options, *modules):
    """What the note's commands print that begin with one of the modules, small where they train."""
    with forking(without_figures):
        return printed_by(checkout, options, modules)


def printed_by(checkout, options, modules):
    printed = []
    for python, _, module, *words in COMMANDS:
        if module not in modules:
            continue
        assert python == ".venv/bin/python"
        trains = module.startswith("ablations.") or words[:1] == ["compare"]
        done = subprocess.run(
            [sys.executable, "-m", module, *words, *(options if trains else [])],
            cwd=checkout,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{module} {words}: {done.stdout[-2000:]} {done.stderr[-2000:]}"
        printed.append(done.stdout)
    return printed


def test_the_method_is_found_planned_and_compared(checkout, options):
    listed, planned, alone, compared = run(checkout, options, "ablations", "ablations.sigmoid_scores")
    assert "sigmoid_scores" in listed
    assert "blocks from 0 on start from the trunk's weights in every branch" in planned
    assert re.search(r"sigmoid_scores +moe.router.score softmax -> sigmoid", planned)
    assert re.search(r"do as well as a softmax balanced by a loss\? Here: in all 3 blocks\.", planned)
    assert re.search(r"cost +\S+ FLOPs, controls and evaluation included: \d+ % of training 2 methods", planned)
    assert not re.search(r"sigmoid_scores .*±", planned)
    assert re.search(r"^sigmoid_scores .*±", alone, re.MULTILINE)
    # The trunk and two methods with three seeds each: the note says that what an earlier comparison trained is not
    # trained again.
    assert compared.count("finished before") == 1 + 2 * 3


# `test_adding_a_policy.py` compares one of its own in every run of the tests.
@pytest.mark.long
def test_the_policy_is_found_tested_and_compared(checkout, options):
    tested, compared = run(checkout, options, "pytest", "ablations.margin")
    assert re.search(r"^\d+ passed", tested, re.MULTILINE)
    assert "policy TopK(k=3, n_groups=1, top_groups=1) -> Margin(target_mean=3, floor=1, cap=8)" in compared
    assert re.search(r"^margin .*±", compared, re.MULTILINE)


def test_the_kind_of_attention_is_found_counted_and_compared(checkout, options):
    counted, compared = run(checkout, options, "lm", "ablations.running_mean_hybrid")
    # Three layers whose memory does not grow with the text.
    assert re.search(r"^P +3 +0 ", counted, re.MULTILINE)
    assert "layers FFF -> PPP" in compared
    assert "FRESH in every branch" in compared
    assert re.search(r"^running_mean_hybrid .*±", compared, re.MULTILINE)
    assert not any((ROOT / path).exists() for path in MADE if path != "attention/kinds.py")


def test_the_note_names_what_exists():
    for path in set(re.findall(r"`((?:\w+/)+\w+\.py)`", NOTE)) - set(MADE):
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

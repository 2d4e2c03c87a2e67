"""Every command that README, AGENTS.md and the notes name is one that its parser takes; every link among them leads
somewhere."""

import csv
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from corpus.tokenizer import Tokenizer
from foundation import command as foundation_command
from lm.config import ModelConfig
from lm.model import LanguageModel
from lm.pretrained import save_pretrained
from moe.config import MoEConfig
from routing.policies.top_k import TopK
from routing.router import RouterConfig

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "AGENTS.md", *sorted((ROOT / "notes").glob("0*.md"))]
# A line of a code block or a passage in backticks, with `\` at the end of a line that goes on.
COMMAND = re.compile(r"(?:\.venv/bin/)?(?:python|torchrun --nproc-per-node \d) -m ((?:[^`|\n\\]|\\\n)+)")
# What stands for something that the reader puts there, or is put there by a test that follows the page.
MADE_UP = ("[", "...", "sigmoid_scores", "ablations.margin", "running_mean", "PPPF", "pytest")


class Taken(BaseException):
    """The command line parses."""


def commands() -> list[str]:
    """Each as `module words`, without what names no subcommand."""
    found = []
    for page in PAGES:
        for words in COMMAND.findall(page.read_text(encoding="utf-8")):
            words = " ".join(words.replace("\\\n", " ").split("#")[0].split()).rstrip(".,;:")
            if not any(mark in words for mark in MADE_UP) and (" " in words or "." in words):
                found.append(words)
    return sorted(set(found))


def test_there_are_commands_to_check():
    assert {"ablations list", "ablations runs", "staged_training profile", "demos.terminal"} <= set(commands())
    assert len(commands()) > 15


@pytest.mark.parametrize("words", commands())
def test_a_command_of_the_pages_parses(words, monkeypatch):
    package, *arguments = shlex.split(words)
    # A name in a sentence, without what the command requires.
    if len(arguments) == 1:
        arguments.append("--help")

    def parsed(parse, given):
        parse(given)
        raise Taken

    monkeypatch.setattr(foundation_command, "_parsed", parsed)
    monkeypatch.setattr(sys, "argv", [package, *arguments])
    with pytest.raises((Taken, SystemExit)) as ended:
        runpy.run_module(package, run_name="__main__")
    assert isinstance(ended.value, Taken) or (arguments[-1:] == ["--help"] and not ended.value.code)


@pytest.mark.parametrize(
    "page", [*PAGES, *(ROOT / "notes" / "results").glob("*/README.md")], ids=lambda page: str(page)
)
def test_commands_paste_as_they_stand(page):
    """Lines of code blocks call the Python of the environment."""
    blocks = re.findall(r"```(?:sh)?\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert not [line for line in lines if re.match(r" *(python|torchrun|pytest|pip) ", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_the_results_in_the_readme_are_the_recorded_ones():
    """Every row of its table, and nothing left out of the record."""
    with (ROOT / "notes" / "results" / "default" / "table.csv").open(encoding="utf-8") as file:
        recorded = {row["method"]: row for row in csv.DictReader(file)}
    lines = re.findall(r"^\| `(\w+)` \|(.*)\|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [method for method, _ in lines] == list(recorded)
    for method, cells in lines:
        row = recorded[method]
        bits, difference, verdict = (cell.strip() for cell in cells.split("|"))
        assert bits == f"{float(row['bits_per_byte']):.4f} ± {float(row['bits_per_byte_half_width']):.4f}"
        assert verdict == row["verdict"].removesuffix(" on this trunk")
        if row["difference"]:
            assert difference == f"{float(row['difference']):+.4f} ± {float(row['difference_half_width']):.4f}"


# What a sentence of the README says, and where the record says it: (pattern in the README, folder in
# notes/results/README.md, pattern in its row). Groups must agree, numbers as far as the README writes them out.
SAID = [
    (r"The run took ([\d a-z]+?) and cost", "default/", r"; (\d+ min \d+ s) without the installation"),
    (r"and cost (\d+) % of the FLOPs", "default/", r"; (\d+) % of the FLOPs of four methods with three seeds"),
    (r"`xz -9` \((\d\.\d+) against", "default/", r"baseline (\d\.\d+) ±"),
    (r"`xz -9` \(\d\.\d+ against (\d\.\d+) bits", "default/", r"xz -9 (\d\.\d+)"),
    (r"after five million tokens \((\d\.\d+)\)", "long/", r"baseline (\d\.\d+) bits"),
    (
        r"order all (\d)\s+pairs of routing",
        "agreement/",
        r"order (\d) of \d pairs of routing arms",
    ),
    (r"as those do, for (\d+) % of their FLOPs", "agreement/", r"for (\d+) and \d+ % of their FLOPs"),
    (r"parameters frozen (\d of \d)", "agreement/", r"half frozen (\d of \d)"),
    (r"Architectures cannot be compared so \((\d of \d)\)", "agreement/", r"of architectures (\d of \d)"),
    (r"orders all (\d+) pairs of all arms, for", "agreement/", r"all (\d+) pairs of all arms"),
    (r"pairs of all arms, for (\d+) %", "agreement/", r"pairs of all arms for (\d+) %"),
    (r"1B model from 190M to 760M\s+within (\d\.\d+) % in the mean", "scaling/", r"within (\d\.\d+) % in the mean"),
]


@pytest.mark.parametrize(("said", "folder", "recorded"), SAID)
def test_numbers_in_the_sentences_of_the_readme_are_recorded(said, folder, recorded):
    rows = (ROOT / "notes" / "results" / "README.md").read_text(encoding="utf-8").splitlines()
    (row,) = (line for line in rows if line.startswith(f"| `{folder}` |"))
    ours = re.search(said, (ROOT / "README.md").read_text(encoding="utf-8"))
    theirs = re.search(recorded, row)
    assert ours is not None, said
    assert theirs is not None, recorded
    for mine, other in zip((group for group in ours.groups() if group is not None), theirs.groups()):
        digits = len(mine.partition(".")[2])
        assert mine == (f"{float(other):.{digits}f}" if digits else other)


def test_the_limits_in_the_readme_are_those_of_its_table():
    """What null experts and top-p may change at the most, as the sentence behind the table says it."""
    with (ROOT / "notes" / "results" / "default" / "table.csv").open(encoding="utf-8") as file:
        verdicts = [row["verdict"] for row in csv.DictReader(file)]
    limits = [found[1] for verdict in verdicts if (found := re.match(r"smaller than (\S+)", verdict))]
    (said,) = re.findall(r"is smaller than (\d\.\d+);", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert said == max(limits)


def test_the_readme_loads_a_run(tmp_path, capsys):
    tokenizer = Tokenizer.train(["def main(argv):\n    return argv\n" * 20], 270)
    moe = MoEConfig(n_experts=4, d_expert=8, router=RouterConfig(policy=TopK(k=2)))
    model = LanguageModel(ModelConfig(vocab_size=tokenizer.vocab_size, d_model=16, n_layers=1, moe=moe)).init_weights(0)
    save_pretrained(tmp_path, model, None, tokenizer)
    (example,) = re.findall(
        r"from the folder of any run:\n+```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    exec(compile(example.replace("runs/branches/NAME/model", str(tmp_path)), "README.md", "exec"), {})
    assert capsys.readouterr().out.strip("\n")


def test_the_example_in_the_readme_runs(capsys):
    (example,) = re.findall(r"## In Python\n+```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("tensor([")

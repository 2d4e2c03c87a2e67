"""Every command that README, AGENTS.md and the notes name is one that its parser takes; every link among them leads
somewhere."""

import csv
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from foundation import command as foundation_command

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "AGENTS.md", *sorted((ROOT / "notes").glob("0*.md"))]
# A line of a code block or a passage in backticks, with `\` at the end of a line that goes on.
COMMAND = re.compile(r"(?:\.venv/bin/)?(?:python|torchrun --nproc-per-node \d) -m ((?:[^`|\n\\]|\\\n)+)")
# What stands for something that the reader puts there, or is put there by a test that follows the page.
MADE_UP = ("[", "...", "sigmoid_scores", "pytest")


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


def test_the_example_in_the_readme_runs(capsys):
    (example,) = re.findall(r"## In Python\n+```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("tensor([")

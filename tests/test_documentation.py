"""Every command that README, AGENTS.md and the notes name is one that its parser takes; every link among them leads
somewhere."""

import argparse
import csv
import math
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from corpus.refine.cascade import LAYERS
from corpus.tokenizer import Tokenizer
from foundation import command as foundation_command
from foundation.serialize import kinds
from lm.config import ModelConfig
from lm.gguf_files.architectures import ARCHITECTURES
from lm.model import LanguageModel
from lm.pretrained import save_pretrained
from lm.published.families import FAMILIES
from moe.config import MoEConfig
from routing.policies.top_k import TopK
from routing.policy import PolicyConfig
from routing.router import RouterConfig

ROOT = Path(__file__).resolve().parent.parent
# All but the log, which says what was so on a day.
PAGES = [ROOT / "README.md", ROOT / "AGENTS.md"]
PAGES += [page for page in sorted((ROOT / "notes").rglob("*.md")) if page.name != "LOG.md"]
# What stands for something that the reader puts there, or is put there by a test that follows the page.
MADE_UP = ("[", "...", "sigmoid_scores", "ablations.margin", "running_mean", "PPPF", "pip install")
CODE_BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"(?:\.venv/bin/)?(?:python|torchrun --nproc-per-node \d) (?:-m )?([\w./]+(?: .*)?)")


def name_of(page: Path) -> str:
    """A page in the name of a test."""
    return page.relative_to(ROOT).as_posix()


class Taken(BaseException):
    """The command line parses."""


def lines_of_code(page: Path) -> list[str]:
    """Lines of code blocks, with those that `\\` continues, and passages in backticks, each as one line."""
    text = page.read_text(encoding="utf-8")
    blocks = [block.replace("\\\n", " ") for block in CODE_BLOCK.findall(text)]
    passages = re.findall(r"`([^`]+)`", "\n".join([CODE_BLOCK.sub("", text), *blocks]))
    lines = [line for block in blocks for line in block.splitlines()]
    return [" ".join(line.split("  #")[0].split()) for line in (*passages, *lines)]


def commands() -> list[str]:
    """Each as `module words` or `file.py words`; `a b | c` are `a b` and `a c`."""
    found = set()
    for line in (line for page in PAGES for line in lines_of_code(page)):
        if (command := COMMAND.fullmatch(line)) and not any(mark in line for mark in MADE_UP):
            first, *others = command[1].split(" | ")
            found |= {first, *(f"{first.rpartition(' ')[0]} {other}" for other in others)}
    # A name of a package alone is none.
    return sorted(each for each in found if " " in each or "." in each)


def test_there_are_commands_to_check():
    assert {"ablations list", "ablations runs", "staged_training profile", "demos.terminal"} <= set(commands())
    assert len(commands()) > 15


@pytest.mark.parametrize("words", commands())
def test_a_command_of_the_pages_parses(words, monkeypatch):
    program, *arguments = shlex.split(words)
    for path in [word for word in (program, *arguments) if word.startswith("tests/")]:
        assert (ROOT / path).exists()
    if program == "pytest":
        return
    # A name in a sentence, without what the command requires.
    if all(re.fullmatch(r"[a-z-]+", word) for word in arguments):
        arguments.append("--help")

    def parsed(parse, given):
        parse(given)
        raise Taken

    parse_args = argparse.ArgumentParser.parse_args

    def parsed_by_a_script(parser):
        parse_args(parser)
        raise Taken

    monkeypatch.setattr(foundation_command, "_parsed", parsed)
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    if program.startswith("tests"):
        if program.endswith(".py") and "parse_args" not in (ROOT / program).read_text():
            # Without a parser: what it does with the words shows when it is run.
            return
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed_by_a_script)
    start, place = (runpy.run_path, ROOT / program) if program.endswith(".py") else (runpy.run_module, program)
    for name in (program, f"{program}.__main__"):
        # One that is there already would be run a second time, and Python warns of that.
        if not hasattr(sys.modules.get(name), "__path__"):
            monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises((Taken, SystemExit)) as ended:
        start(str(place), run_name="__main__")
    assert isinstance(ended.value, Taken) or (arguments[-1:] == ["--help"] and not ended.value.code)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_paste_as_they_stand(page):
    """Lines of code blocks call the Python of the environment, and so does every passage that names an option or a
    file."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in CODE_BLOCK.findall(text) for line in block.splitlines()]
    lines += [line for line in lines_of_code(page) if re.search(r" --|\.py", line)]
    assert not [line for line in lines if re.match(r" *(python|torchrun|pytest|pip) ", line)]
    # Fenced, since of what is indented no line says that it goes on.
    assert not re.findall(r"^ {4}\S*(?:python|torchrun|pip) .*", CODE_BLOCK.sub("", text), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_the_results_in_the_readme_are_the_recorded_ones():
    """Every row of its table, and nothing left out of the record."""
    with (ROOT / "notes" / "results" / "default" / "table.csv").open(encoding="utf-8") as file:
        recorded = {row["method"]: row for row in csv.DictReader(file)}
    lines = re.findall(r"^\| `(\w+)` \|(.*)\|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    # The trunk, which is no method, need not be shown, and records of earlier days do not have it.
    assert [method for method, _ in lines if method != "trunk"] == [name for name in recorded if name != "trunk"]
    for method, cells in lines:
        row = recorded[method]
        bits, difference, verdict = (cell.strip() for cell in cells.split("|"))
        half = f" ± {float(row['bits_per_byte_half_width']):.4f}" if row["bits_per_byte_half_width"] else ""
        assert bits == f"{float(row['bits_per_byte']):.4f}{half}"
        assert verdict == row["verdict"].removesuffix(" on this trunk")
        if row["difference"]:
            assert difference == f"{float(row['difference']):+.4f} ± {float(row['difference_half_width']):.4f}"


# What a sentence of the README says, and where the record says it: (pattern in the README, folder in
# notes/results/README.md, pattern in its row). Groups must agree, numbers as far as the README writes them out.
SAID = [
    (r"The run took\s+([\d a-z]+?) and cost", "default/", r"; (\d+ min \d+ s) without the installation"),
    (r"and cost (\d+) % of the FLOPs", "default/", r"; (\d+) % of the FLOPs of four methods with three seeds"),
    (r"`xz -9`: (\d\.\d+) against", "default/", r"baseline (\d\.\d+) ±"),
    (r"`xz -9`: \d\.\d+ against (\d\.\d+) bits", "default/", r"xz -9 (\d\.\d+)"),
    (r"easier for xz \((\d\.\d+) against", "default/", r"34 of them\): baseline \d\.\d+, xz -9 (\d\.\d+)"),
    (r"easier for xz \(\d\.\d+ against (\d\.\d+) of", "default/", r"34 of them\): baseline (\d\.\d+)"),
    (r"order all (\d+)\s+pairs of routing", "agreement/", r"order (\d+) of \d+ pairs of routing arms"),
    (r"as those do, for (\d+) % of their FLOPs", "agreement/", r"at 85 % for (\d+) % of their FLOPs"),
    (r"Architectures cannot be compared so \((\d of \d)\)", "agreement/", r"of architectures (\d of \d)"),
    (r"trained whole, orders (\d of \d)", "agreement/", r"half of every width, whole, (\d of \d)"),
    (r"(\d+ of \d+) pairs of all arms, for", "agreement/", r"(\d+ of \d+) pairs of all arms"),
    (r"pairs of all arms, for (\d+) %", "agreement/", r"pairs of all arms for (\d+) %"),
    (r"nothing against itself \(-(\d\.\d) %", "dynamic/", r"(\d\.\d) % below the original"),
    (r"it ends at (\d\.\d+) where", "dynamic/", r"taught as the annealing (\d\.\d+)"),
    (r"with 4 for as many\s+tokens ends at (\d\.\d+)", "dynamic/", r"static 4 with the same tokens (\d\.\d+)"),
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


NUMBERS = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen"),
]
# What the README counts, and what there is.
COUNTED = [
    (r"(\w+) policies from top-k", lambda: len(kinds(PolicyConfig))),
    (r"safetensors of (\w+) families", lambda: len(FAMILIES)),
    (r"`lm gguf` writes (\w+) of\s+the families", lambda: len(ARCHITECTURES)),
    (r"a cascade of (\w+) filters", lambda: len(LAYERS)),
    (r"branches (\w+) arms x 3 seeds", lambda: len(re.search(r"compare (.*) --seeds 3", MAKEFILE)[1].split())),
    (r"`make ablation` takes (\w+) minutes", lambda: math.ceil(recorded_minutes())),
]
MAKEFILE = (ROOT / "Makefile").read_text()


def recorded_minutes() -> float:
    record = (ROOT / "notes" / "results" / "README.md").read_text(encoding="utf-8")
    minutes, seconds = re.search(r"; (\d+) min (\d+) s without the installation", record).groups()
    return int(minutes) + int(seconds) / 60


@pytest.mark.parametrize(("said", "there_are"), COUNTED)
def test_the_readme_counts_right(said, there_are):
    (word,) = re.findall(said, (ROOT / "README.md").read_text(encoding="utf-8"))
    assert NUMBERS.index(word) == there_are()


def test_the_limits_in_the_readme_are_those_of_its_table():
    """What null experts and top-p may change at the most, as the sentence behind the table says it."""
    with (ROOT / "notes" / "results" / "default" / "table.csv").open(encoding="utf-8") as file:
        verdicts = [row["verdict"] for row in csv.DictReader(file)]
    limits = [found[1] for verdict in verdicts if (found := re.match(r"smaller than (\S+)", verdict))]
    (said,) = re.findall(r"is smaller than (\d\.\d+);", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert said == max(limits)


def test_the_readme_says_how_to_cite():
    assert "`CITATION.cff`" in (ROOT / "README.md").read_text(encoding="utf-8")
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert all(f"\n{field}:" in f"\n{cited}" for field in ("cff-version", "title", "authors", "license"))


def test_the_installation_of_the_readme_is_the_recorded_one():
    recorded = (ROOT / "notes" / "results" / "first_hour" / "README.md").read_text(encoding="utf-8")
    lean, whole = re.findall(r"\*\*([\d,]+) MiB\*\*", recorded)
    said = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"(?:installation of|it is) (\d\.\d) GB", said) == [
        f"{int(size.replace(',', '')) / 1024:.1f}" for size in (lean, whole)
    ]


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

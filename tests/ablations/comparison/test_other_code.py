"""Results of old code are not served for new code: the command, before and after real edits of a copied checkout."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from ablations import cli
from ablations.comparison import registry
from foundation import source
from staged_training import code

pytestmark = pytest.mark.usefixtures("undrawn")

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("foundation", "triton_kernels", "attention", "routing", "moe", "lm", "corpus", "staged_training")
TRAINED = re.compile(r"^(\S+) valid bpb", re.MULTILINE)


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """The sources once more, which edits do no harm to."""
    folder = tmp_path_factory.mktemp("checkout")
    for package in (*PACKAGES, "ablations"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture
def edit(copied, monkeypatch):
    """A function that edits a file of the copy, which fingerprints are taken of."""
    for module in (source, code):
        monkeypatch.setattr(module, "ROOT", copied)
    monkeypatch.setattr(registry, "FOLDER", copied / "ablations")
    forget()

    def change(name, old, new):
        text = (copied / name).read_text()
        assert old in text
        (copied / name).write_text(text.replace(old, new, 1))
        forget()

    yield change
    forget()


def forget():
    for read in (source.code_of, source.file_code):
        read.cache_clear()


@pytest.fixture(scope="module")
def options(text_folder, tiny_model, tmp_path_factory):
    tiny = {
        **tiny_model,
        "n_layers": 2,
        "vocab_size": 300,
        "tokens": 2048,
        "batch_size": 4,
        "seq_len": 64,
        "freeze": 0.4,
        "budget_batches": 1,
        "seeds": 1,
    }
    flat = [text for name, value in tiny.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    return ["--data", str(text_folder), "--out", str(tmp_path_factory.mktemp("runs")), *flat]


@pytest.fixture
def run(options, capsys):
    """Compares top_p with the baseline, with further options; what it printed."""

    def command(*more, words=("compare", "top_p")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                sys,
                "argv",
                ["ablations", *words, *more] if words[0] == "runs" else ["ablations", *words, *options, *more],
            )
            cli.main()
        return capsys.readouterr().out

    return command


def test_an_edit_trains_again_what_depends_on_it_and_nothing_else(edit, run, options):
    assert TRAINED.findall(run()) == ["trunk", "baseline-seed0", "top_p-seed0"]
    out = Path(options[3])
    first = {path: path.stat().st_mtime_ns for path in out.glob("*/*/result.json")}

    edit("routing/policies/top_p.py", '"""Top-p:', '"""# Top-p, in other words:')
    edit("ablations/top_p.py", "    k = experts_of(model)\n", "    # In words only.\n    k = experts_of(model)\n")
    edit("routing/policies/relu.py", "FLOOR_SCORE = 1e-2", "FLOOR_SCORE = 2e-2")
    edit("ablations/report/report.py", "import html", "import html, math")
    assert TRAINED.findall(run()) == []

    edit("routing/policies/top_p.py", "rate: float = 0.5", "rate: float = 0.4 + 0.1")
    printed = run()
    assert TRAINED.findall(printed) == ["top_p-seed0"]
    assert "was trained by other code: routing/policies/top_p.py changed; trained again" in printed

    edit("ablations/top_p.py", "min(2 * k,", "min(k + k,")
    printed = run()
    assert TRAINED.findall(printed) == ["top_p-seed0"]
    assert "ablations/top_p.py changed" in printed

    edit("staged_training/loop.py", "step += 1\n", "step = step + 1\n")
    printed = run("--accept-old-code")
    assert TRAINED.findall(printed) == []
    assert printed.count("counts, though other code trained it: staged_training/loop.py changed") == 3
    printed = run()
    assert TRAINED.findall(printed) == ["trunk", "baseline-seed0", "top_p-seed0"]
    assert printed.count("staged_training/loop.py changed") == 3

    # Nothing of before was touched, and the list says which is which.
    assert first.items() <= {path: path.stat().st_mtime_ns for path in out.glob("*/*/result.json")}.items()
    listed = run(words=("runs", str(out))).splitlines()
    old = [line for line in listed if "by other code" in line]
    assert len(old) == 5
    assert sum("ablations/top_p.py, routing/policies/top_p.py, staged_training/loop.py changed" in x for x in old) == 1
    assert sum(" branch " in line and "by other code" not in line for line in listed) == 2

    # Code that comes back finds what it has trained.
    edit("staged_training/loop.py", "step = step + 1\n", "step += 1\n")
    assert TRAINED.findall(run()) == []


def test_another_torch_trains_again_and_a_run_of_before_can_be_accepted(edit, run, options, monkeypatch):
    run()
    monkeypatch.setattr(code, "version", lambda name: "99.0" if name == "torch" else None)
    printed = run("--tokens", "2048", "--accept-old-code")
    assert TRAINED.findall(printed) == []
    assert "other code trained it: torch" in printed
    assert "trained by other code" not in printed
    config = next(path for path in Path(options[3]).glob("trunks/*/config.json"))
    assert "torch" in json.loads(config.read_text())["code"]

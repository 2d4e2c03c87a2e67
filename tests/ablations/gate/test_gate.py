"""The gate through its command: what it prints, writes and exits with, what it trains, and what is no verdict."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ablations import cli
from ablations.gate.ledger import read_tries
from tests.forked import forking

pytestmark = pytest.mark.usefixtures("undrawn")

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def words(text_folder, tiny_model):
    options = {**tiny_model, "n_layers": 2, "vocab_size": 300, "tokens": 2048, "batch_size": 4, "seq_len": 32}
    options |= {"freeze": 0.4, "budget_batches": 1, "data": text_folder}
    return [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def asked_once(words, tmp_path_factory):
    """A gate in processes of its own; two looks are allowed, and whatever the method does it is accepted at the
    first."""
    out = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "-m", "ablations", "gate", "top_p", "--margin", "-9", "--json", "--seeds", "4", *words]
    with forking():
        done = subprocess.run([*command, "--out", out, "--jobs", "2"], cwd=ROOT, capture_output=True, text=True)
    return out, done


def gate(*given):
    """Runs the command in this process; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ablations", "gate", *map(str, given)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    return stopped.value.code


def branches(out):
    return {path.parent.name: path.stat().st_mtime_ns for path in out.glob("branches/*/result.json")}


def test_the_verdict_is_printed_alone_as_json_and_written(asked_once):
    out, done = asked_once
    assert done.returncode == 0, done.stderr
    verdict = json.loads(done.stdout)
    (path,) = out.glob("comparisons/*/gate_1.json")
    assert json.loads(path.read_text()) == verdict
    assert verdict["comparison"] == str(path.parent)
    # Of this process and of those that it started.
    assert "try 1 on this trunk, looks at 3, 4 seeds, each at 98.8 %" in done.stderr
    assert "top_p-seed2 valid bpb=" in done.stderr
    assert (verdict["method"], verdict["verdict"], verdict["margin"]) == ("top_p", "keep", -9)
    assert verdict["reason"] == "worse than the baseline by less than 9, or better"
    assert (verdict["seeds"], verdict["max_seeds"], verdict["ledger_number"]) == (3, 4, 1)
    assert [look["seeds"] for look in verdict["looks"]] == [3]
    low, high = verdict["interval"]
    assert low < verdict["effect"] < high < 9
    assert verdict["level"] == pytest.approx(1 - 0.05 / 2 / 2)
    assert verdict["minimum_detectable_effect"] > 0
    cost = verdict["cost"]
    assert 0 < cost["branch_flops"] < cost["flops"]
    assert cost["share_of_full_run"] == pytest.approx(cost["flops"] / cost["full_run_flops"])
    assert cost["seconds"] > cost["branch_seconds"] > 0
    assert len(verdict["commit"] or "0" * 40) == 40


def test_the_same_question_is_the_same_try_and_another_one_trains_new_seeds_only(asked_once, words, capsys):
    out, done = asked_once
    before = branches(out)
    assert len(before) == 2 * 3
    assert gate("top_p", "--margin", "-9", "--json", "--seeds", 4, "--out", out, "--jobs", 1, *words) == 0
    again, first = json.loads(capsys.readouterr().out), json.loads(done.stdout)
    assert again == first | {"uncommitted_changes": again["uncommitted_changes"]}
    assert branches(out) == before

    # As good as never wrong: nothing is clear enough, at either look.
    strict = ("top_p", "--error", "1e-9", "--seeds", "4", "--out", out, "--jobs", "1", *words)
    assert gate(*strict) == 2
    printed = capsys.readouterr().out
    assert "try 2 on this trunk" in printed
    assert "top_p: unresolved, the interval holds 0" in printed
    after = branches(out)
    assert len(after) == 2 * 4
    assert before.items() < after.items()
    assert [known.answer for known in read_tries(out / "gate")] == ["keep", "unresolved"]

    # No method is so much better.
    assert gate("top_p", "--margin", "9", "--seeds", 4, "--out", out, "--jobs", 1, *words) == 1
    assert "top_p: discard, not better than the baseline by more than 9" in capsys.readouterr().out
    assert [known.number for known in read_tries(out / "gate")] == [1, 2, 3]


def test_what_is_no_verdict_exits_with_no_verdicts_code(words, tmp_path, monkeypatch, capsys):
    usage = [("--margin", "x"), ("--margin", "nan"), ("--error", "0"), ("--seeds", "0"), ("--nothing",)]
    for option in usage:
        assert gate("top_p", "--out", tmp_path, *words, *option) == 64, option
        assert capsys.readouterr().err
    assert gate() == 64
    unusable = [("top_q",), ("baseline",), ("top_p", "--seeds", "1"), ("top_p", "--dry-run"), ("top_p", "--k", "9")]
    k = words.index("--k")
    for given in unusable:
        assert gate(*given, "--json", "--out", tmp_path, *words[:k], *words[k + 2 :]) == 65, given
        printed = capsys.readouterr()
        assert printed.err.count("\nerror: ") + printed.err.startswith("error: ") == 1
        assert printed.out == ""
    assert not list(tmp_path.glob("comparisons/*/gate_*.json"))

    def broken(*_):
        raise KeyError("a mistake of ours")

    monkeypatch.setattr(cli, "gate", broken)
    assert gate("top_p", "--out", tmp_path) == 70
    assert "KeyError: 'a mistake of ours'" in capsys.readouterr().err


def test_help_names_the_codes(capsys):
    assert gate("--help") == 0
    assert "0 for keep, 1 for discard, 2 for unresolved" in " ".join(capsys.readouterr().out.split())

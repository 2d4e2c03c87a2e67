"""A folder of runs: what is listed, what can go, and what still works without it."""

import json
import shutil

import pytest

from ablations import cli
from ablations.comparison.cost import compare_costs, cost_text
from ablations.comparison.records import read_records
from ablations.report.report import show
from ablations.report.run_folders import removable, run_folders


@pytest.fixture
def root(write_synthetic):
    """The synthetic comparison with what real runs hold beside their records."""
    root = write_synthetic().parents[1]
    for run in (*root.glob("trunks/*"), *root.glob("branches/*")):
        (run / "config.json").write_text("{}")
        for step in ("step_00000009", "step_00000012"):
            (run / "checkpoints" / step).mkdir(parents=True)
            (run / "checkpoints" / step / "weights.safetensors").write_bytes(bytes(1000))
    (root / "trunks" / "0" / "activations" / "train").mkdir(parents=True)
    (root / "trunks" / "0" / "activations" / "train" / "activations.bin").write_bytes(bytes(5000))
    return root


def run(*arguments, monkeypatch):
    monkeypatch.setattr("sys.argv", ["ablations", *map(str, arguments)])
    cli.main()


def test_runs_lists_what_when_how_large_and_what_came_out(root, monkeypatch, capsys):
    (root / "branches" / "top_p_0_0" / "result.json").unlink()
    run("runs", root, monkeypatch=monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 1 + 18 + 1
    assert "comparison" in lines[0]
    assert "random_k" in lines[0]
    assert "worse" in lines[0]
    assert "unfinished, checkpoint at step 12" in next(line for line in lines if "top_p_0_0" in line)
    assert "bits per byte" in next(line for line in lines if "top_p_0_1" in line)
    assert {found.what for found in run_folders(root)} == {"comparison", "trunk", "branch"}
    run("runs", root / "nowhere", monkeypatch=monkeypatch)
    assert "no runs in" in capsys.readouterr().out


def test_prune_names_what_nothing_needs(root, monkeypatch, capsys):
    trunk = root / "trunks" / "0"
    found = {item.folder for item in removable(root)}
    assert {trunk / "activations", trunk / "checkpoints" / "step_00000009"} <= found
    assert found - {trunk / "activations", trunk / "checkpoints" / "step_00000009"} == set(
        root.glob("branches/*/checkpoints")
    )
    before = sorted(root.rglob("*"))
    run("prune", root, monkeypatch=monkeypatch)
    printed = capsys.readouterr().out
    assert printed.count("would free") == 20
    assert "--yes removes them" in printed
    assert sorted(root.rglob("*")) == before


def test_prune_keeps_what_an_unfinished_branch_needs(root):
    unfinished = root / "branches" / "top_p_0_0"
    (unfinished / "result.json").unlink()
    found = {item.folder for item in removable(root)}
    assert root / "trunks" / "0" / "activations" not in found
    assert unfinished / "checkpoints" not in found
    # Planned, not begun.
    shutil.rmtree(unfinished)
    assert root / "trunks" / "0" / "activations" not in {item.folder for item in removable(root)}


def test_prune_keeps_the_only_weights_that_are_left(root, monkeypatch, capsys):
    run("prune", root, "--yes", monkeypatch=monkeypatch)
    printed = capsys.readouterr().out
    # These branches have no exported model, and the trunk's last checkpoint is not one.
    assert printed.count("kept") == 19
    assert len(list(root.glob("branches/*/checkpoints"))) == 18
    assert not (root / "trunks" / "0" / "activations").exists()


def test_a_report_without_its_trunks_names_them_and_shows_the_rest(root, capsys):
    (folder,) = root.glob("comparisons/*")
    show(folder)
    whole = capsys.readouterr().out
    shutil.rmtree(root / "trunks")
    show(folder)
    without = capsys.readouterr().out
    rows = [line for line in whole.splitlines() if "±" in line]
    assert len(rows) == 6
    assert rows == [line for line in without.splitlines() if "±" in line]
    assert f"Missing: {root / 'trunks' / '0'}. Curves and costs" in without
    assert "no share of training from scratch can be told" in without
    assert "% of the FLOPs of training" not in without
    page = (folder / "report.html").read_text()
    assert "Missing: " in page
    assert ">nan" not in page


def test_one_missing_trunk_of_two_makes_the_costs_incomplete(write_synthetic):
    folder = write_synthetic(trunk_seeds=(0, 1))
    shutil.rmtree(folder.parents[1] / "trunks" / "1")
    records = read_records(folder)
    assert [path.name for path in records.missing] == ["1"]
    assert list(records.trunks) == [0]
    assert "% of the FLOPs" not in cost_text(compare_costs(records))
    assert json.dumps(records.environment)

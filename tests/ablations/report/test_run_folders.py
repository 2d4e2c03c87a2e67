"""A folder of runs: what is listed, what can go, and what still works without it."""

import json
import os
import re
import shutil
from urllib.parse import unquote

import pytest

from ablations import cli
from ablations.comparison.cost import compare_costs, cost_text
from ablations.comparison.records import read_records
from ablations.report.index import write_index
from ablations.report.report import show
from ablations.report.run_folders import run_folders, weighed
from foundation.files import seal
from staged_training.progress import METRICS, TIMING
from staged_training.record import CONFIG, ENVIRONMENT, LEDGER, RESULT

pytestmark = pytest.mark.usefixtures("undrawn")


def removable(root):
    return [item for item in weighed(root) if not item.needed]


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
    os.utime(root / "branches" / "random_k_0_1" / "result.json", (4e9, 4e9))
    run("runs", root, monkeypatch=monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 1 + 18 + 1 + 1
    assert lines[-1] == f"index: {root / 'index.html'}"
    # Each kind newest first.
    assert "random_k_0_1" in next(line for line in lines if " branch " in line)
    assert "comparison" in lines[0]
    assert "random_k" in lines[0]
    assert "worse" in lines[0]
    assert "unfinished, checkpoint at step 12" in next(line for line in lines if "top_p_0_0" in line)
    assert "bits per byte" in next(line for line in lines if "top_p_0_1" in line)
    assert {found.what for found in run_folders(root)} == {"comparison", "trunk", "branch"}
    run("runs", root / "nowhere", monkeypatch=monkeypatch)
    assert "no runs in" in capsys.readouterr().out


def test_the_index_links_what_is_there_and_escapes_what_was_found(root, monkeypatch):
    (comparison,) = (root / "comparisons").iterdir()
    show(comparison)
    awkward = (root / "branches" / "top_p_0_0").rename(root / "branches" / "top&p <b>#0")
    page = write_index(root, run_folders(root)).read_text()
    links = [unquote(link) for link in re.findall('href="([^"]*)"', page)]
    assert links[0] == f"comparisons/{comparison.name}/report.html"
    assert f"branches/{awkward.name}" in links
    assert len(links) == len(run_folders(root)) == 20
    assert all((root / link).exists() for link in links)
    assert "top&amp;p &lt;b&gt;#0" in page
    assert "<b>" not in page
    assert page.index("Comparisons") < page.index("Trunks") < page.index("Branches")
    # A page among runs is none of them.
    assert len(run_folders(root)) == 20


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
    assert "20 folders" in printed
    assert "--yes removes them" in printed
    (kept,) = [line for line in printed.splitlines() if line.startswith("kept")]
    assert f"{trunk / 'checkpoints' / 'step_00000012'}  (the last checkpoint, from which further branches" in kept
    assert f"removing {trunk} frees it" in kept
    assert sorted(root.rglob("*")) == before


def kept_lines(printed):
    return {line.split("  (")[0].split("MiB")[1].strip(): line for line in printed.splitlines() if line[:4] == "kept"}


def test_prune_keeps_what_an_unfinished_branch_needs_and_says_so(root, monkeypatch, capsys):
    unfinished = root / "branches" / "top_p_0_0"
    (unfinished / "result.json").unlink()
    found = {item.folder for item in removable(root)}
    assert root / "trunks" / "0" / "activations" not in found
    assert unfinished / "checkpoints" not in found
    run("prune", root, monkeypatch=monkeypatch)
    kept = kept_lines(capsys.readouterr().out)
    activations = str(root / "trunks" / "0" / "activations")
    assert f"({unfinished} and 1 more may still train on it; finishing the comparison frees it" in kept[activations]
    assert (
        f"goes on from here; its command frees it, or removing {unfinished})" in kept[str(unfinished / "checkpoints")]
    )
    assert "0.0 MiB" in kept[activations]
    # Planned, not begun.
    shutil.rmtree(unfinished)
    run("prune", root, monkeypatch=monkeypatch)
    assert str(root / "comparisons" / "synthetic") in kept_lines(capsys.readouterr().out)[activations]


def test_prune_keeps_the_only_weights_that_are_left(root, monkeypatch, capsys):
    run("prune", root, "--yes", monkeypatch=monkeypatch)
    printed = capsys.readouterr().out
    # These branches have no exported model, and the trunk's last checkpoint is not one.
    kept = kept_lines(printed)
    assert len(kept) == 20
    assert all("model" in line for folder, line in kept.items() if "branches" in folder)
    assert "manifest.json is missing" in kept[str(root / "trunks" / "0" / "checkpoints" / "step_00000009")]
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


@pytest.mark.parametrize("run_name", ["branches/top_p_0_1", "branches/baseline_0_0", "trunks/0"])
@pytest.mark.parametrize("name", [RESULT, METRICS, TIMING, LEDGER])
def test_a_damaged_run_is_named_and_left_out_of_the_report(root, monkeypatch, capsys, name, run_name):
    (folder,) = root.glob("comparisons/*")
    for path in (*root.glob("trunks/*"), *root.glob("branches/*")):
        seal(path, (RESULT, METRICS, TIMING, LEDGER, CONFIG, ENVIRONMENT))
    damaged = root / run_name / name
    damaged.write_bytes(damaged.read_bytes().replace(b"1", b"2", 1) if name != RESULT else b"{")
    with pytest.raises(SystemExit) as stopped:
        run("report", folder, monkeypatch=monkeypatch)
    sentence = f"{damaged.parent}: {name} "
    assert "left out of the report" in str(stopped.value.code)
    assert sentence in str(stopped.value.code)
    printed = capsys.readouterr().out
    # In the table's footnotes too, with what makes it again.
    assert f"Damaged and left out: {sentence}" in printed
    assert "remove the folder and run the same command again" in printed
    assert "The command of this comparison: python -m ablations compare" in printed
    assert sum("±" in line for line in printed.splitlines()) == 6
    assert "Damaged and left out" in (folder / "report.html").read_text()
    records = read_records(folder)
    assert sum(map(len, records.results.values())) == (18 if run_name == "trunks/0" else 17)
    assert records.missing == ()
    assert compare_costs(records).complete == (run_name != "trunks/0")


def test_no_baseline_but_damaged_ones_is_no_comparison(root, monkeypatch):
    (folder,) = root.glob("comparisons/*")
    for seed in range(3):
        (root / f"branches/baseline_0_{seed}" / RESULT).write_text("{")
    with pytest.raises(ValueError, match=r"no finished branch of 'baseline'.*baseline_0_1/result.json is no readable"):
        read_records(folder)

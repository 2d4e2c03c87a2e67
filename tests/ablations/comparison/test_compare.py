"""The whole comparison through its command: two methods, two seeds, a real text folder, in seconds."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ablations import cli
from tests.forked import forking

pytestmark = pytest.mark.usefixtures("undrawn")

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def arguments(text_folder, tiny_model):
    options = {
        **tiny_model,
        "n_layers": 4,
        "vocab_size": 300,
        "tokens": 4096,
        "batch_size": 4,
        "seq_len": 64,
        "freeze": 0.7,
        "budget_batches": 1,
        "jobs": 1,
    }
    flat = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    return ["--data", str(text_folder), "--seeds", "2", *flat]


@pytest.fixture(scope="module")
def first_run(arguments, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    command = [
        sys.executable,
        "-m",
        "ablations",
        "compare",
        "twin",
        "other_order",
        "top_p",
        *arguments,
        "--out",
        str(out),
    ]
    with forking():
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, command, done.stdout


def written(out):
    return {
        path: path.stat().st_mtime_ns
        for name in ("trunks", "branches", "corpus")
        for path in (out / name).rglob("*")
        if path.is_file()
    }


def test_prints_plan_estimate_progress_table_ledger_and_report(first_run):
    out, _, printed = first_run
    order = [
        printed.index(text)
        for text in (
            "methods 4, branch seeds 2",
            "estimated time",
            "trunk step=",
            "valid bpb=",
            "cost ledger",
            "report: ",
        )
    ]
    assert order == sorted(order)
    assert "peak memory" in printed
    rows = [
        line for line in printed.splitlines() if line.startswith(("baseline  ", "twin  ", "other_order  ", "top_p  "))
    ]
    assert len([row for row in rows if "±" in row]) == 4
    assert "reference" in next(row for row in rows if row.startswith("baseline") and "±" in row)
    report = Path(printed.rsplit("report: ", 1)[1].strip())
    assert report.is_file()
    assert sorted(path.name for path in report.parent.iterdir()) == [
        "comparison.json",
        "figures",
        "options.toml",
        "report.html",
        "seal.json",
        "table.csv",
    ]
    assert len(list((out / "branches").iterdir())) == 8


def test_baseline_learns_and_pairs_share_data(first_run):
    out, _, _ = first_run
    folders = {path.name.rsplit("_", 1)[0]: path for path in (out / "branches").iterdir()}
    losses = {
        name: [json.loads(line)["loss"] for line in (path / "metrics.jsonl").read_text().splitlines()]
        for name, path in folders.items()
    }
    (trunk,) = (out / "trunks").iterdir()
    trunk_losses = [json.loads(line)["loss"] for line in (trunk / "metrics.jsonl").read_text().splitlines()]
    assert losses["baseline_trunk_0_seed_0"][-1] < trunk_losses[0] - 0.3
    # The first step of a routing method with the same seed sees the same batch through nearly the same weights; the
    # other order sees another batch.
    same = abs(losses["top_p_trunk_0_seed_0"][0] - losses["baseline_trunk_0_seed_0"][0])
    # Before the first update only rounding is between twins, behind the last what it has grown to.
    twin, baseline = losses["twin_trunk_0_seed_0"], losses["baseline_trunk_0_seed_0"]
    twins_weights, weights = (
        (folders[f"{name}_trunk_0_seed_0"] / "model/weights.safetensors").read_bytes() for name in ("twin", "baseline")
    )
    assert twins_weights != weights
    assert twin[0] == pytest.approx(baseline[0], abs=1e-5)
    assert same < abs(losses["other_order_trunk_0_seed_1000000"][0] - losses["baseline_trunk_0_seed_0"][0])


def test_a_second_run_skips_what_is_finished_and_says_the_same(first_run, forked):
    out, command, printed = first_run
    before = written(out)
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert again.count("finished before") == 8
    assert "step=" not in again
    assert "estimated time" not in again
    assert written(out) == before
    assert again[again.index("\nmethod ") :] == printed[printed.index("\nmethod ") :]


def test_a_damaged_branch_is_set_aside_and_trained_again(first_run, arguments, tmp_path, capsys):
    out = tmp_path / "runs"
    shutil.copytree(first_run[0], out)
    (result,) = out.glob("branches/top_p_*_seed_1_*/result.json")
    whole = result.read_text()
    result.write_text(whole.replace("1", "2", 1))
    run("compare", "twin", "other_order", "top_p", *arguments, "--out", str(out))
    printed = capsys.readouterr().out
    kept = out / "damaged" / result.parent.name
    assert f"kept in {kept} and trained again" in printed
    assert printed.count("finished before") == 8
    assert json.loads(result.read_text())["bits_per_byte"] == json.loads(whole)["bits_per_byte"]
    assert (kept / "result.json").read_text() == whole.replace("1", "2", 1)


def test_a_larger_comparison_shares_trunk_and_branches(first_run, arguments, capsys):
    out, _, printed = first_run
    run("compare", "top_p", "random_k", *arguments, "--out", str(out))
    more = capsys.readouterr().out
    assert more.count("finished before") == 5
    assert "trunk step=" not in more
    assert "random_k-seed1 valid" in more
    assert more.rsplit("report: ", 1)[1] != printed.rsplit("report: ", 1)[1]


def test_the_report_is_made_again_from_the_folders(first_run, capsys):
    _, _, printed = first_run
    report = Path(printed.rsplit("report: ", 1)[1].strip())
    content = report.read_text()
    report.unlink()
    run("report", str(report.parent))
    assert report.read_text() == content
    assert "cost ledger" in capsys.readouterr().out


def test_a_dry_run_prints_everything_and_trains_nothing(arguments, tmp_path, capsys):
    run("compare", "top_p", *arguments, "--out", str(tmp_path), "--dry-run")
    printed = capsys.readouterr().out
    shown = json.loads(printed[printed.index("\n{") :])
    assert shown["options"]["staging"]["tokens"] == 4096
    assert {"commit", "versions", "device", "data_hash"} <= shown["environment"].keys()
    assert "estimated time" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_two_trunks_run_two_trunks(arguments, tmp_path, capsys):
    run(
        "compare",
        "baseline",
        *arguments,
        "--seeds",
        "1",
        "--trunk-seeds",
        "2",
        "--tokens",
        "1024",
        "--out",
        str(tmp_path),
    )
    assert len(list((tmp_path / "trunks").iterdir())) == 2
    assert "trunk noise (initial weights, trunk data order)" in capsys.readouterr().out


def test_a_misspelt_method_is_refused_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        run("compare", "top_q")
    assert "no method 'top_q'; did you mean 'top_p'?" in str(stop.value)


def test_no_method_is_refused():
    with pytest.raises(SystemExit, match="name the methods"):
        run("compare")


def test_a_misspelt_option_is_refused_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        run("compare", "top_p", "--seedz", "3")
    assert stop.value.code != 0
    assert "--seeds" in capsys.readouterr().err


def test_a_bad_value_is_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        run("compare", "top_p", "--seeds", "0")
    assert "--seeds: Options.seeds: 0, must be at least 1" in capsys.readouterr().err


def run(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ablations", *arguments])
        cli.main()


def test_what_was_freed_comes_back_when_a_comparison_needs_it(first_run, arguments, tmp_path, capsys):
    first, _, _ = first_run
    out = tmp_path / "runs"
    shutil.copytree(first, out)
    (trunk,) = (out / "trunks").iterdir()
    metrics = (trunk / "metrics.jsonl").read_bytes()
    run("prune", str(out), "--yes")
    assert not (trunk / "activations").exists()
    assert not list(out.glob("branches/*/checkpoints"))
    kept = [line for line in capsys.readouterr().out.splitlines() if line.startswith("kept")]
    assert all(str(trunk / "checkpoints") in line for line in kept)
    shutil.rmtree(out / "trunks")
    # What is finished is shown without its trunk, and trains nothing.
    run("compare", "twin", "other_order", "top_p", *arguments, "--out", str(out))
    printed = capsys.readouterr().out
    assert "trunk step=" not in printed
    assert f"Missing: {trunk}." in printed
    run("compare", "null_experts", *arguments, "--out", str(out))
    printed = capsys.readouterr().out
    assert "trunk step=" in printed
    assert "Missing" not in printed
    assert (trunk / "metrics.jsonl").read_bytes() == metrics

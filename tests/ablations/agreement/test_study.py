"""The study through its function, on a text and models so small that its numbers mean nothing: what is tested is that
they are all there, and that nothing is trained twice."""

import csv
import dataclasses
import shutil

import pytest

from ablations.agreement.arms import find_arms
from ablations.agreement.options import FORMS, AgreementOptions
from ablations.agreement.report import agreement_study
from ablations.agreement.settings import SETTINGS, SMALL, find_settings, smaller
from ablations.agreement.shares import CLAIMS, claimed, run_claimed
from ablations.agreement.study import BRANCHES, WHOLE, prepare_study, tasks_of
from ablations.comparison.compare import SharedExecution, prepare_job
from ablations.comparison.registry import find_methods
from corpus.prepare import CorpusConfig
from lm.options import ModelOptions
from staged_training.execute import ExecutionConfig
from staged_training.loop import NonFiniteLossError

ARMS = ("static_2", "top_p", "sliding_window_hybrid", "mixed_heads_hybrid")
FORKED = "fork85_freeze50_decay"


@pytest.fixture(scope="module")
def options(text_folder, tiny_model, tmp_path_factory):
    return AgreementOptions(
        out=tmp_path_factory.mktemp("agreement"),
        arms=ARMS,
        settings=("smaller_model", FORKED),
        seeds=2,
        tokens=4096,
        batch_size=8,
        seq_len=64,
        resamples=20,
        jobs=1,
        budget_batches=1,
        model=ModelOptions(**{**tiny_model, "n_layers": 2}),
        corpus=CorpusConfig(data=(str(text_folder),), vocab_size=300, valid_share=0.1),
        execution=ExecutionConfig(log_every=1000),
    )


@pytest.fixture(scope="module")
def folder(options):
    found = agreement_study(options)
    assert found is not None
    return found


def table(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def results(out):
    return {path: path.stat().st_mtime_ns for path in out.glob("*/*/result.json")}


def test_every_run_has_its_row(options, folder):
    runs = table(folder / "runs.csv")
    assert {(row["setting"], row["arm"], row["seed"]) for row in runs if row["arm"] not in ("trunk", "caching")} == {
        (setting, arm, seed)
        for setting in ("truth", "smaller_model", FORKED)
        for arm in ("baseline", *ARMS)
        for seed in "01"
    }
    forked = [row for row in runs if row["setting"] == FORKED]
    assert sorted(row["seed"] for row in forked if row["arm"] == "trunk") == ["0", "1"]
    # Each seed on its own trunk, and two baselines of each: that of architectural arms starts with fresh blocks.
    branches = [row for row in forked if row["arm"] not in ("trunk", "caching")]
    assert all(row["seed"] == row["trunk_seed"] for row in branches)
    assert sorted(row["fresh"] for row in branches if row["arm"] == "baseline") == ["0", "0", "1", "1"]
    assert all(float(row["flops"]) > 0 and float(row["seconds"]) > 0 for row in runs)


def test_tables_figure_and_text(folder):
    rows = table(folder / "settings.csv")
    assert [(row["setting"], row["family"], row["arms"]) for row in rows] == [
        (setting, family, arms)
        for setting in ("smaller_model", FORKED)
        for family, arms in (("routing", "3"), ("architecture", "3"), ("all", "5"))
    ]
    assert all(0 < float(row["flops"]) < 1 for row in rows)
    assert (folder / "agreement.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "report.txt").read_text()
    assert "routing arms: 3, the baseline included" in text
    assert "full runs, 4,096 tokens, 2 seeds, best first:" in text


def test_a_second_run_trains_nothing(options, folder, capsys):
    before = results(options.out)
    assert agreement_study(options) == folder
    assert results(options.out) == before
    printed = capsys.readouterr().out
    assert f"{len(before)} of {len(before)} runs are finished." in printed
    assert "valid bpb=" not in printed
    assert "estimated time" not in printed


@pytest.mark.long
def test_what_is_missing_is_trained_side_by_side_with_the_same_bits(options, folder, capfd):
    before = results(options.out)
    runs = (folder / "runs.csv").read_text()
    bits = {(row["folder"]): row["bits_per_byte"] for row in table(folder / "runs.csv")}
    # A single full run is not worth a process.
    gone = [*sorted(options.out.glob("branches/*"))[:2], full_runs(options)[0].folder]
    for run in gone:
        shutil.rmtree(run)
    assert agreement_study(dataclasses.replace(options, jobs=2)) == folder
    printed = capfd.readouterr().out
    assert "branches: 2 processes" in printed
    assert "full runs and trunks: 2 processes" not in printed
    assert printed.count("valid bpb=") == 3
    after = results(options.out)
    assert {path for path, when in after.items() if before[path] != when} == {run / "result.json" for run in gone}
    assert {(row["folder"]): row["bits_per_byte"] for row in table(folder / "runs.csv")} == bits
    assert len((folder / "runs.csv").read_text().splitlines()) == len(runs.splitlines())


def full_runs(options):
    return [task for task in tasks_of(prepare_study(options), WHOLE) if task.job is None]


def test_an_arm_whose_loss_does_not_stay_finite_ends_no_study(options, folder, tmp_path, monkeypatch, capsys):
    tried = []

    def diverge(job, execution, branch):
        tried.append(branch.name)
        raise NonFiniteLossError(f"{branch.name}: loss is nan")

    monkeypatch.setattr("ablations.agreement.study.run_branch", diverge)
    study = prepare_study(options)
    tasks = [dataclasses.replace(task, folder=tmp_path / task.folder.name) for task in tasks_of(study, BRANCHES)[:2]]
    (tmp_path / CLAIMS).mkdir()
    run_claimed(study, tmp_path, tasks)
    assert tried == [task.branch.name for task in tasks if task.branch is not None]
    assert f"{tried[0]}: loss is nan" in capsys.readouterr().out


def test_what_another_process_has_claimed_is_left_to_it(options, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("ablations.agreement.study.run_branch", lambda *_: pytest.fail("trained what is claimed"))
    study = prepare_study(options)
    task = tasks_of(study, BRANCHES)[0]
    (tmp_path / CLAIMS).mkdir()
    with claimed(tmp_path / CLAIMS / task.folder.name) as mine:
        assert mine
        run_claimed(study, tmp_path, [dataclasses.replace(task, folder=tmp_path / task.folder.name)])


def test_only_trunks_keep_what_further_training_starts_from(options, folder):
    kept = {path.parent for path in options.out.glob("*/*/checkpoints")}
    assert kept == {task.folder for task in tasks_of(prepare_study(options), WHOLE) if task.job is not None}


def test_branches_are_those_of_compare(options, folder):
    staging = SETTINGS[FORKED].staging(options.staging)
    job = prepare_job(find_methods(["top_p"]), options.comparison(staging))
    execution = SharedExecution(job, job.plans[0])
    mine = {task.folder for task in tasks_of(prepare_study(options), BRANCHES)}
    assert {execution.folder_of(branch) for branch in job.plans[0].branches if branch.seed == 0} <= mine


def test_settings_that_agree_on_the_trunk_share_it(options):
    wider = dataclasses.replace(options, settings=tuple(setting.name for setting in SMALL))
    trunks = [task for task in tasks_of(prepare_study(wider), WHOLE) if task.job is not None]
    # Forks at 85 % and 70 %, and one at the small rate, of two seeds each.
    assert len(trunks) == 6
    single = dataclasses.replace(wider, trunk_seeds=1)
    assert len([task for task in tasks_of(prepare_study(single), WHOLE) if task.job is not None]) == 3


def test_a_dry_run_tells_the_cost_and_trains_nothing(options, tmp_path, capsys):
    assert agreement_study(dataclasses.replace(options, out=tmp_path, dry_run=True)) is None
    printed = capsys.readouterr().out
    assert "0 of 34 runs are finished." in printed
    assert "estimated time" in printed
    assert not (tmp_path / "trunks").exists()


def test_both_forms_have_ten_arms_and_their_settings():
    assert {name for setting in SMALL if (name := setting.name) not in SETTINGS} == set()
    for form in FORMS.values():
        arms = find_arms(form.arms, ModelOptions().config(300))
        assert len(arms) >= 10
        assert len({arm.kind(ModelOptions().config(300)) for arm in arms[1:]}) == 2
        assert form.seeds >= 3
    # 3 forks x 3 frozen shares x decay or merge x two rates, and the smaller model.
    assert len(FORMS["large"].settings) == 37


def test_the_smaller_model_takes_about_a_quarter(options):
    model = smaller(ModelOptions())
    assert (model.d_model, model.head_dim, model.d_expert, model.k) == (64, 16, 8, 12)
    with pytest.raises(ValueError, match="--d-expert 7: smaller_model halves it"):
        smaller(ModelOptions(d_expert=7))


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"--arms: no arm 'static_3'.*static_2"):
        find_arms(("static_3",), ModelOptions().config(300))
    with pytest.raises(ValueError, match="'static_8' is the baseline's own model"):
        find_arms(("static_8", "top_p"), ModelOptions(k=8).config(300))
    with pytest.raises(ValueError, match="'twin' is the baseline's own model"):
        find_arms(("twin", "top_p"), ModelOptions().config(300))
    # The head of its pattern is all that four layers take of it.
    with pytest.raises(ValueError, match="'shared_kv_hybrid' is the baseline's own model"):
        find_arms(("shared_kv_hybrid", "top_p"), ModelOptions().config(300))
    with pytest.raises(ValueError, match="at least two arms"):
        find_arms(("top_p",), ModelOptions().config(300))
    with pytest.raises(ValueError, match="--settings: no setting 'fork85'"):
        find_settings(("fork85",))
    with pytest.raises(ValueError, match="seeds"):
        AgreementOptions(seeds=1)
    with pytest.raises(ValueError, match="trunk_seeds: 4, must be at most the number of seeds, 3"):
        AgreementOptions(trunk_seeds=4)

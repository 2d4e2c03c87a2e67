"""The recall study through its function, on models and texts so small that only its mechanics mean anything."""

import csv
import dataclasses

import pytest

from ablations.recall.options import FORMS, RecallOptions
from ablations.recall.report import recall_study
from ablations.recall.results import RunRow, state_rows
from ablations.recall.study import run_claimed, tasks_of
from ablations.recall.training import train_run

PLANS = ("CF", "SL")
# As small as a study can be, of texts that the small form has.
TINY = dataclasses.replace(FORMS["small"], test_rows=2)


@pytest.fixture(scope="module", autouse=True)
def _tiny():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FORMS, "small", TINY)
        yield


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return RecallOptions(
        plans=PLANS,
        widths=(16,),
        rates=(1e-3, 1e-2),
        seeds=1,
        steps=1,
        batch_size=2,
        jobs=1,
        out=tmp_path_factory.mktemp("recall"),
    )


@pytest.fixture(scope="module")
def folder(options):
    found = recall_study(options)
    assert found is not None
    return found


def table(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_tables_and_figure(options, folder):
    runs = table(folder / "runs.csv")
    assert {(row["plan"], row["rate"], row["seed"]) for row in runs} == {
        (plan, rate, seed) for plan in PLANS for rate in ("0.001", "0.01") for seed in "0"
    }
    assert all(0 <= float(row["accuracy"]) <= 1 and row["steps"] == "1" for row in runs)
    segments = table(folder / "segments.csv")
    assert len(segments) == len(runs) * len(FORMS["small"].test)
    of_one = [float(row["accuracy"]) for row in segments[: len(FORMS["small"].test)]]
    assert float(runs[0]["accuracy"]) == pytest.approx(sum(of_one) / len(of_one))
    states = table(folder / "states.csv")
    assert [row["plan"] for row in states] == list(PLANS)
    assert (folder / "recall.png").read_bytes().startswith(b"\x89PNG")
    assert "Gated DeltaNet,G,17000.0,0.889" in (folder / "published.csv").read_text()


def test_state_bytes_are_those_of_the_cache(options, folder):
    for row in table(folder / "states.csv"):
        task = next(task for task in tasks_of(options) if task.run.plan == row["plan"])
        cache = train_cache(task.run.model, options.longest)
        assert int(row["state_bytes"]) == cache == 4 * int(row["state_elements"])


def train_cache(model, length):
    from lm.model import LanguageModel

    return LanguageModel(model).new_cache(1, length).nbytes()


def test_only_what_is_missing_is_trained_and_comes_back_alike(options, folder, capsys):
    before = (folder / "runs.csv").read_text()
    gone = tasks_of(options)[3]
    result = gone.result
    gone.file.unlink()
    assert recall_study(dataclasses.replace(options, show=True)) == folder
    assert len((folder / "runs.csv").read_text().splitlines()) == len(before.splitlines()) - 1
    capsys.readouterr()
    assert recall_study(options) == folder
    said = capsys.readouterr().out
    assert "4 runs, 3 of them finished" in said
    assert said.count("accuracy 0.") == 1
    assert dataclasses.replace(gone.result, seconds=0) == dataclasses.replace(result, seconds=0)
    assert len((folder / "runs.csv").read_text().splitlines()) == len(before.splitlines())


def test_what_is_asked_for_names_the_run(options):
    files = {task.file.name for task in tasks_of(options)}
    for change in ({"window": 4}, {"steps": 3}, {"heads": 1}, {"vocab_size": 128}, {"solved": 0.1}):
        assert files.isdisjoint(task.file.name for task in tasks_of(dataclasses.replace(options, **change)))
    more = tasks_of(dataclasses.replace(options, plans=("CF", "SL", "CG"), seeds=3))
    assert files < {task.file.name for task in more}


def test_a_run_that_another_process_has_is_left_to_it(options, folder, tmp_path, monkeypatch):
    from ablations.agreement.shares import claimed

    monkeypatch.setattr("ablations.recall.study.train_run", lambda run: pytest.fail("trained what is claimed"))
    task = dataclasses.replace(tasks_of(options)[0], file=tmp_path / "run.json")
    with claimed(tmp_path / task.file.name) as mine:
        assert mine
        run_claimed(tmp_path, [task])


def test_a_rate_that_diverges_is_recorded(options):
    run = dataclasses.replace(tasks_of(options)[0].run, rate=1e15, steps=20)
    result = train_run(run)
    assert result.diverged
    assert result.accuracy == 0
    assert result.steps < 20


def test_the_best_rate_is_that_of_the_best_mean():
    rows = [
        RunRow(
            plan="CF",
            width=16,
            rate=rate,
            seed=seed,
            state_bytes=4,
            state_elements=1,
            accuracy=accuracy,
            loss=0.0,
            steps=1,
            diverged=0,
            seconds=0.0,
        )
        for rate, accuracies in ((0.1, (0.0, 1.0)), (0.2, (0.6, 0.7)), (0.3, (0.1, 0.1)))
        for seed, accuracy in enumerate(accuracies)
    ]
    (state,) = state_rows(rows)
    assert (state.rate, state.lowest, state.highest, state.edge) == (0.2, 0.6, 0.7, 0)
    assert state_rows(rows[2:])[0].edge == 1

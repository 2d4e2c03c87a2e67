"""Every step of larger models: a known law is extrapolated, the public ladder's 1B from its smaller sizes, bad ladders
refused."""

import csv

import numpy as np
import pytest

from ablations.scaling.back_tests import back_tests, calibrate, covered
from ablations.scaling.figure_predictions import DrawnRow
from ablations.scaling.ladder_runs import read_ladder
from ablations.scaling.options import PredictOptions
from ablations.scaling.predict import Found, Predictor, back_test_rows, predict_command
from ablations.scaling.ratio_law import NAMES, Run, Setting, fit_ladder, loss_of, see
from foundation.tables import read_rows

TRUTH = {"E": 1.4, "log_A": 0.4, "a": 0.17, "log_B": -1.2, "b": 0.1, "c": 0.42, "F": 0.085, "log_C": 2.9}
SIZES = {"20M": 2e7, "60M": 6e7, "180M": 1.8e8}
OLMO = {"params_column": "n_params", "tokens_column": "total_tokens"}


def setting(size, params, multiple):
    return Setting(size=size, params=params, tokens=20 * multiple * params, warmup=params, floor=0.1)


def true_loss(of, tokens_P):
    """The law, above a warm-up that falls from 10 nats."""
    per_param_P = tokens_P / of.params
    return loss_of([TRUTH[name] for name in NAMES], see(of, tokens_P)) + 6 * np.exp(-4 * per_param_P)


def ladder(noise=0.0005, multiples=(1, 4)):
    generator = np.random.default_rng(0)
    runs = []
    for size, params in SIZES.items():
        idiosyncrasy = np.exp(noise * generator.standard_normal())
        for multiple in multiples:
            of = setting(size, params, multiple)
            tokens_P = of.tokens * np.arange(1, 61) / 60
            loss_P = true_loss(of, tokens_P) * idiosyncrasy * np.exp(noise * generator.standard_normal(60))
            runs.append(Run(name=f"{size}-{multiple}x", setting=of, tokens_P=tokens_P, loss_P=loss_P))
    return runs


def write(path, runs):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "params", "batch_tokens", "tokens", "loss"])
        for run in runs:
            batch = 1e5 * (run.setting.params / 1e8) ** (2 / 3)
            for tokens, loss in zip(run.tokens_P, run.loss_P):
                writer.writerow([run.name, run.setting.params, batch, tokens, loss])
    return path


def test_the_law_is_found_and_extrapolated():
    runs = ladder(noise=0.0)
    values_V = fit_ladder(runs)
    target = setting("1B", 1e9, 4)
    tokens_P = target.tokens * np.linspace(0.1, 1, 10)
    np.testing.assert_allclose(loss_of(list(values_V), see(target, tokens_P)), true_loss(target, tokens_P), rtol=2e-3)


def test_predictions_of_a_ladder_hold_the_truth(tmp_path, capsys):
    path = write(tmp_path / "ladder.csv", ladder())
    rows = predict_command(
        PredictOptions(ladder=path, targets=("1B=1e9",), multiples=(1, 4), rows=20, out=tmp_path / "out")
    )
    truth = np.array([true_loss(setting("1B", 1e9, row.multiple), np.array([float(row.tokens)]))[0] for row in rows])
    settled = np.array([row.tokens / row.params > 2.5 for row in rows])
    error = np.abs(np.array([row.loss for row in rows]) / truth - 1)
    assert error[settled].mean() < 0.005
    inside = [row.low_90 <= loss <= row.high_90 for row, loss in zip(rows, truth)]
    assert np.mean(inside) > 0.8
    assert "1B at 4x" in capsys.readouterr().out
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        *("law.csv", "predictions.csv", "back_tests.csv", "loss.png", "loss.csv")
    }
    drawn = read_rows(tmp_path / "out" / "loss.csv", DrawnRow)
    # The largest size from all below it, every row between its bounds' ends.
    assert len({(row.fitted, row.size) for row in drawn}) == 1
    assert all(row.low_90 < row.predicted < row.high_90 for row in drawn)
    assert np.mean([row.low_90 <= row.loss <= row.high_90 for row in drawn]) > 0.8


def test_intervals_widen_with_the_distance():
    runs = ladder()
    found = Predictor.fitted(runs)
    tokens = np.array([1.0])
    near, far = (setting("", params, 4) for params in (4e8, 4e10))
    assert found.spread(far) > found.spread(near)
    assert found.from_constant(far, tokens * far.tokens) > found.from_constant(near, tokens * near.tokens)


def test_back_tests_are_covered_as_often_as_they_say():
    tests = back_tests(ladder(noise=0.001))
    s = calibrate(tests)
    assert {test.fitted for test in tests} == {("20M", "60M")}
    assert np.mean(np.concatenate([covered(test, s) for test in tests])) > 0.8


def test_the_public_ladders_largest_size_from_the_others(public_data):
    """Every step of 1B after its warm-up from 190M, 370M and 760M; the law's form was chosen on this."""
    path = public_data("olmo_ladder/ladder_val_ce_to_1B.csv.gz")
    runs = read_ladder(PredictOptions(ladder=path, **OLMO), "c4_en")
    tests = back_tests(runs)
    found = Found(name="c4_en", predictor=Predictor.fitted(runs), tests=tests, s=calibrate(tests))
    rows = {(row.fitted, row.size): row for row in back_test_rows(found)}
    row = rows["190M 370M 760M", "1B"]
    assert row.runs == 6
    assert row.settled_mean < 0.15
    assert row.settled_largest < 0.7
    assert row.final_largest < 0.3
    assert all(row.covered > 0.85 for row in rows.values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda runs: runs[:4], "2 sizes; predictions need a ladder of at least 3"),
        (lambda runs: runs[:2], "1 size; predictions need a ladder of at least 3"),
    ],
)
def test_short_ladders_are_refused(tmp_path, change, said):
    path = write(tmp_path / "ladder.csv", change(ladder()))
    with pytest.raises(ValueError, match=said):
        predict_command(PredictOptions(ladder=path))


def test_other_bad_ladders_are_refused(tmp_path):
    path = write(tmp_path / "ladder.csv", ladder())
    with pytest.raises(ValueError, match=r"--multiples 3: the ladder has no run .* it has 1, 4"):
        predict_command(PredictOptions(ladder=path, targets=("1B=1e9",), multiples=(3,)))
    with pytest.raises(ValueError, match="no column 'c4'"):
        predict_command(PredictOptions(ladder=path, loss=("c4",)))
    text = path.read_text().splitlines()
    text[5] = ",".join([*text[5].split(",")[:-1], "nan"])
    path.write_text("\n".join(text))
    with pytest.raises(ValueError, match="line 6, column loss: 'nan' is no positive finite number"):
        predict_command(PredictOptions(ladder=path))


@pytest.mark.parametrize("target", ["3B", "3B=x", "=3e9", "3B=3e9:1:2", "3B=-1"])
def test_bad_targets_are_refused(target):
    with pytest.raises(ValueError, match="must be NAME=PARAMS"):
        PredictOptions(ladder=__file__, targets=(target,))

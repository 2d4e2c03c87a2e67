"""The best learning rate from a sweep, on made-up losses whose optimum is known; and the study through its function, on
models so small that its numbers mean nothing."""

import csv
import dataclasses
import math

import numpy as np
import pytest

from ablations.scaling.optimum import draw_optima, fit_parabola, interval
from ablations.scaling.transfer import (
    FIGURE_FILE,
    OPTIMA_FILE,
    REPORT_FILE,
    TRANSFER_FILE,
    OptimumRow,
    Study,
    TransferRow,
    drifts,
    summary_lines,
    transfer_command,
)
from ablations.scaling.transfer_options import TransferOptions
from corpus.prepare import CorpusConfig
from lm.options import ModelOptions
from staged_training.execute import ExecutionConfig

RATES = tuple(1e-3 * 2**step for step in range(7))


def sweep_of(optimum, noise=0.0, seed=0):
    noisy = noise * np.random.default_rng(seed).standard_normal(len(RATES))
    return [2.0 + 0.04 * math.log2(rate / optimum) ** 2 + each for rate, each in zip(RATES, noisy)]


def test_the_optimum_of_a_parabola_is_found():
    found = fit_parabola(RATES, sweep_of(9e-3))
    assert found.optimum == pytest.approx(9e-3)
    assert (found.lowest, found.freedom, len(found.rate_P)) == (pytest.approx(2.0), 2, 5)
    assert found(18e-3) == pytest.approx(2.04)


def test_a_rate_that_diverged_or_lies_far_off_is_left_out():
    losses = sweep_of(9e-3)
    losses[5:] = [5.0, math.inf]
    found = fit_parabola(RATES, losses)
    # The lowest is the fourth; its second neighbour above is far off, and its first would be kept whatever it is.
    assert found.optimum == pytest.approx(9e-3)
    assert len(found.rate_P) == 4
    with pytest.raises(ValueError, match=r"2 learning rates with a finite loss around 0\.002; a parabola needs"):
        fit_parabola(RATES[:2], losses[:2])


def test_a_sweep_without_a_minimum_has_none():
    found = fit_parabola(RATES, [3 - 0.1 * step for step in range(7)])
    assert math.isnan(found.optimum)
    assert interval(np.array([1.0, math.nan, 2.0])) == (0.0, math.inf)


def test_intervals_hold_the_optimum_as_often_as_they_say():
    generator, inside = np.random.default_rng(1), 0
    for seed in range(60):
        sweeps = [fit_parabola(RATES, sweep_of(9e-3, 0.004, 100 * seed + each)) for each in range(6)]
        freedom = sum(each.freedom for each in sweeps)
        variance = sum(each.squares for each in sweeps) / freedom
        low, high = interval(draw_optima(sweeps[0], variance, freedom, 200, generator))
        inside += low <= 9e-3 <= high
    assert 52 <= inside <= 60


def row(name, width, depth, optimum, times):
    return OptimumRow(
        parametrization=name,
        width=width,
        depth=depth,
        experts=8,
        rates=5,
        optimum=optimum,
        low_95=0.9 * optimum,
        high_95=1.1 * optimum,
        times_base=times,
        low_times=0.9 * times,
        high_times=1.1 * times,
        lowest=2.0,
        lost=0.01,
    )


def test_the_summary_says_what_optima_go_with():
    rows = [
        row(name, width, depth, 1e-2 * times, times)
        for name, power in (("standard", -0.5), ("complete_p", 0.0))
        for width in (32, 128)
        for depth in (2, 8)
        for times in [(width / 32) ** power]
    ]
    assert drifts(rows[:4]) == pytest.approx({"width": -0.5, "depth": 0.0})
    without, with_it = summary_lines(rows, TransferOptions())
    assert without.startswith("standard: 2 of 4 optima within a factor of 1.5 of the base's, 2 beyond it")
    assert "farthest 0.50x; optimum as width^-0.50, depth^" in without
    assert with_it.startswith("complete_p: 4 of 4 optima within a factor of 1.5 of the base's, 0 beyond it")


@pytest.fixture(scope="module")
def options(text_folder, tiny_model, tmp_path_factory):
    return TransferOptions(
        out=tmp_path_factory.mktemp("transfer"),
        widths=(16, 32),
        depths=(1,),
        expert_counts=(4,),
        learning_rates=(2e-3, 8e-3, 32e-3),
        most_rates=3,
        draws=100,
        tokens=1024,
        batch_size=8,
        seq_len=32,
        model=ModelOptions(**{**tiny_model, "n_layers": 1}),
        corpus=CorpusConfig(data=(str(text_folder),), vocab_size=300, valid_share=0.1),
        execution=ExecutionConfig(log_every=1000),
    )


def table(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.long
def test_a_study_is_trained_once_and_says_where_optima_lie(options, capsys):
    rows = transfer_command(options)
    # The base's sweep is the same under both.
    assert "4 sweeps, 9 runs to begin with, 9 to train now" in capsys.readouterr().out
    study = Study(options)
    runs = table(study.folder / TRANSFER_FILE)
    assert list(runs[0]) == [field.name for field in dataclasses.fields(TransferRow)]
    assert len(runs) == 12
    assert len(rows) == len(table(study.folder / OPTIMA_FILE)) == 4
    assert (study.folder / FIGURE_FILE).stat().st_size > 10_000
    assert "complete_p: " in (study.folder / REPORT_FILE).read_text()

    def of(name, width, rate=2e-3, experts="4"):
        return next(
            run["loss"]
            for run in runs
            if (run["parametrization"], run["width"], float(run["learning_rate"]), run["experts"])
            == (name, str(width), rate, experts)
        )

    assert of("standard", 16) == of("complete_p", 16)
    assert of("standard", 32) != of("complete_p", 32)
    before = {path: path.stat().st_mtime_ns for path in options.out.glob("trunks/*/result.json")}
    assert transfer_command(dataclasses.replace(options, dry_run=True)) == []
    assert "9 runs to begin with, 0 to train now" in capsys.readouterr().out
    transfer_command(options)
    assert {path: path.stat().st_mtime_ns for path in options.out.glob("trunks/*/result.json")} == before


def test_a_sweep_goes_on_where_its_lowest_loss_is_at_an_end(options):
    study = Study(dataclasses.replace(options, most_rates=4))
    sweep = study.sweeps[0]

    def seen(losses):
        study.rows = {
            (sweep.key, rate, 0): TransferRow(
                parametrization="standard",
                width=16,
                depth=1,
                experts=4,
                seed=0,
                learning_rate=rate,
                loss=loss,
                seconds=1.0,
                flops=1.0,
            )
            for rate, loss in zip((1e-3, 4e-3, 16e-3, 64e-3), losses)
        }
        return study.next_rate(sweep)

    assert seen([3.0, 2.0, 2.5]) is None
    assert seen([3.0, 2.5, 2.0]) == pytest.approx(64e-3)
    assert seen([1.0, 2.5, math.inf]) == pytest.approx(0.25e-3)
    # Enough were tried.
    assert seen([3.0, 2.5, 2.0, 1.0]) is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"learning_rates": (1e-3, 2e-3)}, "must be at least 3, each at least 1.2 times"),
        ({"learning_rates": (1e-3, 1.1e-3, 2e-3)}, "each at least 1.2 times"),
        ({"widths": ()}, "TransferOptions.widths: empty"),
        ({"tokens": 0}, "TransferOptions.tokens: 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        TransferOptions(**changes)

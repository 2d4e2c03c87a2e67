"""`python -m ablations scaling predict`: every step of larger models, with intervals and the back-tests behind them."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ablations.scaling.back_tests import LEVEL, QUANTILE, BackTest, Predictor, back_tests, calibrate, covered, deviation
from ablations.scaling.figure_predictions import DrawnRow, draw_predictions, drawn_rows
from ablations.scaling.ladder_runs import read_ladder, targets_of
from ablations.scaling.options import PredictOptions
from ablations.scaling.ratio_law import NAMES, Setting
from foundation.command import refuse_unwritable
from foundation.tables import write_rows, write_table

LAW_FILE, PREDICTIONS_FILE, TESTS_FILE = "law.csv", "predictions.csv", "back_tests.csv"
# Of each column of losses: the last back-test over the truth, and its rows.
FIGURE_FILE, DRAWN_FILE = "{}.png", "{}.csv"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictionRow:
    """The loss of one target at one place of its training.

    Attributes:
        set: column of losses of the ladder.
        multiple: tokens of the whole training / (20 params).
        total_tokens: of the whole training; the learning rate has decayed to its floor there.
        tokens: seen so far; tokens / tokens per batch is the step.
        loss: predicted; low_90 and high_90 bound its 90 % interval.
    """

    set: str
    size: str
    params: int
    multiple: float
    total_tokens: int
    tokens: int
    loss: float
    low_90: float
    high_90: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackTestRow:
    """A size of the ladder predicted from smaller ones, errors in per cent of the loss.

    Attributes:
        fitted: sizes.
        settled_mean, settled_largest: of the absolute error over rows past 2.5 tokens per parameter.
        warmup_mean: the same before; nan where the runs have no such row.
        final_mean: of the absolute error of the runs' last rows, and final_largest.
        covered: share of all rows inside their 90 % interval, whose width comes from these tests.
    """

    set: str
    fitted: str
    size: str
    runs: int
    settled_mean: float
    settled_largest: float
    warmup_mean: float
    final_mean: float
    final_largest: float
    covered: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """Everything of one column of losses.

    Attributes:
        s: of each band, see `back_tests`.
    """

    name: str
    predictor: Predictor
    tests: list[BackTest]
    s: list[float]


def predict_command(options: PredictOptions) -> list[PredictionRow]:
    """Fits, tests, predicts, prints and writes.

    Raises:
        ValueError: see `read_ladder` and `targets_of`.
    """
    refuse_unwritable("--out", options.out, folder=True)
    rows, test_rows, every = [], [], []
    for name in options.loss:
        runs = read_ladder(options, name)
        targets = targets_of(options, runs)
        tests = back_tests(runs)
        found = Found(name=name, predictor=Predictor.fitted(runs), tests=tests, s=calibrate(tests))
        own_tests, own_rows = back_test_rows(found), predictions(found, targets, options.rows)
        print("\n".join([law_line(found), *back_test_lines(own_tests), *final_lines(own_rows)]), flush=True)
        rows, test_rows, every = [*rows, *own_rows], [*test_rows, *own_tests], [*every, found]
        if options.out is not None:
            write_rows(options.out / DRAWN_FILE.format(name), DrawnRow, drawn_rows(found.tests, found.s))
            draw_predictions(found.tests, found.s, own_rows, name, options.out / FIGURE_FILE.format(name))
    if options.out is not None:
        write_table(options.out / LAW_FILE, ("set", "parameter", "value"), law_cells(every))
        write_rows(options.out / TESTS_FILE, BackTestRow, test_rows)
        write_rows(options.out / PREDICTIONS_FILE, PredictionRow, rows)
        print(f"\npredictions: {options.out}")
    return rows


def predictions(found: Found, targets: Sequence[Setting], n_rows: int) -> list[PredictionRow]:
    """Rows of every target, evenly over its training; those without a prediction are left out."""
    rows = []
    for target in targets:
        tokens_P = target.tokens * np.arange(1, n_rows + 1) / n_rows
        loss_P = found.predictor.predict(target, tokens_P)
        deviation_P = deviation(
            found.s,
            tokens_P / target.params,
            found.predictor.spread(target),
            found.predictor.from_constant(target, tokens_P),
        )
        for tokens, loss, sd in zip(tokens_P, loss_P, deviation_P):
            if np.isfinite(loss):
                rows.append(
                    PredictionRow(
                        set=found.name,
                        size=target.size,
                        params=round(target.params),
                        multiple=target.multiple,
                        total_tokens=round(target.tokens),
                        tokens=round(float(tokens)),
                        loss=round(float(loss), 5),
                        low_90=round(float(loss * np.exp(-QUANTILE * sd)), 5),
                        high_90=round(float(loss * np.exp(QUANTILE * sd)), 5),
                    )
                )
    return rows


def back_test_rows(found: Found) -> list[BackTestRow]:
    """One row per back-test."""
    groups: dict[tuple, list[BackTest]] = {}
    for test in found.tests:
        groups.setdefault((test.fitted, test.run.setting.size), []).append(test)
    rows = []
    for (fitted, size), tests in groups.items():
        error = 100 * np.abs(np.concatenate([test.error_P for test in tests]))
        settled = np.concatenate([test.per_param_P for test in tests]) >= 2.5
        final = [100 * abs(float(test.error_P[-1])) for test in tests]
        rows.append(
            BackTestRow(
                set=found.name,
                fitted=" ".join(fitted),
                size=size,
                runs=len(tests),
                settled_mean=_rounded(error[settled].mean()),
                settled_largest=_rounded(error[settled].max()),
                warmup_mean=_rounded(error[~settled].mean()) if (~settled).any() else float("nan"),
                final_mean=_rounded(sum(final) / len(final)),
                final_largest=_rounded(max(final)),
                covered=_rounded(np.concatenate([covered(test, found.s) for test in tests]).mean()),
            )
        )
    return rows


def _rounded(number: float) -> float:
    return round(float(number), 4)


def law_line(found: Found) -> str:
    """The fitted numbers."""
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in zip(NAMES, found.predictor.values_V))
    return f"{found.name}: {numbers}"


def back_test_lines(rows: Sequence[BackTestRow]) -> list[str]:
    """The back-tests as a table."""
    lines = ["back-tests, |error| in % of the loss: past 2.5 tokens per parameter (largest), before, final; covered"]
    lines += [
        f"  {row.fitted} -> {row.size}: {row.settled_mean:.2f} ({row.settled_largest:.2f}), {row.warmup_mean:.2f},"
        f" {row.final_mean:.2f}; {row.covered:.0%} of the rows in their {LEVEL:.0%} intervals"
        for row in rows
    ]
    return lines


def final_lines(rows: Sequence[PredictionRow]) -> list[str]:
    """The last row of every predicted run."""
    last = {(row.size, row.multiple): row for row in rows}
    return [
        f"  {size} at {multiple:g}x: {row.loss:.4f} ({row.low_90:.4f} to {row.high_90:.4f})"
        for (size, multiple), row in last.items()
    ]


def law_cells(every: Sequence[Found]) -> list[tuple[str, str, str]]:
    """Rows of `law.csv`: the parameters, and s of each band of tokens per parameter."""
    cells = []
    for found in every:
        cells += [(found.name, name, f"{value:.6g}") for name, value in zip(NAMES, found.predictor.values_V)]
        cells += [(found.name, f"s_{band}", f"{value:.6g}") for band, value in enumerate(found.s)]
    return cells

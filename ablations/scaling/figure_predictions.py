"""Predicted loss curves: bands over the truth of the back-test, and the targets beside the ladder."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ablations.report.drawing import BAND
from ablations.report.style import INK, SERIES, WIDTH
from ablations.scaling.back_tests import QUANTILE, BackTest, deviation
from ablations.scaling.figure import PAPER, save

# Of the runs' highest losses, which are those of warm-up and would flatten the rest.
SHOWN = 0.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawnRow:
    """A row of a back-tested run: what came out, and what was predicted from smaller sizes, with its 90 % interval."""

    fitted: str
    size: str
    multiple: float
    tokens: int
    loss: float
    predicted: float
    low_90: float
    high_90: float


def drawn_tests(tests: Sequence[BackTest]) -> list[BackTest]:
    """The runs of the largest size, from the most sizes below it."""
    best = max(tests, key=lambda test: (test.run.setting.params, len(test.fitted)))
    return [test for test in tests if (test.fitted, test.run.setting.size) == (best.fitted, best.run.setting.size)]


def drawn_rows(tests: Sequence[BackTest], s: Sequence[float]) -> list[DrawnRow]:
    """What the upper panels show."""
    rows = []
    for test in drawn_tests(tests):
        loss_P = test.run.loss_P[-len(test.error_P) :]
        half_P = QUANTILE * deviation(s, test.per_param_P, test.spread, test.from_constant_P)
        for tokens, loss, error, half in zip(test.per_param_P * test.run.setting.params, loss_P, test.error_P, half_P):
            predicted = loss * np.exp(error)
            rows.append(
                DrawnRow(
                    fitted=" ".join(test.fitted),
                    size=test.run.setting.size,
                    multiple=test.run.setting.multiple,
                    tokens=round(float(tokens)),
                    loss=round(float(loss), 5),
                    predicted=round(float(predicted), 5),
                    low_90=round(float(predicted * np.exp(-half)), 5),
                    high_90=round(float(predicted * np.exp(half)), 5),
                )
            )
    return rows


def draw_predictions(tests: Sequence[BackTest], s: Sequence[float], rows: Sequence[Any], name: str, path: Path) -> None:
    """The last back-test from the most sizes above its errors, and the targets below.

    Args:
        rows: of the targets (`PredictionRow`).
        name: of the column of losses.
    """
    shown = drawn_tests(tests)
    with matplotlib.rc_context(PAPER):
        figure = Figure(figsize=(WIDTH * 1.3, 9.5 if rows else 6.5), layout="constrained")
        panels = figure.subplots(3 if rows else 2, 1)
        for index, test in enumerate(shown):
            colour = SERIES[index % len(SERIES)]
            tokens_P = test.per_param_P * test.run.setting.params
            loss_P = test.run.loss_P[-len(tokens_P) :]
            half_P = QUANTILE * deviation(s, test.per_param_P, test.spread, test.from_constant_P)
            predicted_P = loss_P * np.exp(test.error_P)
            label = f"{test.run.setting.multiple:g}x"
            panels[0].fill_between(
                tokens_P, predicted_P * np.exp(-half_P), predicted_P * np.exp(half_P), color=colour, alpha=2 * BAND
            )
            panels[0].plot(tokens_P, loss_P, color=colour, linewidth=1.0, label=label)
            panels[1].plot(tokens_P, 100 * test.error_P, color=colour, linewidth=1.0)
            panels[1].plot(tokens_P, 100 * half_P, color=colour, linewidth=0.6, linestyle=":")
            panels[1].plot(tokens_P, -100 * half_P, color=colour, linewidth=0.6, linestyle=":")
        truth = np.concatenate([test.run.loss_P for test in shown])
        panels[0].set_ylim(truth.min() - 0.05, np.quantile(truth, SHOWN))
        panels[0].set_ylabel(f"{name}\nline: {shown[0].run.setting.size}; band: predicted")
        panels[0].legend(frameon=False, fontsize=8)
        panels[1].axhline(0, color=INK, linewidth=1)
        panels[1].set_ylim(-2, 2)
        panels[1].set_ylabel("prediction / loss - 1, %\n(dots: 90 % interval)")
        if rows:
            _targets(panels[2], rows, name)
        for axes in panels:
            axes.set_xscale("log")
        panels[-1].set_xlabel("tokens")
        save(figure, path)


def _targets(axes: Any, rows: Sequence[Any], name: str) -> None:
    runs: dict[tuple[str, float], list[Any]] = {}
    for row in rows:
        runs.setdefault((row.size, row.multiple), []).append(row)
    colours = dict(zip(dict.fromkeys(size for size, _ in runs), SERIES))
    for (size, multiple), own in runs.items():
        tokens = [row.tokens for row in own]
        axes.fill_between(
            tokens, [row.low_90 for row in own], [row.high_90 for row in own], color=colours[size], alpha=BAND
        )
        label = size if multiple == max(m for s, m in runs if s == size) else None
        axes.plot(tokens, [row.loss for row in own], color=colours[size], linewidth=1.0, label=label)
    axes.set_ylim(min(row.low_90 for row in rows) - 0.05, np.quantile([row.loss for row in rows], SHOWN))
    axes.set_ylabel(f"{name}, predicted")
    axes.legend(frameon=False, fontsize=8)

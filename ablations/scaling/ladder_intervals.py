"""What a law, fitted to a ladder's finished runs, says of larger ones, and how far that may be off.

A bootstrap holds how runs scatter about the law, not that the law is wrong beyond them; our own first ladder came out
of such intervals in two runs of three. So the ladder is asked itself: each of its larger runs is predicted from those
of fewer FLOPs alone, and what it is missed by makes the intervals. The error in log loss is taken as normal with
variance s^2 (1 + h): h is the leverage of the target's log FLOPs in a line through those of the runs fitted, which
grows with the distance, and s^2 the mean of error^2 / (1 + h) over these back-tests. Where the bootstrap is wider it
counts.

Legend: P runs, R draws, V parameters.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import special

from ablations.scaling.forms import Fit, Law, derived, predict
from ablations.scaling.intervals import bootstrap
from ablations.scaling.points import Points, check_enough
from ablations.scaling.variable_projection import fit_by_projection

# Runs are few and none is an outlier by its kind: squares of log residuals.
DELTA = 1.0
LEVEL = 0.9
# Back-tests of fewer runs than this say too little of how far the next may be off.
LEAST_TESTS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictedRow:
    """What the law says of a held-out run before it is trained.

    Attributes:
        fitted: runs that the law was fitted to.
        back_tests: larger runs of these that were predicted from smaller ones, which make the interval; 0 where they
            are too few and a bootstrap alone does.
    """

    run: str
    law: str
    fitted: int
    predicted: float
    low_90: float
    high_90: float
    back_tests: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LadderTest:
    """A run of the ladder, predicted from those of fewer FLOPs.

    Attributes:
        error: log of prediction over truth.
        leverage: of its log FLOPs in a line through theirs.
    """

    run: str
    fitted: int
    error: float
    leverage: float


def points_of(rows: Sequence[Any], law: Law) -> Points:
    """Finished runs as points of a law.

    Args:
        rows: with the law's columns and `loss` (`PointRow`).
    """
    return Points(
        variables=variables_of(rows, law),
        loss_P=np.array([row.loss for row in rows]),
        weight_P=np.ones(len(rows)),
    )


def variables_of(rows: Sequence[Any], law: Law) -> dict[str, np.ndarray]:
    """The variables of a law for runs, finished or not."""

    def column(name: str) -> np.ndarray:
        return np.array([float(getattr(row, name)) for row in rows])

    return {name: derived(name, column) for name in law.variables}


def ladder_tests(rows: Sequence[Any], law: Law, fit: Fit) -> list[LadderTest]:
    """Each run that has enough runs of fewer FLOPs below it, predicted from them, the smallest first.

    Args:
        fit: to all of them, whose exponents the others start from.
    """
    rows = sorted(rows, key=lambda row: row.flops)
    tests = []
    # One run more than parameters, and one to tell scatter from.
    for index in range(len(law.parameters) + 2, len(rows)):
        below = points_of(rows[:index], law)
        try:
            check_enough(below, law, "the runs below")
        except ValueError:
            continue
        predicted = fit_by_projection(below, law, DELTA, start=fit).predict(variables_of(rows[index : index + 1], law))
        tests.append(
            LadderTest(
                run=rows[index].run,
                fitted=index,
                error=float(np.log(predicted[0] / rows[index].loss)),
                leverage=leverage([row.flops for row in rows[:index]], rows[index].flops),
            )
        )
    return tests


def leverage(flops: Sequence[float], target: float) -> float:
    """Of a target in a line through the logarithms of runs' FLOPs."""
    logs = np.log(flops)
    return float(1 / len(logs) + (math.log(target) - logs.mean()) ** 2 / ((logs - logs.mean()) ** 2).sum())


def predictions(
    rows: Sequence[Any], held: Sequence[Any], law: Law, resamples: int, draws_RV: np.ndarray | None = None
) -> list[PredictedRow]:
    """What the law, fitted to finished runs, says of others, with intervals from back-tests.

    Args:
        rows: finished runs (`PointRow`).
        held: runs of which FLOPs and sizes are known (`Rung`, `PointRow`).
        draws_RV: of the bootstrap, where it has been made.

    Raises:
        ValueError: for too few runs, see `check_enough`.
    """
    points = points_of(rows, law)
    check_enough(points, law, "the finished runs")
    fit = fit_by_projection(points, law, DELTA)
    targets = variables_of(held, law)
    if draws_RV is None:
        draws_RV = bootstrap(points, fit, resamples=resamples, delta=DELTA)
    drawn_RP = np.log(_drawn(points, fit, targets, draws_RV))
    tests = ladder_tests(rows, law, fit)
    spread = 0.0
    if len(tests) >= LEAST_TESTS:
        scale = math.sqrt(sum(test.error**2 / (1 + test.leverage) for test in tests) / len(tests))
        spread = scale * float(special.stdtrit(len(tests), (1 + LEVEL) / 2))
    found = []
    for index, (run, value) in enumerate(zip(held, np.log(fit.predict(targets)))):
        low, high = np.quantile(drawn_RP[:, index], ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
        half = spread * math.sqrt(1 + leverage([row.flops for row in rows], run.flops))
        found.append(
            PredictedRow(
                run=run.run,
                law=law.name,
                fitted=len(rows),
                back_tests=len(tests) if spread else 0,
                predicted=float(np.exp(value)),
                low_90=float(np.exp(min(low, value - half))),
                high_90=float(np.exp(max(high, value + half))),
            )
        )
    return found


def _drawn(points: Points, fit: Fit, targets: dict[str, np.ndarray], draws_RV: np.ndarray) -> np.ndarray:
    """A bootstrap's losses of targets, with the scatter of single runs around the law, [R, P]."""
    residual_P = np.log(points.loss_P / fit.predict(points.variables))
    scatter = float(np.sqrt((residual_P**2).sum() / (len(points) - len(fit.law.parameters))))
    drawn_RP = np.stack([predict(fit.law, values_V, targets) for values_V in draws_RV])
    return drawn_RP * np.exp(scatter * np.random.default_rng(0).standard_normal(drawn_RP.shape))

"""How wide intervals must be: larger sizes of the ladder predicted from smaller ones.

The error of a prediction in log loss is taken as normal with variance

    s^2 (1 + h) + (d log prediction / d E * CONSTANT_SHARE * lowest loss)^2.

h is the leverage of the target's log size in a line through those of the ladder: what idiosyncrasies of single sizes,
each of standard deviation s, add up to. The second part is what no ladder so short can say, how far the loss can fall
at all. s is found from the back-tests, by tokens per parameter; a small s may be luck, so `CHOSEN` is added for a form
that was chosen on such ladders.

Legend: P places in training.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
from scipy import special

from ablations.scaling.every_step import predict_run
from ablations.scaling.ratio_law import Run, Setting, fit_ladder

LEVEL = 0.9
CONSTANT_SHARE = 0.07
CHOSEN = 8e-4
# Tokens per parameter: through warm-up, its end and its echo, to what stays.
BANDS = (0.0, 0.6, 1.0, 1.5, 2.5, 4.0, math.inf)
QUANTILE = float(special.ndtri((1 + LEVEL) / 2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predictor:
    """A ladder's law, and the same with E held a step above and below.

    Attributes:
        step: of E.
    """

    runs: list[Run]
    values_V: np.ndarray
    above_V: np.ndarray
    below_V: np.ndarray

    @classmethod
    def fitted(cls, runs: list[Run]) -> "Predictor":
        """Three fits."""
        values_V = fit_ladder(runs)
        lowest = min(float(run.loss_P.min()) for run in runs)
        step = CONSTANT_SHARE * lowest
        return cls(
            runs=runs,
            values_V=values_V,
            above_V=fit_ladder(runs, constant=min(float(values_V[0]) + step, 0.94 * lowest)),
            below_V=fit_ladder(runs, constant=max(float(values_V[0]) - step, 1e-6)),
        )

    def predict(self, target: Setting, tokens_P: np.ndarray) -> np.ndarray:
        """The loss, [P]; NaN where `predict_run` has none."""
        return predict_run(self.values_V, self.runs, target, tokens_P)

    def from_constant(self, target: Setting, tokens_P: np.ndarray) -> np.ndarray:
        """Standard deviation of the log prediction that E makes, [P]."""
        above_P = predict_run(self.above_V, self.runs, target, tokens_P)
        below_P = predict_run(self.below_V, self.runs, target, tokens_P)
        return np.abs(np.log(above_P / below_P)) / 2

    def spread(self, target: Setting) -> float:
        """1 + leverage of the target's size."""
        size = np.log(sorted({run.setting.params for run in self.runs}))
        return 1 + 1 / len(size) + (math.log(target.params) - size.mean()) ** 2 / ((size - size.mean()) ** 2).sum()


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackTest:
    """One run of a larger size, predicted from smaller sizes.

    Attributes:
        fitted: the sizes that were.
        error_P: log of prediction over truth, at the run's rows that have a prediction.
        per_param_P: their tokens per parameter.
        from_constant_P: see `Predictor.from_constant`.
        spread: see `Predictor.spread`.
    """

    fitted: tuple[str, ...]
    run: Run
    error_P: np.ndarray
    per_param_P: np.ndarray
    from_constant_P: np.ndarray
    spread: float


def back_tests(runs: Sequence[Run]) -> list[BackTest]:
    """Every size above the second, from all sizes below it, from the two below, and from the two smallest."""
    names = {run.setting.params: run.setting.size for run in runs}
    sizes = sorted(names)
    tests, predictors = [], {}
    for index in range(2, len(sizes)):
        for below in dict.fromkeys((tuple(sizes[:index]), tuple(sizes[index - 2 : index]), tuple(sizes[:2]))):
            if below not in predictors:
                predictors[below] = Predictor.fitted([run for run in runs if run.setting.params in below])
            for run in runs:
                if run.setting.params == sizes[index]:
                    tests.append(_test(predictors[below], run, tuple(names[size] for size in below)))
    return tests


def _test(predictor: Predictor, run: Run, fitted: tuple[str, ...]) -> BackTest:
    error_P = np.log(predictor.predict(run.setting, run.tokens_P) / run.loss_P)
    known_P = np.isfinite(error_P)
    tokens_P = run.tokens_P[known_P]
    return BackTest(
        fitted=fitted,
        run=run,
        error_P=error_P[known_P],
        per_param_P=tokens_P / run.setting.params,
        from_constant_P=predictor.from_constant(run.setting, tokens_P),
        spread=predictor.spread(run.setting),
    )


def calibrate(tests: Sequence[BackTest]) -> list[float]:
    """s of each band: every back-test (fitted sizes, predicted size) counts the same."""
    found = []
    for low, high in itertools.pairwise(BANDS):
        squares: dict[tuple, list[np.ndarray]] = {}
        for test in tests:
            in_band_P = (test.per_param_P >= low) & (test.per_param_P < high)
            key = (test.fitted, test.run.setting.params)
            squares.setdefault(key, []).append(test.error_P[in_band_P] ** 2 / test.spread)
        means = [float(np.concatenate(parts).mean()) for parts in squares.values() if sum(map(len, parts))]
        # A band without a row is as uncertain as the band before it.
        found.append(math.sqrt(sum(means) / len(means) + CHOSEN**2) if means else (found[-1] if found else math.nan))
    return found


def deviation(s: Sequence[float], per_param_P: np.ndarray, spread: float, from_constant_P: np.ndarray) -> np.ndarray:
    """Standard deviation of the log prediction, [P]."""
    band_P = np.searchsorted(BANDS, per_param_P, side="right") - 1
    return np.sqrt(np.array(s)[band_P] ** 2 * spread + from_constant_P**2)


def covered(test: BackTest, s: Sequence[float]) -> np.ndarray:
    """Which rows of a back-test lie in their intervals, bool [P]."""
    return np.abs(test.error_P) <= QUANTILE * deviation(s, test.per_param_P, test.spread, test.from_constant_P)

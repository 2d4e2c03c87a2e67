"""Intervals of a fitted law's parameters: percentiles of a bootstrap over points, and profile likelihoods.

A profile holds one parameter and fits the others; its interval is where the objective rises by less than the noise
explains. For Huber's function that is the robust likelihood ratio (Heritier and Ronchetti 1994): twice the rise,
divided by mean psi^2 / mean psi', against a squared quantile of Student's t. With squares alone it is the ordinary one.

Legend: P points, R resamples, V parameters of the law.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import optimize, special

from ablations.scaling.forms import Fit
from ablations.scaling.huber import SMALLEST, LogDomain
from ablations.scaling.points import Points
from ablations.scaling.variable_projection import HIGHEST, LOWEST

LEVEL = 0.95
# An exponent that is known to no better than this factor is not identified.
LOOSE = 3.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """Bounds of 95 %.

    Attributes:
        open_low, open_high: the bound is that of the search; the data gives none.
    """

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def __str__(self) -> str:
        return f"{self.low:.4g} to {self.high:.4g}{' (open)' * (self.open_low or self.open_high)}"


def bootstrap(points: Points, fit: Fit, *, resamples: int, delta: float, seed: int = 0) -> np.ndarray:
    """The law fitted to resamples of the points, from the whole fit as start.

    Returns:
        Parameters in the order of `Law.parameters`, [R, V].
    """
    domain = LogDomain(fit.law, points)
    start = domain.parameters(fit)
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(len(points), np.full(len(points), 1 / len(points)), size=resamples)
    rows = []
    for count_P in drawn:
        value, best = domain.minimise(start, delta, weight_P=points.weight_P * count_P)
        refit = domain.fit(np.exp(best[: domain.n_linear]), best[domain.n_linear :], value)
        rows.append([refit.values[name] for name in fit.law.parameters])
    return np.array(rows)


def percentiles(draws_R: np.ndarray) -> Interval:
    """The middle 95 % of the draws."""
    low, high = np.quantile(draws_R, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(low=float(low), high=float(high))


def profile(points: Points, fit: Fit, name: str, *, delta: float) -> Interval:
    """The profile-likelihood interval of E or of an exponent."""
    law = fit.law
    freedom = max(len(points) - len(law.parameters), 1)
    critical = float(special.stdtrit(freedom, (1 + LEVEL) / 2)) ** 2
    residual_P = np.log(points.loss_P) - np.log(fit.predict(points.variables))
    weight_P = points.weight_P
    squares = weight_P @ np.clip(residual_P, -delta, delta) ** 2 / freedom
    slope = weight_P @ (np.abs(residual_P) <= delta) / weight_P.sum()
    if squares <= 0 or slope <= 0:
        return Interval(low=math.nan, high=math.nan)
    scale = 0.5 * squares / slope
    centre = fit.values[name]
    domain = LogDomain(law, points)
    best = domain.parameters(fit)
    index = law.parameters.index(name)

    def excess(value: float) -> float:
        held = math.log(max(value, math.exp(SMALLEST))) if name == "E" else value
        return (domain.minimise(best, delta, held=(index, held))[0] - fit.objective) / scale - critical

    lowest, highest = (0.0, float(points.loss_P.min()) * (1 - 1e-9)) if name == "E" else (LOWEST, HIGHEST)
    low, open_low = _crossing(excess, centre, lowest)
    high, open_high = _crossing(excess, centre, highest)
    return Interval(low=low, high=high, open_low=open_low, open_high=open_high)


def _crossing(excess: Callable[[float], float], centre: float, bound: float) -> tuple[float, bool]:
    """Where `excess` turns positive between the estimate and a bound; the bound, and True, where it does not."""
    inside, step = centre, 0.02 * abs(centre) if centre else 0.02 * abs(bound)
    direction = math.copysign(1.0, bound - centre)
    while inside != bound:
        outside = inside + direction * step
        outside = min(outside, bound) if direction > 0 else max(outside, bound)
        if excess(outside) > 0:
            found: Any = optimize.brentq(excess, inside, outside, xtol=1e-3 * max(abs(centre), 1e-3))
            return float(found), False
        inside, step = outside, 2 * step
    return bound, True


def identifiability(points: Points, fit: Fit, intervals: dict[str, Interval]) -> list[str]:
    """What the points do not say, in sentences; empty where every parameter is identified.

    Args:
        intervals: of E and the exponents.
    """
    sizes = " and ".join(
        f"{len(np.unique(np.round(np.log(values), 3)))} values of {name}" for name, values in points.variables.items()
    )
    lines = []
    for name, interval in intervals.items():
        if name == "E":
            loose = interval.open_low or interval.open_high or not interval.high - interval.low < 0.25 * interval.high
        else:
            loose = interval.open_low or interval.open_high or not interval.high < LOOSE * interval.low
        if loose:
            lines.append(
                f"{name} is not identified by {len(points)} points with {sizes}: anything from {interval.low:.3g} to"
                f" {interval.high:.3g} fits."
            )
    for coefficient in fit.law.coefficients[1:]:
        if fit.values[coefficient] == 0:
            lines.append(f"The term {coefficient} is zero in the best fit: the points do not show it.")
    return lines

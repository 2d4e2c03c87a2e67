"""The learning rate of least loss, from a sweep: a parabola in the logarithm of the rate, with an interval.

Legend: P points of a sweep, R draws.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

# Points around the lowest that the parabola goes through: a loss is no parabola far from its minimum.
AROUND = 2
# A point whose loss is this share above the lowest is far from it, whatever its place.
FAR = 0.1
LEVEL = 0.95
# A minimum farther than this many steps of the grid beyond the points is none that they show.
BEYOND = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parabola:
    """loss = a x^2 + b x + c of x = log rate - centre, through the points around the lowest.

    Attributes:
        rate_P: rates of those points; seeds repeat them.
        coefficients_3: a, b and c.
        optimum: rate of least loss; NaN where the points show none.
        lowest: loss there.
        squares: of the residuals.
        freedom: points beyond the three that the parabola needs.
    """

    rate_P: np.ndarray
    centre: float
    coefficients_3: np.ndarray
    optimum: float
    lowest: float
    squares: float
    freedom: int

    def __call__(self, rate: float) -> float:
        """The loss at a rate, by the parabola."""
        return float(np.polyval(self.coefficients_3, math.log(rate) - self.centre))


def fit_parabola(rates: Sequence[float], losses: Sequence[float]) -> Parabola:
    """Through the lowest point and up to two neighbours on either side, of however many seeds.

    Args:
        losses: infinite where training did not stay finite.

    Raises:
        ValueError: for fewer than three rates with a finite loss near the lowest.
    """
    rate_P, loss_P = np.asarray(rates, dtype=float), np.asarray(losses, dtype=float)
    grid = np.unique(rate_P)
    mean = np.array([loss_P[rate_P == rate].mean() for rate in grid])
    best = int(mean.argmin())
    near = [
        index
        for index in range(max(best - AROUND, 0), min(best + AROUND + 1, len(grid)))
        if abs(index - best) <= 1 or mean[index] < (1 + FAR) * mean[best]
    ]
    if len(near) < 3:
        # The lowest lies at an end: what is there says at least on which side the optimum is.
        near = list(range(max(best - AROUND, 0), min(best + AROUND + 1, len(grid))))
    near = [index for index in near if math.isfinite(mean[index])]
    if len(near) < 3:
        raise ValueError(
            f"{len(near)} learning rates with a finite loss around {grid[best]:g}; a parabola needs at least 3"
        )
    kept_P = np.isin(rate_P, grid[near])
    rate_P, loss_P = rate_P[kept_P], loss_P[kept_P]
    centre = float(np.log(rate_P).mean())
    x_P = np.log(rate_P) - centre
    coefficients_3, squares = _quadratic(x_P, loss_P)
    optimum = _minimum(coefficients_3, x_P)
    return Parabola(
        rate_P=rate_P,
        centre=centre,
        coefficients_3=coefficients_3,
        optimum=math.exp(centre + optimum),
        lowest=float(np.polyval(coefficients_3, optimum)),
        squares=squares,
        freedom=len(rate_P) - 3,
    )


def draw_optima(
    parabola: Parabola, variance: float, freedom: int, draws: int, generator: np.random.Generator
) -> np.ndarray:
    """Optima of redrawn losses, [R]; those of a draw without a minimum are NaN.

    Args:
        variance: of losses around their parabolas, in the mean over the study's sweeps.
        freedom: that it is known with; it is itself drawn (scaled inverse chi-squared).
    """
    x_P = np.log(parabola.rate_P) - parabola.centre
    spread_R = np.sqrt(variance * freedom / generator.chisquare(freedom, draws))
    drawn_RP = np.polyval(parabola.coefficients_3, x_P) + spread_R[:, None] * generator.standard_normal(
        (draws, len(x_P))
    )
    drawn_R3 = drawn_RP @ np.linalg.pinv(_columns(x_P)).T
    return np.exp(parabola.centre + np.array([_minimum(drawn_3, x_P) for drawn_3 in drawn_R3]))


def interval(optima: np.ndarray) -> tuple[float, float]:
    """95 % of the draws; open (0 or infinity) on both sides where more than they leave out have no minimum."""
    known = optima[np.isfinite(optima)]
    if len(known) < LEVEL * len(optima):
        return 0.0, math.inf
    low, high = np.quantile(known, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)


def _quadratic(x_P: np.ndarray, loss_P: np.ndarray) -> tuple[np.ndarray, float]:
    """a, b, c of a x^2 + b x + c, and the squares that are left."""
    columns_P3 = _columns(x_P)
    found, *_ = np.linalg.lstsq(columns_P3, loss_P)
    return found, float(((columns_P3 @ found - loss_P) ** 2).sum())


def _columns(x_P: np.ndarray) -> np.ndarray:
    return np.stack([x_P**2, x_P, np.ones(len(x_P))], axis=1)


def _minimum(coefficients_3: np.ndarray, x_P: np.ndarray) -> float:
    """Where a x^2 + b x + c is least; NaN without a minimum in or just beside the points."""
    a, b, _ = coefficients_3
    if a <= 0:
        return math.nan
    places = np.unique(x_P)
    room = BEYOND * float(np.diff(places).max())
    minimum = float(-b / (2 * a))
    return minimum if places[0] - room <= minimum <= places[-1] + room else math.nan

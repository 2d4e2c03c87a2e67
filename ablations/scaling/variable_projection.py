"""Variable projection (Golub and Pereyra 1973): the linear parameters by non-negative least squares inside, a search
over the exponents alone outside.

The objective is that of `huber.py`. It becomes a sequence of weighted least squares in the loss itself: with the weight
psi(r) / (law (loss - law)) of each point, r its log residual and psi Huber's slope, the stationary points of the
weighted sum of squares are those of the objective.

Legend: P points, T terms with the constant first, X exponents.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import optimize

from ablations.scaling.forms import Fit, Law
from ablations.scaling.huber import DELTA, LogDomain, huber
from ablations.scaling.points import Points

GRID = (0.1, 0.25, 0.4, 0.6, 1.0)
LOWEST, HIGHEST = 1e-3, 5.0
# Of the objective between two weightings, where they stop.
TOLERANCE = 1e-9


def linear_part(columns_PT: np.ndarray, loss_P: np.ndarray, weight_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients >= 0 of the least weighted squares, and the weighted residuals."""
    root_P = np.sqrt(weight_P)
    weighted_PT = columns_PT * root_P[:, None]
    size_T = np.linalg.norm(weighted_PT, axis=0)
    linear_T, _ = optimize.nnls(weighted_PT / size_T, loss_P * root_P)
    linear_T = linear_T / size_T
    return linear_T, (columns_PT @ linear_T - loss_P) * root_P


@dataclasses.dataclass(frozen=True, kw_only=True)
class Projected:
    """What a projected search found.

    Attributes:
        outer_X: the parameters that are searched.
        linear_T: the coefficients that are solved for.
        fit_P: the loss of the law at every point.
        objective: the weighted sum of Huber losses of log residuals.
    """

    outer_X: np.ndarray
    linear_T: np.ndarray
    fit_P: np.ndarray
    objective: float


def projected_search(
    columns: Callable[[np.ndarray], np.ndarray],
    loss_P: np.ndarray,
    weight_P: np.ndarray,
    *,
    start_X: np.ndarray,
    bounds: tuple[Any, Any],
    delta: float,
) -> Projected:
    """Minimises the objective over outer parameters, the linear ones solved for.

    Args:
        columns: the terms of the law for outer parameters, [P, T].
        weight_P: of each point in the objective.
        bounds: lowest and highest outer parameters, numbers or [X].
    """

    def residuals(tried_X: np.ndarray, weight_P: np.ndarray) -> np.ndarray:
        return linear_part(columns(tried_X), loss_P, weight_P)[1]

    outer_X, least_P, best = start_X, weight_P / loss_P**2, math.inf
    while True:
        outer_X = optimize.least_squares(
            residuals,
            outer_X,
            bounds=bounds,
            x_scale=np.maximum(np.abs(start_X), 0.1),
            xtol=1e-10,
            ftol=1e-12,
            gtol=1e-14,
            args=(least_P,),
        ).x
        linear_T, _ = linear_part(columns(outer_X), loss_P, least_P)
        fit_P = columns(outer_X) @ linear_T
        value = float(weight_P @ huber(np.log(loss_P) - np.log(fit_P), delta))
        # Every weighting lowers the objective, until rounding ends it.
        if not best - value > TOLERANCE * value:
            return Projected(outer_X=outer_X, linear_T=linear_T, fit_P=fit_P, objective=value)
        best = value
        least_P = weight_P * _reweighted(fit_P, loss_P, delta)


def fit_by_projection(points: Points, law: Law, delta: float = DELTA, *, start: Fit | None = None) -> Fit:
    """The law's best fit.

    Args:
        delta: where Huber's function turns linear, in log loss.
        start: exponents to start from, instead of a grid.
    """
    domain = LogDomain(law, points)
    if start is not None:
        start_X = np.array([start.values[name] for name in law.exponents])
    else:
        weight_P = points.weight_P / points.loss_P**2

        def squares(tried_X: np.ndarray) -> float:
            return float((linear_part(domain.columns(tried_X), points.loss_P, weight_P)[1] ** 2).sum())

        start_X = min(map(np.array, itertools.product(GRID, repeat=len(law.exponents))), key=squares)
    found = projected_search(
        domain.columns,
        points.loss_P,
        points.weight_P,
        start_X=start_X,
        bounds=(LOWEST, HIGHEST),
        delta=delta,
    )
    return domain.fit(found.linear_T, found.outer_X, found.objective)


def _reweighted(fit_P: np.ndarray, loss_P: np.ndarray, delta: float) -> np.ndarray:
    log_P, difference_P = np.log(loss_P / fit_P), loss_P - fit_P
    # The limit where both vanish.
    near_P = np.abs(log_P) < 1e-9
    ratio_P = np.where(near_P, 1 / fit_P, log_P / np.where(near_P, 1.0, difference_P))
    return np.minimum(1.0, delta / np.maximum(np.abs(log_P), 1e-300)) * ratio_P / fit_P

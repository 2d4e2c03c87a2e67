"""Variable projection (Golub and Pereyra 1973): the linear parameters by non-negative least squares inside, a search
over the exponents alone outside.

The objective is that of `huber.py`. It becomes a sequence of weighted least squares in the loss itself: with the weight
psi(r) / (law (loss - law)) of each point, r its log residual and psi Huber's slope, the stationary points of the
weighted sum of squares are those of the objective.

Legend: P points, T terms with the constant first, X exponents.
"""

import itertools
import math

import numpy as np
from scipy import optimize

from ablations.scaling.forms import Fit, Law
from ablations.scaling.huber import DELTA, LogDomain, objective
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


def fit_by_projection(points: Points, law: Law, delta: float = DELTA, *, start: Fit | None = None) -> Fit:
    """The law's best fit.

    Args:
        delta: where Huber's function turns linear, in log loss.
        start: exponents to start from, instead of a grid.
    """
    domain = LogDomain(law, points)

    def project(exponents_X: np.ndarray, weight_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return linear_part(domain.columns(exponents_X), points.loss_P, weight_P)

    def search(exponents_X: np.ndarray, weight_P: np.ndarray) -> np.ndarray:
        found = optimize.least_squares(
            lambda tried_X: project(tried_X, weight_P)[1],
            exponents_X,
            bounds=(LOWEST, HIGHEST),
            xtol=1e-10,
            ftol=1e-12,
            gtol=1e-14,
        )
        return found.x

    weight_P = points.weight_P / points.loss_P**2
    if start is not None:
        exponents_X = np.array([start.values[name] for name in law.exponents])
    else:
        grid = (np.array(point) for point in itertools.product(GRID, repeat=len(law.exponents)))
        exponents_X = min(grid, key=lambda tried_X: float((project(tried_X, weight_P)[1] ** 2).sum()))
    best = math.inf
    while True:
        exponents_X = search(exponents_X, weight_P)
        linear_T, _ = project(exponents_X, weight_P)
        fit_P = domain.columns(exponents_X) @ linear_T
        value = objective(fit_P, points, delta)
        # Every weighting lowers the objective, until rounding ends it.
        if not best - value > TOLERANCE * value:
            return domain.fit(linear_T, exponents_X, value)
        best = value
        weight_P = points.weight_P * _reweighted(fit_P, points.loss_P, delta)


def _reweighted(fit_P: np.ndarray, loss_P: np.ndarray, delta: float) -> np.ndarray:
    log_P, difference_P = np.log(loss_P / fit_P), loss_P - fit_P
    # The limit where both vanish.
    near_P = np.abs(log_P) < 1e-9
    ratio_P = np.where(near_P, 1 / fit_P, log_P / np.where(near_P, 1.0, difference_P))
    return np.minimum(1.0, delta / np.maximum(np.abs(log_P), 1e-300)) * ratio_P / fit_P

"""Huber's loss of log residuals, and the cross-check: its minimum by L-BFGS from a grid of starts.

The objective is that of Hoffmann 2022 and its refit (Besiroglu 2024, arXiv 2404.10102): the sum over points of Huber's
function of log loss - log law, quadratic up to `delta` and linear beyond.

Legend: P points, T terms with the constant first, X exponents.
"""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import optimize

from ablations.scaling.forms import Fit, Law
from ablations.scaling.points import Points

DELTA = 1e-3
# Of exponents, for the grid of starts.
STARTS = (0.2, 0.5, 1.0)
# A coefficient that the data wants to be zero ends near exp(SMALLEST) of the loss.
SMALLEST = -30.0


def huber(residual_P: np.ndarray, delta: float) -> np.ndarray:
    """Half the square up to `delta`, then linear."""
    size_P = np.abs(residual_P)
    return np.where(size_P <= delta, 0.5 * residual_P**2, delta * (size_P - 0.5 * delta))


class LogDomain:
    """A law in logarithms: parameters are log coefficients, then exponents.

    Variables are divided by their geometric means, so that coefficients and exponents are nearly independent; `fit`
    turns them back.
    """

    def __init__(self, law: Law, points: Points) -> None:
        self.law, self.points = law, points
        logs = {name: np.log(values) for name, values in points.variables.items()}
        self.centres = {name: float(values.mean()) for name, values in logs.items()}
        self.powers_TPX = law.powers_TPX({name: values - self.centres[name] for name, values in logs.items()})
        self.n_linear = len(law.coefficients)

    def columns(self, exponents_X: np.ndarray) -> np.ndarray:
        """The law's terms without their coefficients, [P, T]."""
        return np.exp(self.powers_TPX @ exponents_X).T

    def fit(self, linear_T: np.ndarray, exponents_X: np.ndarray, value: float) -> Fit:
        """The law in the unit of the points.

        Args:
            linear_T: coefficients of the centred terms.
            value: of the objective.
        """
        at_one_TX = self.law.powers_TPX({name: np.array([-centre]) for name, centre in self.centres.items()})[:, 0]
        linear_T = linear_T * np.exp(at_one_TX @ exponents_X)
        values = dict(zip(self.law.parameters, map(float, (*linear_T, *exponents_X))))
        return Fit(law=self.law, values=values, objective=value)

    def parameters(self, fit: Fit) -> np.ndarray:
        """The inverse of `fit`: log coefficients of the centred terms, then exponents."""
        exponents_X = np.array([fit.values[name] for name in self.law.exponents])
        at_centre_TX = self.law.powers_TPX({name: np.array([centre]) for name, centre in self.centres.items()})[:, 0]
        linear_T = np.array([fit.values[name] for name in self.law.coefficients])
        log_T = np.log(np.maximum(linear_T, 1e-300)) + at_centre_TX @ exponents_X
        return np.concatenate([np.maximum(log_T, SMALLEST), exponents_X])

    def minimise(
        self,
        start: np.ndarray,
        delta: float,
        *,
        weight_P: np.ndarray | None = None,
        held: tuple[int, float] | None = None,
    ) -> tuple[float, np.ndarray]:
        """The objective's minimum by L-BFGS with its exact gradient, from one start.

        Args:
            weight_P: instead of the points' own.
            held: number of a parameter and the value that it keeps.
        """
        weight_P = self.points.weight_P if weight_P is None else weight_P
        log_loss_P = np.log(self.points.loss_P)
        # The optimiser's tolerances are meant for values near one.
        scale = 1.0 / (delta * weight_P.sum())

        def value(parameters: np.ndarray) -> tuple[float, np.ndarray]:
            log_T, exponents_X = np.split(parameters, [self.n_linear])
            # A step of the line search may go far; what overflows there is only a bad place.
            term_TP = np.exp(np.minimum(log_T[:, None] + self.powers_TPX @ exponents_X, 300.0))
            fit_P = term_TP.sum(0)
            residual_P = log_loss_P - np.log(fit_P)
            slope_TP = term_TP * (-weight_P * np.clip(residual_P, -delta, delta) / fit_P)
            gradient = np.concatenate([slope_TP.sum(1), np.tensordot(slope_TP, self.powers_TPX, 2)])
            return scale * float(weight_P @ huber(residual_P, delta)), scale * gradient

        bounds = [(SMALLEST, None)] * self.n_linear + [(1e-3, 5.0)] * len(self.law.exponents)
        if held is not None:
            bounds[held[0]] = (held[1], held[1])
            start = np.where(np.arange(len(start)) == held[0], held[1], start)
        found = optimize.minimize(
            value,
            start,
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options={"ftol": 1e-13, "gtol": 1e-9, "maxiter": 3000},
        )
        return float(found.fun) / scale, found.x


def fit_by_huber(
    points: Points, law: Law, delta: float = DELTA, starts: Iterable[Sequence[float]] | None = None
) -> Fit:
    """The best of L-BFGS from every combination of `STARTS` as exponents, with E at half and at 0.9 of the lowest loss.

    Args:
        starts: exponents to start from, instead of the grid.
    """
    domain = LogDomain(law, points)
    starts = list(itertools.product(STARTS, repeat=len(law.exponents))) if starts is None else list(starts)
    lowest, middle = points.loss_P.min(), np.median(points.loss_P)
    found = []
    for exponents, share in itertools.product(starts, (0.5, 0.9)):
        rest = np.log(max(middle - share * lowest, 1e-6) / len(law.terms))
        start = np.concatenate([[np.log(share * lowest)], np.full(len(law.terms), rest), exponents])
        found.append(domain.minimise(start, delta))
    value, best = min(found, key=lambda pair: pair[0])
    linear_T, exponents_X = np.exp(best[: domain.n_linear]), best[domain.n_linear :]
    return domain.fit(linear_T, exponents_X, value)

"""What else could explain a rank correlation, as columns that are regressed out: however it acts, straight or not.

Holding ranks of a covariate fixed by a linear term leaves what acts otherwise: a rare token and a very common one may
both be easy. A numeric covariate is therefore a cubic spline of its ranks (knots at quantiles), a name (a domain) a
column per value, and a pair of covariates also the products of both, with coarser splines.

Legend: N observations, P columns.
"""

import itertools

import numpy as np
from scipy import interpolate, stats

# Interior knots of a covariate alone, and of each of a pair; never more than leave so many observations to a knot.
KNOTS, PAIR_KNOTS, PER_KNOT = 12, 2, 40
DEGREE = 3


def control_basis(covariates: tuple[np.ndarray, ...]) -> np.ndarray:
    """An orthonormal basis of the functions of the covariates that are held fixed, the constant among them.

    Args:
        covariates: each [N], numbers or names.

    Returns:
        float64 [N, P]: what it explains of y is basis @ (basis.T @ y).
    """
    n = len(covariates[0])
    columns, coarse = [np.ones((n, 1))], []
    for values_N in covariates:
        if values_N.dtype.kind in "iuf":
            rank_N = stats.rankdata(values_N) / n
            columns.append(_spline(rank_N, KNOTS))
            coarse.append(_spline(rank_N, PAIR_KNOTS))
        else:
            columns.append((values_N[:, None] == np.unique(values_N)).astype(float))
            coarse.append(columns[-1])
    # Ranks of a sum are no sum: what two covariates do to them together needs columns of its own.
    for left, right in itertools.combinations(coarse, 2):
        columns.append((left[:, :, None] * right[:, None, :]).reshape(n, -1))
    whole = np.concatenate(columns, axis=1)
    # Columns are many times dependent (each spline sums up to the constant): only directions that exist count.
    value_P, vector_PP = np.linalg.eigh(whole.T @ whole)
    real = value_P > 1e-9 * value_P[-1]
    return whole @ (vector_PP[:, real] / np.sqrt(value_P[real]))


def _spline(rank_N: np.ndarray, knots: int) -> np.ndarray:
    """Cubic B-splines of ranks in (0, 1], [N, interior knots + 4]; a column per value where there are few."""
    values = np.unique(rank_N)
    n_knots = max(0, min(knots, len(rank_N) // PER_KNOT - DEGREE))
    if len(values) <= n_knots + DEGREE + 1:
        return (rank_N[:, None] == values).astype(float)
    low, high = values[0], values[-1]
    inner = np.unique(np.quantile(rank_N, np.linspace(0, 1, n_knots + 2)[1:-1]))
    inner = inner[(inner > low) & (inner < high)]
    places = np.concatenate([[low] * (DEGREE + 1), inner, [high] * (DEGREE + 1)])
    return interpolate.BSpline.design_matrix(rank_N, places, DEGREE).toarray()

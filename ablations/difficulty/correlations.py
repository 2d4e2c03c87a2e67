"""Rank correlations with what else could explain them held fixed, resampled by document.

Spearman's coefficient is Pearson's on ranks. The partial one correlates the residuals of a linear regression of the
ranks on the covariates' ranks. Tokens of a document are not independent, so intervals resample documents; the ranks are
those of the whole sample in every resample, so a resample is a weighted sum of one matrix of moments per document.

Legend: N tokens, D documents, R resamples, V variables (a constant first).
"""

import dataclasses

import numpy as np
from scipy import stats

FREQUENCY_BINS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounded:
    """A number with the bounds of its 95 % interval; NaN where it has none."""

    value: float
    low: float
    high: float


def spearman(
    x_N: np.ndarray,
    y_N: np.ndarray,
    document_N: np.ndarray,
    *,
    given: tuple[np.ndarray, ...] = (),
    weights_RD: np.ndarray,
) -> Bounded:
    """Rank correlation of x and y.

    Args:
        document_N: the document of each token, the unit of resampling.
        given: covariates whose ranks are held fixed; the correlation is then partial.
        weights_RD: how often each resample draws each document, see `document_weights`.

    Returns:
        The coefficient with its bootstrap interval; NaN where x or y does not vary.
    """
    ranks = [stats.rankdata(values) / len(x_N) for values in (x_N, y_N, *given)]
    ranked_NV = np.column_stack([np.ones(len(x_N)), *ranks])
    order = np.argsort(document_N, kind="stable")
    _, starts = np.unique(document_N[order], return_index=True)
    # One matrix per document: a resample is then a weighted sum of few numbers instead of another pass over all tokens.
    moments_DVV = np.stack([part.T @ part for part in np.split(ranked_NV[order], starts[1:])])
    whole = _partial(moments_DVV.sum(0)[None])[0]
    resampled_R = _partial(np.einsum("rd,dvw->rvw", weights_RD, moments_DVV))
    return _bounded(float(whole), resampled_R)


def _partial(moments_RVV: np.ndarray) -> np.ndarray:
    """Correlation of variables 1 and 2 given the constant and variables 3 on, from sums of products; NaN where either
    does not vary."""
    given = [0, *range(3, moments_RVV.shape[-1])]
    of_given = moments_RVV[:, given][:, :, given]
    of_both = moments_RVV[:, 1:3][:, :, given]
    # A covariate may be constant or a copy of another: the pseudo-inverse then holds the same space fixed.
    rest = moments_RVV[:, 1:3, 1:3] - of_both @ np.linalg.pinv(of_given, hermitian=True) @ of_both.transpose(0, 2, 1)
    scale = moments_RVV[:, [1, 2], [1, 2]]
    variance = rest[:, [0, 1], [0, 1]]
    varies = (variance > 1e-9 * scale).all(1)
    return np.where(varies, rest[:, 0, 1] / np.sqrt(np.where(varies, variance[:, 0] * variance[:, 1], 1.0)), np.nan)


def document_weights(n_documents: int, resamples: int, seed: int = 0) -> np.ndarray:
    """The bootstrap: how often each document is drawn in each resample, float [R, D].

    Args:
        seed: equal seed, equal resamples.
    """
    generator = np.random.default_rng(seed)
    return generator.multinomial(n_documents, np.full(n_documents, 1 / n_documents), size=resamples).astype(float)


def matched_shuffle(
    x_N: np.ndarray, y_N: np.ndarray, frequency_N: np.ndarray, *, shuffles: int, seed: int = 0
) -> np.ndarray:
    """What frequency alone gives: Spearman's coefficient after y was shuffled among tokens of like frequency.

    Args:
        frequency_N: cut into `FREQUENCY_BINS` quantile bins, within which y is shuffled.
        shuffles: how often.
        seed: of the shuffles.

    Returns:
        The null distribution, float [shuffles].
    """
    generator = np.random.default_rng(seed)
    x_rank_N, y_rank_N = stats.rankdata(x_N), stats.rankdata(y_N)
    edges = np.unique(np.quantile(frequency_N, np.linspace(0, 1, FREQUENCY_BINS + 1)[1:-1]))
    bin_N = np.searchsorted(edges, frequency_N, side="right")
    members = [np.nonzero(bin_N == number)[0] for number in np.unique(bin_N)]
    null = []
    for _ in range(shuffles):
        shuffled_N = y_rank_N.copy()
        for index in members:
            shuffled_N[index] = y_rank_N[generator.permutation(index)]
        null.append(_pearson(x_rank_N, shuffled_N))
    return np.array(null)


def _pearson(x_N: np.ndarray, y_N: np.ndarray) -> float:
    x_N, y_N = x_N - x_N.mean(), y_N - y_N.mean()
    scale = np.sqrt((x_N @ x_N) * (y_N @ y_N))
    return float(x_N @ y_N / scale) if scale > 0 else float("nan")


def document_sums(values_N: np.ndarray, document_N: np.ndarray, n_documents: int) -> np.ndarray:
    """Sum of a quantity over each document's tokens, float [D]."""
    return np.bincount(document_N, weights=values_N, minlength=n_documents)


def ratio(numerator_D: np.ndarray, denominator_D: np.ndarray, weights_RD: np.ndarray) -> Bounded:
    """Ratio of two sums over documents, with its bootstrap interval."""
    resampled_R = (weights_RD @ numerator_D) / (weights_RD @ denominator_D)
    return _bounded(float(numerator_D.sum() / denominator_D.sum()), resampled_R)


def _bounded(value: float, resampled_R: np.ndarray) -> Bounded:
    """Resamples without a value (a quantity that does not vary in them) do not count."""
    known = resampled_R[np.isfinite(resampled_R)]
    low, high = np.quantile(known, (0.025, 0.975)) if len(known) else (np.nan, np.nan)
    return Bounded(value=value, low=float(low), high=float(high))

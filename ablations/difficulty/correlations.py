"""Rank correlations with what else could explain them held fixed, resampled by document.

Spearman's coefficient is Pearson's on ranks. The partial one correlates what `controls.control_basis` leaves of the
ranks. Tokens of a document are not independent, so intervals resample documents; ranks and residuals are those of the
whole sample in every resample, so a resample is a weighted sum of one matrix of moments per document.

Legend: N tokens, D documents, R resamples, V variables (a constant first), P columns that are held fixed.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import special, stats

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
    basis_NP: np.ndarray | None = None,
    weights_RD: np.ndarray,
) -> Bounded:
    """Rank correlation of x and y, with its interval over documents; arguments see `resampled_spearman`."""
    return bounded(*resampled_spearman(x_N, y_N, document_N, basis_NP=basis_NP, weights_RD=weights_RD))


def resampled_spearman(
    x_N: np.ndarray,
    y_N: np.ndarray,
    document_N: np.ndarray,
    *,
    basis_NP: np.ndarray | None = None,
    weights_RD: np.ndarray,
) -> tuple[float, np.ndarray]:
    """Rank correlation of x and y.

    Args:
        document_N: the document of each token, the unit of resampling.
        basis_NP: orthonormal columns that are held fixed, see `controls.control_basis`; the correlation is then
            partial.
        weights_RD: how often each resample draws each document, see `document_weights`.

    Returns:
        The coefficient, and that of every resample, [R]; NaN where x or y does not vary.
    """
    ranked_NV = np.column_stack([np.ones(len(x_N)), *(stats.rankdata(values) / len(x_N) for values in (x_N, y_N))])
    scale_V = (ranked_NV[:, 1:] ** 2).mean(0)
    if basis_NP is not None:
        ranked_NV[:, 1:] -= basis_NP @ (basis_NP.T @ ranked_NV[:, 1:])
    order = np.argsort(document_N, kind="stable")
    _, starts = np.unique(document_N[order], return_index=True)
    # One matrix per document: a resample is then a weighted sum of few numbers instead of another pass over all tokens.
    moments_DVV = np.stack([part.T @ part for part in np.split(ranked_NV[order], starts[1:])])
    whole = _correlation(moments_DVV.sum(0)[None], scale_V)[0]
    return float(whole), _correlation(np.einsum("rd,dvw->rvw", weights_RD, moments_DVV), scale_V)


def _correlation(moments_RVV: np.ndarray, scale_V: np.ndarray) -> np.ndarray:
    """Of variables 1 and 2, from sums of products; NaN where either does not vary, beside its ranks' mean square."""
    n_R = moments_RVV[:, 0, 0]
    mean_RV = moments_RVV[:, 0, 1:] / n_R[:, None]
    central_RVV = moments_RVV[:, 1:, 1:] / n_R[:, None, None] - mean_RV[:, :, None] * mean_RV[:, None, :]
    variance_RV = central_RVV[:, [0, 1], [0, 1]]
    varies_R = (variance_RV > 1e-9 * scale_V).all(1)
    return np.where(varies_R, central_RVV[:, 0, 1] / np.sqrt(np.where(varies_R, variance_RV.prod(1), 1.0)), np.nan)


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
    return bounded(float(numerator_D.sum() / denominator_D.sum()), resampled_R)


def pooled(values: Sequence[float], resampled_UR: Sequence[np.ndarray]) -> Bounded:
    """Mean of a number over training seeds, with an interval that holds the noise of seeds and of documents: as for a
    difference (`comparison.statistics`), a part of each kind, added as squares.

    Args:
        values: of at least two runs.
        resampled_UR: of each run, under the same resamples of the documents.
    """
    mean, n = float(np.mean(values)), len(values)
    seeds = -special.stdtrit(n - 1, 0.025) * float(np.std(values, ddof=1)) / n**0.5
    documents = -special.ndtri(0.025) * float(np.nanstd(np.mean(resampled_UR, axis=0)))
    half = float(np.hypot(seeds, documents))
    return Bounded(value=mean, low=mean - half, high=mean + half)


def bounded(value: float, resampled_R: np.ndarray) -> Bounded:
    """A number with the interval of its resamples; those without a value (a quantity that does not vary in them) do
    not count."""
    known = resampled_R[np.isfinite(resampled_R)]
    low, high = np.quantile(known, (0.025, 0.975)) if len(known) else (np.nan, np.nan)
    return Bounded(value=value, low=float(low), high=float(high))

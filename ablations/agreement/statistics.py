"""How far cheap runs order arms as full runs do.

Values are bits per byte, so lower is better. Seeds are paired: one seed has the same order of batches in every arm.

A pair of arms is *separable* in truth where the paired t interval of its seeds' differences excludes zero at 95 %; how
many are left by Holm's correction over all pairs is told beside it. A pair agrees where the cheap difference has the
sign of the true one, so guessing agrees in half of them.

Intervals are percentiles of a nested bootstrap: arms are drawn with replacement, and for each such draw seeds, the same
for full and cheap runs. Which pairs are separable is not drawn anew: of three seeds drawn twice none has a spread. With
two or three seeds such intervals are too narrow in the seeds and hold mostly the draw of the arms.

Legend: A arms, S seeds, P pairs of arms.
"""

import dataclasses
import math
import warnings
from itertools import combinations
from typing import Any

import numpy as np
from scipy import stats

from ablations.comparison.statistics import NO_NOISE, Difference, Noise, holm
from ablations.comparison.verdicts import ERROR

GENERATOR_SEED = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with the 95 % interval of the bootstrap; NaN where there is nothing to compute it from."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """One setting beside the truth.

    Attributes:
        pairs, agreeing: of arms, and how many are ordered as in truth.
        separable, separable_agreeing: the same of those that full runs tell apart at 95 %.
        holm, holm_agreeing: the same of those that are left by Holm's correction.
        share, separable_share: agreeing pairs of all, and of the separable ones.
        tau: Kendall's tau-b between the arms' means.
        signs: share of arms on the same side of the baseline as in truth.
        regret: true bits per byte of the arm that the cheap runs put first, minus those of the best.
    """

    pairs: int
    agreeing: int
    separable: int
    separable_agreeing: int
    holm: int
    holm_agreeing: int
    share: Estimate
    separable_share: Estimate
    tau: Estimate
    signs: Estimate
    regret: Estimate


def agreement(truth_AS: np.ndarray, cheap_AS: np.ndarray, resamples: int = 1000) -> Agreement:
    """Compares cheap runs with full ones.

    Args:
        truth_AS, cheap_AS: bits per byte, the baseline first; of the cheap runs their differences to a baseline do as
            well.
        resamples: of the bootstrap.

    Raises:
        ValueError: for fewer than two arms beside the baseline, or arrays of different shapes.
    """
    if truth_AS.shape != cheap_AS.shape or len(truth_AS) < 3:
        raise ValueError(
            f"agreement: full runs {truth_AS.shape} and cheap runs {cheap_AS.shape} of arms by seeds; both need"
            " the same arms and seeds, and two arms beside the baseline"
        )
    separable_AA, holm_AA = separable(truth_AS)
    agree_AA = agreeing(truth_AS.mean(axis=1), cheap_AS.mean(axis=1))
    upper_AA = np.triu(np.ones_like(agree_AA), 1)
    counts = [int((part & upper_AA & agree_AA).sum()) for part in (upper_AA, separable_AA, holm_AA)]
    totals = [int((part & upper_AA).sum()) for part in (upper_AA, separable_AA, holm_AA)]
    n_arms, n_seeds = truth_AS.shape
    everything = np.arange(n_arms)
    values = measures(truth_AS, cheap_AS, separable_AA, everything)
    generator = np.random.default_rng(GENERATOR_SEED)
    drawn = []
    for _ in range(resamples):
        # The baseline is no draw: every arm is measured against it.
        arms = np.concatenate([[0], generator.integers(1, n_arms, n_arms - 1)])
        seeds = generator.integers(0, n_seeds, n_seeds)
        drawn.append(measures(truth_AS[:, seeds], cheap_AS[:, seeds], separable_AA, arms))
    with warnings.catch_warnings():
        # A column of nothing but NaN stays NaN.
        warnings.simplefilter("ignore", RuntimeWarning)
        low, high = np.nanpercentile(np.array(drawn), [100 * ERROR / 2, 100 * (1 - ERROR / 2)], axis=0)
    share, separable_share, tau, signs, regret = (
        Estimate(value=value, low=float(bottom), high=float(top)) for value, bottom, top in zip(values, low, high)
    )
    return Agreement(
        pairs=totals[0],
        agreeing=counts[0],
        separable=totals[1],
        separable_agreeing=counts[1],
        holm=totals[2],
        holm_agreeing=counts[2],
        share=share,
        separable_share=separable_share,
        tau=tau,
        signs=signs,
        regret=regret,
    )


def separable(truth_AS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which pairs of arms full runs tell apart, at 95 % each and by Holm's correction over all: two [A, A]."""
    n_arms, n_seeds = truth_AS.shape
    apart_AA, holm_AA = (np.zeros((n_arms, n_arms), dtype=bool) for _ in range(2))
    if n_seeds < 2:
        return apart_AA, holm_AA
    p_values = {}
    for i, j in combinations(range(n_arms), 2):
        difference_S = truth_AS[i] - truth_AS[j]
        noise = Noise(variance=float(difference_S.var(ddof=1)) / n_seeds, freedom=n_seeds - 1)
        paired = Difference(mean=float(difference_S.mean()), runs=noise, text=NO_NOISE, n=n_seeds)
        p_values[f"{i} {j}"] = paired.p_value
    for found_AA, values in ((apart_AA, p_values), (holm_AA, holm(p_values))):
        for pair, p_value in values.items():
            i, j = map(int, pair.split())
            found_AA[i, j] = found_AA[j, i] = p_value < ERROR
    return apart_AA, holm_AA


def agreeing(truth_A: np.ndarray, cheap_A: np.ndarray) -> np.ndarray:
    """Which pairs of arms have the same order in both, [A, A]; a tie agrees with nothing."""
    order = [np.sign(value_A[:, None] - value_A[None, :]) for value_A in (truth_A, cheap_A)]
    return (order[0] == order[1]) & (order[0] != 0)


def measures(
    truth_AS: np.ndarray, cheap_AS: np.ndarray, separable_AA: np.ndarray, arms: np.ndarray
) -> tuple[float, float, float, float, float]:
    """Share of pairs, of separable pairs, tau, share of signs and regret of `arms`: numbers of rows, the baseline
    first, of which some may come up several times."""
    truth_A, cheap_A = (values_AS.mean(axis=1)[arms] for values_AS in (truth_AS, cheap_AS))
    agree_AA = agreeing(truth_A, cheap_A)
    # An arm that was drawn twice is no pair with itself.
    pairs_AA = np.triu(arms[:, None] != arms[None, :], 1)
    separable_pairs_AA = pairs_AA & separable_AA[np.ix_(arms, arms)]
    with warnings.catch_warnings():
        # Constant values have no order; tau is NaN then.
        warnings.simplefilter("ignore")
        result: Any = stats.kendalltau(truth_A, cheap_A)
        tau = float(result.statistic)
    return (
        _share(agree_AA, pairs_AA),
        _share(agree_AA, separable_pairs_AA),
        tau,
        float(agree_AA[0, 1:].mean()),
        float(truth_A[np.argmin(cheap_A)] - truth_A.min()),
    )


def ceiling(truth_AS: np.ndarray) -> float:
    """Share of pairs that full runs of one seed order as the mean of the other seeds does: what a cheap setting of the
    same noise could reach at best. NaN for a single seed."""
    n_arms, n_seeds = truth_AS.shape
    if n_seeds < 2:
        return math.nan
    upper_AA = np.triu(np.ones((n_arms, n_arms), dtype=bool), 1)
    shares = [
        _share(agreeing(np.delete(truth_AS, seed, axis=1).mean(axis=1), truth_AS[:, seed]), upper_AA)
        for seed in range(n_seeds)
    ]
    return sum(shares) / n_seeds


def _share(agree_AA: np.ndarray, pairs_AA: np.ndarray) -> float:
    n = int(pairs_AA.sum())
    return float(agree_AA[pairs_AA].sum() / n) if n else math.nan

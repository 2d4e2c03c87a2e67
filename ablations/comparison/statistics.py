"""Means, paired differences and verdicts: what a comparison of a few seeds can and cannot say.

Values are validation bits per byte, so lower is better. A run is named by its pair (trunk seed, branch seed).

With one trunk the unit of replication is the branch seed: intervals hold the noise of the branch's data order and of
the method's own draws, on that trunk, and say nothing about other trunks. With several trunks the runs are nested,
value = mean + trunk + branch, and branches of one trunk share its deviation; counting them as independent would make
intervals too narrow. The unit is then the mean over a trunk's branches, whose spread holds both kinds of noise (the
usual analysis of a balanced nested design: the interval of the mean depends on the trunk means only).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

# (trunk seed, branch seed)
RunKey = tuple[int, int]

BETTER = "better"
WORSE = "worse"
NOT_SEPARABLE = "not separable"
NO_VERDICT = "no verdict (n=1)"
REFERENCE = "reference"


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its confidence interval.

    Attributes:
        mean: over the units.
        half_width: of the interval; None where a single unit leaves the noise unknown.
        n: independent units, see `units`.
    """

    mean: float
    half_width: float | None
    n: int

    @property
    def low(self) -> float | None:
        return None if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float | None:
        return None if self.half_width is None else self.mean + self.half_width


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's t interval of a mean: mean ± t_{(1+c)/2, n-1} · s / sqrt(n), s with n - 1 degrees of freedom.

    Args:
        values: independent draws.
        confidence: c, the share of such intervals that hold the true mean.

    Raises:
        ValueError: for no values, for a value that is not finite, and for a confidence outside (0, 1).
    """
    n = len(values)
    if n == 0:
        raise ValueError("an interval needs at least one value, none given")
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"an interval needs finite values, got {list(values)}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} is not between 0 and 1")
    # fsum rounds once, so the mean does not depend on the order of the runs.
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean=mean, half_width=None, n=1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    quantile = float(stats.t.ppf((1 + confidence) / 2, n - 1))
    return Interval(mean=mean, half_width=quantile * math.sqrt(variance / n), n=n)


def units(values: Mapping[RunKey, float]) -> list[float]:
    """The independent units among runs: the runs themselves on one trunk, the trunk means on several."""
    by_trunk: dict[int, list[float]] = {}
    # Sorted, so that the order in which runs finished plays no part.
    for (trunk, _), value in sorted(values.items()):
        by_trunk.setdefault(trunk, []).append(value)
    if len(by_trunk) == 1:
        return next(iter(by_trunk.values()))
    return [math.fsum(group) / len(group) for group in by_trunk.values()]


def mean_interval(values: Mapping[RunKey, float], confidence: float = 0.95) -> Interval:
    """Mean over runs with its interval; the unit is the branch seed on one trunk, the trunk on several."""
    return t_interval(units(values), confidence)


def paired_difference(
    method: Mapping[RunKey, float], baseline: Mapping[RunKey, float], confidence: float = 0.95
) -> Interval:
    """Mean of method - baseline over the runs that both have, paired by trunk seed and branch seed.

    The two runs of a pair share their data order, whose noise therefore cancels in the difference.

    Args:
        method, baseline: bits per byte by run.

    Raises:
        ValueError: where no pair exists.
    """
    pairs = method.keys() & baseline.keys()
    if not pairs:
        raise ValueError(f"no common seeds to pair: the method has {sorted(method)}, the baseline {sorted(baseline)}")
    return mean_interval({key: method[key] - baseline[key] for key in pairs}, confidence)


def verdict(difference: Interval) -> str:
    """What an interval of a difference in bits per byte allows to say.

    Returns:
        `BETTER` where the whole interval lies below zero, `WORSE` above, else `NOT_SEPARABLE`; `NO_VERDICT` from a
        single unit.
    """
    if difference.low is None or difference.high is None:
        return NO_VERDICT
    # Strictly: an interval that only touches zero separates nothing, so two identical methods never earn a verdict.
    if difference.high < 0:
        return BETTER
    if difference.low > 0:
        return WORSE
    return NOT_SEPARABLE


def noise_statement(n_trunks: int, n_branches: int) -> str:
    """One sentence for the reader: which noise the intervals of a comparison hold."""
    if n_trunks > 1:
        return (
            f"Intervals are 95 % t-intervals over {n_trunks} trunks (each the mean of {n_branches} branch"
            f" seed{'s' * (n_branches > 1)}): they hold trunk noise (initial weights, trunk data order) and branch"
            " noise (branch data order, fresh weights, the method's draws)."
        )
    if n_branches > 1:
        return (
            f"Intervals are 95 % t-intervals over {n_branches} branch seeds on one trunk: they hold branch noise"
            " (branch data order, fresh weights, the method's draws) and not trunk noise; another trunk may shift or"
            " reorder the methods (--trunk-seeds N measures that)."
        )
    return (
        "One seed per method: no interval and no verdict can be given (--seeds N, or --trunk-seeds N, measures the"
        " noise)."
    )

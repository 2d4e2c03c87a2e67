"""Paired differences and their noise: what a comparison of a few seeds on one text can and cannot say.

Values are validation bits per byte, so lower is better. A run is named by its pair (trunk seed, branch seed).

Two kinds of draws stand behind a difference, and they cross: every run is measured on the same text.

- *Runs*. On one trunk the unit is the branch seed. With several trunks the runs are nested, value = mean + trunk +
  branch, and branches of one trunk share its deviation; the unit is then the mean over a trunk's branches, whose spread
  holds both kinds of noise (the usual analysis of a balanced nested design). A single run has no spread: twins, whose
  true difference is zero, then measure what rounding alone does.
- *Text*. The sections of the validation text (`corpus.sections`): how much the difference varies from section to
  section, and from document to document where sections of one document are alike; the larger counts. What varies from
  run to run is in the spread of the runs already, so that part is taken off (the variance of a mean over two crossed
  factors, Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 1, 2007).

The interval is mean ± sqrt(sum of t_i^2 v_i), t_i the quantile at the degrees of freedom of the variance v_i: at least
nominal whatever the parts (Banerjee, "Approximate confidence interval for linear functions of means of k populations
when the population variances are not equal", Sankhya 22, 1960). Resampling two or three runs covers 60 to 76 % instead
of 95, and Satterthwaite's degrees of freedom 89 % with two: notes/results/statistics.

Legend: U units of the runs, S sections, G groups of sections.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

# Neither scipy.stats nor scipy.optimize here: every command would wait for them, a second altogether.
from scipy import special

# (trunk seed, branch seed)
RunKey = tuple[int, int]

CONFIDENCE = 0.95
POWER = 0.8
# Thresholds in standard errors beyond which only the noise of the standard error counts, to a part in a million, and
# the series of the non-central t distribution no longer converge.
FAR_OUT = 1e3


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


@dataclass(frozen=True, kw_only=True)
class Noise:
    """A part of a difference's variance, as estimated, and the degrees of freedom of the estimate."""

    variance: float
    freedom: float

    def half_width(self, error: float) -> float:
        """Of an interval that misses with probability `error` where this is all the noise."""
        return -float(special.stdtrit(self.freedom, error / 2)) * math.sqrt(self.variance)


NO_NOISE = Noise(variance=0.0, freedom=1.0)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A method's bits per byte minus the baseline's.

    Attributes:
        mean: over the pairs.
        runs: noise of the runs: seeds, trunks, or rounding where there is a single pair; None where it is unknown.
        text: noise of the validation text that `runs` does not hold.
        n: units of the runs.
    """

    mean: float
    runs: Noise | None
    text: Noise
    n: int

    def half_width(self, error: float = 1 - CONFIDENCE) -> float:
        """Of the interval that misses the true difference with probability `error` at most."""
        return math.hypot(*(part.half_width(error) for part in self._parts))

    @property
    def interval(self) -> Interval:
        """At 95 %."""
        return Interval(mean=self.mean, half_width=self.half_width(), n=self.n)

    @property
    def standard_error(self) -> float:
        """Of the mean."""
        return math.sqrt(math.fsum(part.variance for part in self._parts))

    @property
    def p_value(self) -> float:
        """The error of the interval that just reaches zero."""
        if not self.standard_error:
            return float(self.mean == 0)
        low, high = 1e-15, 1 - 1e-9

        def reach(error: float) -> float:
            return self.half_width(error) - abs(self.mean)

        if reach(low) <= 0:
            return low
        return high if reach(high) >= 0 else _root(reach, low, high)

    def detectable(self, error: float = 1 - CONFIDENCE) -> float:
        """The smallest true difference that intervals of this width tell from zero in 80 % of comparisons, in bits per
        byte: from the non-central t distribution, with Satterthwaite's degrees of freedom for the standard error.

        Args:
            error: at which they are judged.
        """
        scale = self.standard_error
        if not scale:
            return 0.0
        freedom = scale**4 / math.fsum(part.variance**2 / part.freedom for part in self._parts)
        threshold = self.half_width(error) / scale
        if threshold > FAR_OUT:
            return scale * threshold * math.sqrt(float(special.chdtri(freedom, 1 - POWER)) / freedom)

        def missing(shift: float) -> float:
            return POWER - 1 + float(special.nctdtr(freedom, shift, threshold))

        return scale * _root(missing, 0.0, 4 * threshold + 4)

    def with_more(self, units: int) -> "Difference":
        """What as many more seeds (trunks, where there are several) would leave of the noise.

        Raises:
            ValueError: for a single pair, whose spread over seeds is unknown.
        """
        if self.n < 2 or self.runs is None:
            raise ValueError("with_more needs the spread of at least two units, this difference has one")
        n = self.n + units
        return replace(self, runs=Noise(variance=self.runs.variance * self.n / n, freedom=n - 1), n=n)

    @property
    def _parts(self) -> tuple[Noise, ...]:
        return (self.text,) if self.runs is None else (self.runs, self.text)


@dataclass(frozen=True, kw_only=True)
class Text:
    """The validation text as its sections: UTF-8 bytes and document of each."""

    n_bytes_S: np.ndarray
    document_S: np.ndarray


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where it is zero; it has another sign at either end."""
    from scipy import optimize

    return optimize.root_scalar(function, bracket=(low, high), xtol=1e-12).root


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
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
    return Interval(mean=mean, half_width=student_quantile(n - 1, confidence) * math.sqrt(variance / n), n=n)


def student_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """Standard errors in half of an interval, by Student's t: 12.7 with one degree of freedom, 2.0 with many."""
    return float(special.stdtrit(freedom, (1 + confidence) / 2))


def units(values: Mapping[RunKey, float]) -> list[float]:
    """The independent units among runs: the runs themselves on one trunk, the trunk means on several."""
    return [group[0] if len(group) == 1 else math.fsum(group) / len(group) for group in _grouped(values)]


def mean_interval(values: Mapping[RunKey, float], confidence: float = CONFIDENCE) -> Interval:
    """Mean over runs with its interval; the unit is the branch seed on one trunk, the trunk on several."""
    return t_interval(units(values), confidence)


def paired_difference(
    method: Mapping[RunKey, np.ndarray],
    baseline: Mapping[RunKey, np.ndarray],
    text: Text,
    twins: Mapping[RunKey, np.ndarray] | None = None,
) -> Difference:
    """Mean of method - baseline over the runs that both have, paired by trunk seed, branch seed and section.

    The two runs of a pair share their data order and their text, whose noise therefore cancels in the difference.

    Args:
        method, baseline: bits of every section by run, [S].
        text: that they were measured on.
        twins: the same of runs that differ from the baseline's by rounding; used where there is a single pair.

    Raises:
        ValueError: where no pair exists.
    """
    pairs = method.keys() & baseline.keys()
    if not pairs:
        raise ValueError(f"no common seeds to pair: the method has {sorted(method)}, the baseline {sorted(baseline)}")
    n_bytes = text.n_bytes_S.sum()
    bits_US = np.stack(
        [np.mean(group, axis=0) for group in _grouped({key: method[key] - baseline[key] for key in pairs})]
    )
    means_U, n = bits_US.sum(axis=1) / n_bytes, len(bits_US)
    runs, known = None, twins or {}
    if n > 1:
        runs = Noise(variance=float(means_U.var(ddof=1)) / n, freedom=n - 1)
    elif rounding := [
        float((known[key] - baseline[key]).sum() / n_bytes) for key in sorted(known.keys() & baseline.keys())
    ]:
        # The true mean is zero, so none is taken off, and each pair is a degree of freedom.
        runs = Noise(variance=math.fsum(value**2 for value in rounding) / len(rounding), freedom=len(rounding))
    levels = (np.arange(len(text.document_S)), text.document_S)
    noise = max((text_noise(bits_US, text.n_bytes_S, group_S) for group_S in levels), key=lambda part: part.variance)
    return Difference(mean=float(means_U.mean()), runs=runs, text=noise, n=n)


def text_noise(bits_US: np.ndarray, n_bytes_S: np.ndarray, group_S: np.ndarray) -> Noise:
    """The variance of the mean difference over texts, without what changes from run to run.

    That of a ratio of sums, by its linear form; its degrees of freedom are those of groups whose deviations grow with
    their bytes.

    Args:
        bits_US: differences.
        n_bytes_S: of the sections.
        group_S: number of the group that each lies in; groups are the independent draws.
    """
    n_groups, n_units = int(group_S.max()) + 1, len(bits_US)
    if n_groups < 2:
        return NO_NOISE
    bytes_G = np.bincount(group_S, weights=n_bytes_S, minlength=n_groups)
    bits_UG = np.stack([np.bincount(group_S, weights=bits_S, minlength=n_groups) for bits_S in bits_US])
    deviation_UG = bits_UG - bits_UG.sum(axis=1, keepdims=True) * bytes_G / bytes_G.sum()
    deviation_G = deviation_UG.mean(axis=0)
    squares = float((deviation_G**2).sum())
    if n_units > 1:
        squares -= float(((deviation_UG - deviation_G) ** 2).sum()) / (n_units * (n_units - 1))
    effective = (bytes_G**2).sum() ** 2 / (bytes_G**4).sum()
    variance = n_groups / (n_groups - 1) * max(squares, 0.0) / bytes_G.sum() ** 2
    return Noise(variance=float(variance), freedom=max(float(effective) - 1, 1.0))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p values: judged at 5 %, some false verdict comes up in 5 % of tables at most, however many the methods
    (Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6, 1979)."""
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return adjusted


def _grouped(values: Mapping[RunKey, "float | np.ndarray"]) -> list[list]:
    """The values of each independent unit."""
    by_trunk: dict[int, list] = {}
    # Sorted, so that the order in which runs finished plays no part.
    for (trunk, _), value in sorted(values.items(), key=lambda item: item[0]):
        by_trunk.setdefault(trunk, []).append(value)
    groups = list(by_trunk.values())
    return [[value] for value in groups[0]] if len(groups) == 1 else groups

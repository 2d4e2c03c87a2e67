"""The gradient-noise scale (McCandlish 2018, arXiv 1812.06162): how many rows a batch needs until its gradient is more
signal than noise.

The simple noise scale is B = tr(S) / |G|^2: S the covariance of one row's gradient, G the gradient over all rows. Both
are estimated without bias from the same gradients in small batches of b rows and in the large one that n of them make:

    |G|^2 = (n b |g_large|^2 - b mean |g_small|^2) / (n b - b)
    tr(S) = (mean |g_small|^2 - |g_large|^2) / (1 / b - 1 / n b)

A ratio of unbiased estimates is not unbiased itself, but its bias falls with the number of rows; the interval is a
jackknife over groups of small batches.

Legend: K groups, P parameters.
"""

import dataclasses
import math
from collections.abc import Iterable

import torch
from scipy import special
from torch import Tensor

LEVEL = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseScale:
    """What the gradients say.

    Attributes:
        rows_small, rows_large: of the two batches.
        gradient_square: |G|^2.
        variance: tr(S), of one row's gradient.
        rows: the noise scale; infinite where |G|^2 is not told from zero.
        low_95, high_95: its interval.
    """

    rows_small: int
    rows_large: int
    gradient_square: float
    variance: float
    rows: float
    low_95: float
    high_95: float


class Gradients:
    """Adds up gradients of small batches, by group.

    Args:
        groups: of the jackknife; small batches fall to them in turn.
    """

    def __init__(self, groups: int) -> None:
        self.sum_KP: list[Tensor | None] = [None] * groups
        self.squares_K, self.count_K = [0.0] * groups, [0] * groups
        self.seen = 0

    def add(self, gradient_P: Tensor) -> None:
        """One small batch's gradient, the mean over its rows."""
        group = self.seen % len(self.sum_KP)
        self.seen += 1
        before_P = self.sum_KP[group]
        self.sum_KP[group] = gradient_P.clone() if before_P is None else before_P.add_(gradient_P)
        self.squares_K[group] += float(gradient_P.double().square().sum())
        self.count_K[group] += 1

    def noise_scale(self, rows: int) -> NoiseScale:
        """Of small batches of so many rows.

        Raises:
            ValueError: for fewer than two small batches in a group.
        """
        if min(self.count_K) < 2:
            raise ValueError(f"{self.seen} small batches in {len(self.count_K)} groups; each needs at least 2")
        every = range(len(self.sum_KP))
        sums_KP = [sum_P for sum_P in self.sum_KP if sum_P is not None]
        gram_KK = [[float(one.double() @ other.double()) for other in sums_KP] for one in sums_KP]

        def estimate(groups: Iterable[int]) -> tuple[float, float]:
            """|G|^2 and tr(S) of some groups."""
            groups = list(groups)
            n = sum(self.count_K[group] for group in groups)
            small = sum(self.squares_K[group] for group in groups) / n
            large = sum(gram_KK[one][other] for one in groups for other in groups) / n**2
            return (n * large - small) / (n - 1), (small - large) * rows / (1 - 1 / n)

        square, variance = estimate(every)
        without = [estimate(group for group in every if group != left) for left in every]
        low, high = 0.0, math.inf
        if square > 0 and all(part > 0 for part, _ in without):
            logs = [math.log(noise / part) for part, noise in without]
            mean = sum(logs) / len(logs)
            spread = math.sqrt((len(logs) - 1) / len(logs) * sum((each - mean) ** 2 for each in logs))
            reach = math.exp(float(special.stdtrit(len(logs) - 1, (1 + LEVEL) / 2)) * spread)
            low, high = variance / square / reach, variance / square * reach
        return NoiseScale(
            rows_small=rows,
            rows_large=rows * self.seen,
            gradient_square=square,
            variance=variance,
            rows=variance / square if square > 0 else math.inf,
            low_95=low,
            high_95=high,
        )


def gradient_of(parameters: Iterable[Tensor]) -> Tensor:
    """All gradients in one vector [P], fp32; what has none counts as zero."""
    return torch.cat(
        [(torch.zeros_like(each) if each.grad is None else each.grad).detach().float().flatten() for each in parameters]
    )

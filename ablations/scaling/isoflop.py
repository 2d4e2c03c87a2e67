"""Loss against size at equal FLOPs: points near a budget, the law's curve through them, and the points' own parabola in
log size, whose minimum is the best size without a law (the second approach of Hoffmann 2022, arXiv 2203.15556).

Legend: P points.
"""

import dataclasses
import math

import numpy as np

from ablations.scaling.forms import ACTIVE, TOKENS, TOTAL, Fit, Law
from ablations.scaling.points import FLOPS_PER_PARAMETER, Points

BUDGETS = 6
# Points of a budget lie within this factor of it.
NEAR = 1.25
CURVE = 60
# Of different sizes; by fewer points a parabola is no finding.
LEAST = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class IsoflopRow:
    """One place of one curve.

    Attributes:
        flops: 6 params tokens, of the budget.
        kind: "point" (measured, near the budget), "law" or "parabola"; "law optimum" and "parabola optimum" are where
            these are least.
    """

    flops: float
    kind: str
    params: float
    tokens: float
    loss: float


def iso_size(law: Law) -> str | None:
    """The one size that a law counts beside tokens; None for laws of other variables."""
    size = next((name for name in (ACTIVE, TOTAL) if name in law.variables), None)
    return size if size and set(law.variables) == {size, TOKENS} else None


def isoflops(points: Points, fit: Fit, size: str) -> list[IsoflopRow]:
    """Curves of budgets that are spread evenly over the points'.

    Args:
        size: of `iso_size`.
    """
    size_P, tokens_P = points.variables[size], points.variables[TOKENS]
    flops_P = FLOPS_PER_PARAMETER * size_P * tokens_P
    rows = []
    for budget in np.geomspace(*np.quantile(flops_P, (0.05, 0.95)), BUDGETS):
        near_P = np.abs(np.log(flops_P / budget)) < math.log(NEAR)
        of = size_P[near_P] if near_P.any() else size_P
        sizes = np.geomspace(of.min() / 2, of.max() * 2, CURVE)

        law = fit.predict({size: sizes, TOKENS: budget / (FLOPS_PER_PARAMETER * sizes)})
        best = int(law.argmin())
        own = [
            *(("point", params, loss) for params, loss in zip(size_P[near_P], points.loss_P[near_P])),
            *(("law", params, loss) for params, loss in zip(sizes, law)),
            # At an end of the curve the law falls on beyond it.
            *([("law optimum", sizes[best], law[best])] if 0 < best < CURVE - 1 else []),
            *_parabola(size_P[near_P], points.loss_P[near_P]),
        ]
        rows += [
            IsoflopRow(
                flops=float(f"{budget:.4g}"),
                kind=kind,
                params=float(f"{params:.6g}"),
                tokens=float(f"{budget / (FLOPS_PER_PARAMETER * params):.6g}"),
                loss=float(f"{loss:.6g}"),
            )
            for kind, params, loss in own
        ]
    return rows


def _parabola(size_P: np.ndarray, loss_P: np.ndarray) -> list[tuple[str, float, float]]:
    """Through the points of a budget, over their sizes; none of too few sizes, or without a minimum among them."""
    if len(np.unique(np.round(np.log(size_P), 2))) < LEAST:
        return []
    log_P = np.log(size_P)
    a, b, c = np.polyfit(log_P - log_P.mean(), loss_P, 2)
    best = log_P.mean() - b / (2 * a)
    if a <= 0 or not log_P.min() < best < log_P.max():
        return []
    logs = np.linspace(log_P.min(), log_P.max(), CURVE)
    curve = np.polyval((a, b, c), logs - log_P.mean())
    return [
        *(("parabola", math.exp(log), float(loss)) for log, loss in zip(logs, curve)),
        ("parabola optimum", math.exp(best), float(np.polyval((a, b, c), best - log_P.mean()))),
    ]

"""How exactly budgets hold: the mean number of experts per token that was asked for, and what was used, in training and
at inference.

In training a controller holds it, step by step; at inference thresholds calibrated on text that is neither trained on
nor measured do, at the method's own number and, with the same weights in memory, at every other. Computed from the runs
of a comparison.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

from ablations.comparison.records import Records
from foundation.tables import write_table

BUDGETS_FILE = "budgets.csv"
# Attributes of `BudgetRow`.
BUDGET_COLUMNS = (
    "method",
    "trunk_seed",
    "branch_seed",
    "asked",
    "trained",
    "trained_error_percent",
    "used",
    "used_error_percent",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetRow:
    """One branch at one budget; means per token and layer.

    Attributes:
        method, trunk_seed, branch_seed: which branch; the seed is the one it is paired by.
        asked: what was asked for.
        trained: over the last steps of training, None for a budget that it was not trained at.
        used: on validation text: all of it at the method's own budget, batches evenly spaced through it at others.
    """

    method: str
    trunk_seed: int
    branch_seed: int
    asked: float
    trained: float | None
    used: float

    @property
    def trained_error_percent(self) -> float | None:
        """How far off what was asked the mean in training is."""
        return None if self.trained is None else 100 * (self.trained / self.asked - 1)

    @property
    def used_error_percent(self) -> float:
        """How far off what was asked the mean at inference is."""
        return 100 * (self.used / self.asked - 1)


def budget_rows(records: Records, *, last_steps: int) -> list[BudgetRow]:
    """Every finished branch, first at the budget it was trained for, then at the others.

    Args:
        last_steps: of training, over which the mean in training is taken; single steps scatter with their batch.
    """
    # A slice of the last 0 steps holds all of them.
    assert last_steps >= 1
    rows = []
    for method in records.methods:
        for (trunk_seed, branch_seed), result in records.results[method].items():
            trained = statistics.fmean(records.branches[method][trunk_seed, branch_seed].experts[-last_steps:])
            # The own budget was measured on the whole validation text; the same number among the others, on a few
            # batches of it, would only be a worse measurement of the same thing.
            measured = [(result.asked_experts, trained, result.mean_experts)]
            measured += [
                (point.asked_experts, None, point.mean_experts)
                for point in result.budgets
                if point.asked_experts != result.asked_experts
            ]
            rows += [
                BudgetRow(
                    method=method,
                    trunk_seed=trunk_seed,
                    branch_seed=branch_seed,
                    asked=asked,
                    trained=in_training,
                    used=used,
                )
                for asked, in_training, used in measured
            ]
    return rows


def budget_text(rows: Sequence[BudgetRow], *, last_steps: int) -> str:
    """One line per branch: its own budget in training and at inference, and the worst of the others."""
    lines = [
        f"{'method':<20} {'seed':>4} {'asked':>6} {'in training':>12} {'error':>8} {'at inference':>13} {'error':>8}  "
        " worst other budget"
    ]
    for own in (row for row in rows if row.trained is not None):
        others = [
            row for row in rows if row.trained is None and (row.method, row.trunk_seed, row.branch_seed) == _run(own)
        ]
        worst = max(others, key=lambda row: abs(row.used_error_percent), default=None)
        other = (
            "" if worst is None else f"asked {worst.asked:g}, used {worst.used:.3f} ({worst.used_error_percent:+.2f} %)"
        )
        lines.append(
            f"{own.method:<20} {own.branch_seed:>4} {own.asked:>6g} {own.trained:>12.3f}"
            f" {own.trained_error_percent:>+7.2f}% {own.used:>13.3f} {own.used_error_percent:>+7.2f}%   {other}"
        )
    return "\n".join(
        [
            *lines,
            "",
            (
                f"in training: mean of the last {last_steps} steps; at inference: validation text, thresholds set on"
                " other text."
            ),
        ]
    )


def write_budgets(rows: Sequence[BudgetRow], path: Path) -> None:
    """All rows in full precision, as csv."""
    write_table(path, BUDGET_COLUMNS, ([getattr(row, column) for column in BUDGET_COLUMNS] for row in rows))


def _run(row: BudgetRow) -> tuple[str, int, int]:
    return row.method, row.trunk_seed, row.branch_seed

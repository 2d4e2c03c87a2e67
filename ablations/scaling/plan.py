"""`python -m ablations scaling plan`: sizes and tokens of least loss for a number of FLOPs, under a fitted law.

Legend: R bootstrap draws, S sizes.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np

from ablations.report.table import with_unit
from ablations.scaling.forms import ACTIVE, TOKENS, TOTAL, Law, find_law, predict
from ablations.scaling.options import PlanOptions
from ablations.scaling.points import FLOPS_PER_PARAMETER, read_table
from foundation.command import refuse_unwritable
from foundation.tables import write_rows

FIT_FILE, DRAWS_FILE = "fit.csv", "draws.csv"
SMALLEST_SIZE, LARGEST_SIZE, SIZES = 1e3, 1e14, 2201


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanRow:
    """The best model of a number of FLOPs; `_low` and `_high` are the middle 95 % of the bootstrap draws.

    Attributes:
        flops: of training, 6 x parameters x tokens.
        params: of the kind that the law counts.
        tokens_per_param: tokens / params.
        loss: that the law expects.
        params_from, params_to: sizes whose expected loss is within 0.1 % of the best: where it hardly matters.
        batch_tokens: that cost --waste more tokens than small batches; NaN without --noise, as the next.
        steps: tokens / batch_tokens.
    """

    flops: float
    params: float
    params_low: float
    params_high: float
    tokens: float
    tokens_low: float
    tokens_high: float
    tokens_per_param: float
    loss: float
    loss_low: float
    loss_high: float
    params_from: float
    params_to: float
    batch_tokens: float = math.nan
    steps: float = math.nan


def read_fit(folder: Path) -> tuple[Law, np.ndarray, np.ndarray]:
    """A law with its values and its bootstrap draws [R, V], in the order of `Law.parameters`.

    Raises:
        ValueError: for a folder that `fit --out` did not write.
    """
    for name in (FIT_FILE, DRAWS_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: no {name}; name a folder that `python -m ablations scaling fit --out` wrote")
    table, draws = read_table(folder / FIT_FILE), read_table(folder / DRAWS_FILE)
    law = find_law(table.column("law")[0])
    named = dict(zip(table.column("parameter"), table.column("value")))
    if missing := [name for name in law.parameters if name not in named]:
        raise ValueError(f"{folder / FIT_FILE}: no row for {', '.join(missing)}")
    values_V = np.array([float(named[name]) for name in law.parameters])
    draws_RV = np.array([[float(cell) for cell in draws.column(name)] for name in law.parameters]).T
    return law, values_V, draws_RV


def best_sizes(law: Law, values_RV: np.ndarray, flops: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The size of least loss for each row of parameters.

    Returns:
        Sizes [R], their losses [R], and the losses of all sizes that were tried, [R, S] (`size_grid`).
    """
    size_S = size_grid()
    size = size_name(law)
    variables = {size: size_S, TOKENS: flops / (FLOPS_PER_PARAMETER * size_S)}
    loss_RS = np.stack([predict(law, values_V, variables) for values_V in values_RV])
    best_R = loss_RS.argmin(1)
    return size_S[best_R], loss_RS.min(1), loss_RS


def size_grid() -> np.ndarray:
    """Sizes in steps of 1.2 %."""
    return np.geomspace(SMALLEST_SIZE, LARGEST_SIZE, SIZES)


def size_name(law: Law) -> str:
    """The one size that a law counts.

    Raises:
        ValueError: for a law of other variables, whose optimum FLOPs alone do not give.
    """
    sizes = [name for name in (ACTIVE, TOTAL) if name in law.variables]
    if len(sizes) != 1 or set(law.variables) != {sizes[0], TOKENS}:
        raise ValueError(
            f"the law {law.name!r} is one of {', '.join(law.variables)}; a plan needs one of a single size and tokens:"
            " fit with --law total or --law active"
        )
    return sizes[0]


def read_noise(path: Path) -> tuple[float, float]:
    """The noise scale that `noise --csv` wrote, in tokens, and the loss that it was measured at.

    Raises:
        ValueError: for another file, several rows, or a scale that was not measured.
    """
    table = read_table(path)
    if len(table.rows) > 1:
        raise ValueError(f"{path}: {len(table.rows)} rows; --noise takes the table of one model")
    return float(table.numbers("noise_tokens")[0]), float(table.numbers("loss")[0])


def plan_command(options: PlanOptions) -> list[PlanRow]:
    """Prints one line per number of FLOPs.

    Raises:
        ValueError: see `read_fit`, `size_name` and `read_noise`.
    """
    refuse_unwritable("--csv", options.csv)
    law, values_V, draws_RV = read_fit(options.fit)
    rate = options.flops_per_second or 1.0
    budgets = options.flops or tuple(seconds * rate for seconds in options.seconds)
    rows = [plan_row(law, values_V, draws_RV, flops) for flops in budgets]
    batch, measured_at = math.nan, math.nan
    if options.noise is not None:
        noise, measured_at = read_noise(options.noise)
        batch = options.waste * noise
        rows = [dataclasses.replace(row, batch_tokens=batch, steps=row.tokens / batch) for row in rows]
    print(f"{law.text}\nleast loss for FLOPs = 6 {size_name(law)} tokens; in brackets the middle 95 % of the draws")
    for row in rows:
        print(
            f"{row.flops:.3g} FLOP: {with_unit(row.params)}parameters"
            f" ({with_unit(row.params_low).strip()} to {with_unit(row.params_high).strip()}),"
            f" {with_unit(row.tokens)}tokens ({row.tokens_per_param:.3g} per parameter),"
            f" loss {row.loss:.4f} ({row.loss_low:.4f} to {row.loss_high:.4f});"
            f" within 0.1 % from {with_unit(row.params_from).strip()} to {with_unit(row.params_to).strip()}"
            + (f"; {row.steps:,.0f} steps of {batch:,.0f} tokens" if options.noise is not None else "")
        )
    if options.noise is not None:
        print(
            f"batches cost {options.waste:.0%} more tokens than the least, by the noise scale of"
            f" {batch / options.waste:,.0f} tokens; it was measured at a loss of {measured_at:.4f} nats per token and"
            " is larger where the loss is lower"
        )
    if options.csv is not None:
        write_rows(options.csv, PlanRow, rows)
    return rows


def plan_row(law: Law, values_V: np.ndarray, draws_RV: np.ndarray, flops: float) -> PlanRow:
    """The plan of one number of FLOPs."""
    params, loss, loss_1S = (found[0] for found in best_sizes(law, values_V[None], flops))
    near_S = size_grid()[loss_1S < 1.001 * loss]
    drawn_R, drawn_loss_R, _ = best_sizes(law, draws_RV, flops)
    low, high = np.quantile(drawn_R, (0.025, 0.975))
    loss_low, loss_high = np.quantile(drawn_loss_R, (0.025, 0.975))
    per_size = flops / FLOPS_PER_PARAMETER
    return PlanRow(
        flops=flops,
        params=float(params),
        params_low=float(low),
        params_high=float(high),
        tokens=float(per_size / params),
        tokens_low=float(per_size / high),
        tokens_high=float(per_size / low),
        tokens_per_param=float(per_size / params**2),
        loss=float(loss),
        loss_low=float(loss_low),
        loss_high=float(loss_high),
        params_from=float(near_S.min()),
        params_to=float(near_S.max()),
    )

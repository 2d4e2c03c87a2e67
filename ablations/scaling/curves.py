"""`python -m ablations scaling curves`: a law of the loss at every step, fitted to curves of one model and tested on
curves under other schedules."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ablations.scaling.figure import draw_curves
from ablations.scaling.options import CurvesOptions
from ablations.scaling.points import read_table
from ablations.scaling.schedule_laws import SCHEDULE_LAWS, Curve, ScheduleFit, ScheduleLaw, fit_curves
from ablations.scaling.schedules import from_rows
from foundation.command import refuse_unwritable
from foundation.serialize import nearest
from foundation.tables import write_rows, write_table

VALUES_FILE, ERRORS_FILE, CURVES_FILE, FIGURE_FILE = "values.csv", "errors.csv", "curves.csv", "curves.png"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ErrorRow:
    """How far a law is from one curve.

    Attributes:
        part: "fit" or "test".
        mean_absolute: error over the rows, in the unit of the loss, and `largest` of it.
        final: prediction - loss in the last row.
        r_squared: share of the curve's variance that the law explains.
    """

    curve: str
    part: str
    rows: int
    mean_absolute: float
    largest: float
    final: float
    r_squared: float


def curves_command(options: CurvesOptions) -> list[ErrorRow]:
    """Fits, prints and writes.

    Raises:
        ValueError: see `read_curve`; and where the curves' rate never falls, which no law of falls can be fitted to.
    """
    refuse_unwritable("--out", options.out, folder=True)
    law = find_schedule_law(options.law)
    every = read_curves((*options.curves, *options.test), options)
    fitted = every[: len(options.curves)]
    if not any(len(curve.schedule.falls(curve.step_P).size_J) for curve in fitted):
        raise ValueError(
            "the learning rate falls in none of the curves to fit: what a fall gains cannot be seen; add one of a"
            " cosine, of WSD, or with a step"
        )
    fit = fit_curves(fitted, law, options.delta)
    rows = [error_row(fit, curve, "fit" if curve in fitted else "test") for curve in every]
    print("\n".join([", ".join(f"{name} {value:.5g}" for name, value in fit.values.items()), *error_lines(rows)]))
    if options.out is not None:
        write_table(options.out / VALUES_FILE, ("law", "parameter", "value"), value_cells(fit))
        write_rows(options.out / ERRORS_FILE, ErrorRow, rows)
        write_curves(options.out / CURVES_FILE, fit, every)
        draw_curves([(curve, fit.predict(curve)) for curve in every], len(fitted), options.out / FIGURE_FILE)
        print(f"\ncurves: {options.out}")
    return rows


def find_schedule_law(name: str) -> ScheduleLaw:
    """A schedule law by its name.

    Raises:
        ValueError: for an unknown one, with the nearest legal name.
    """
    if name not in SCHEDULE_LAWS:
        raise ValueError(f"--law {name}: no such law; {nearest(name, SCHEDULE_LAWS)}")
    return SCHEDULE_LAWS[name]


def read_curves(paths: Sequence[Path], options: CurvesOptions) -> list[Curve]:
    """The curves of csv files, their rates in units of the highest of all.

    Raises:
        ValueError: for a missing column (of learning rates, say), a cell that is no positive number, steps that do not
            rise, or fewer than 10 rows.
    """
    tables = []
    for path in paths:
        table = read_table(path)
        if options.rate_column not in table.rows[0]:
            raise ValueError(
                f"{path}: no column {options.rate_column!r} of learning rates, without which no law of the schedule can"
                f" be fitted; it has {', '.join(table.rows[0])} (--rate-column)"
            )
        step_P = table.numbers(options.step_column)
        rate_P = table.numbers(options.rate_column, zero=True)
        loss_P = table.numbers(options.loss_column)
        if len(step_P) < 10:
            raise ValueError(f"{path}: {len(step_P)} rows; a curve needs at least 10")
        if (np.diff(step_P) <= 0).any():
            line = table.lines[int(np.argmax(np.diff(step_P) <= 0)) + 1]
            raise ValueError(f"{path}, line {line}, column {options.step_column}: steps must rise")
        tables.append((path.stem, step_P, rate_P, loss_P))
    reference = max(float(rate_P.max()) for _, _, rate_P, _ in tables)
    return [
        Curve(name=name, step_P=step_P, loss_P=loss_P, schedule=from_rows(step_P, rate_P, options.warmup, reference))
        for name, step_P, rate_P, loss_P in tables
    ]


def error_row(fit: ScheduleFit, curve: Curve, part: str) -> ErrorRow:
    """The errors of one curve."""
    error_P = fit.predict(curve) - curve.loss_P
    return ErrorRow(
        curve=curve.name,
        part=part,
        rows=len(error_P),
        mean_absolute=float(np.abs(error_P).mean()),
        largest=float(np.abs(error_P).max()),
        final=float(error_P[-1]),
        r_squared=float(1 - (error_P**2).sum() / ((curve.loss_P - curve.loss_P.mean()) ** 2).sum()),
    )


def error_lines(rows: Sequence[ErrorRow]) -> list[str]:
    """One line per curve, and the means of each part: over curves, and over rows."""
    lines = [f"{'':<28}{'':<6}{'mean |error|':>13}{'largest':>10}{'final':>10}{'R2':>9}"]
    lines += [
        f"{row.curve:<28}{row.part:<6}{row.mean_absolute:>13.5f}{row.largest:>10.5f}{row.final:>+10.5f}"
        f"{row.r_squared:>9.5f}"
        for row in rows
    ]
    for part in ("fit", "test"):
        if own := [row for row in rows if row.part == part]:
            mean = sum(row.mean_absolute for row in own) / len(own)
            pooled = sum(row.mean_absolute * row.rows for row in own) / sum(row.rows for row in own)
            r_squared = sum(row.r_squared for row in own) / len(own)
            lines.append(
                f"{part}: mean |error| {mean:.5f} over {len(own)} curves ({pooled:.5f} over all rows),"
                f" R2 {r_squared:.5f}"
            )
    return lines


def value_cells(fit: ScheduleFit) -> list[tuple[str, str, float]]:
    """Rows of `values.csv`."""
    return [(fit.law.name, name, value) for name, value in fit.values.items()]


def write_curves(path: Path, fit: ScheduleFit, curves: Sequence[Curve]) -> None:
    """Every row of every curve with its prediction."""
    cells = (
        (curve.name, f"{step:g}", f"{loss:.5f}", f"{predicted:.5f}")
        for curve in curves
        for step, loss, predicted in zip(curve.step_P, curve.loss_P, fit.predict(curve))
    )
    write_table(path, ("curve", "step", "loss", "predicted"), cells)

"""`python -m ablations scaling forms`: several laws on the points of one ladder, told apart by what they say of runs
that they were not fitted to.

Two errors are compared: of the held-out runs (column `held_out`), which are larger, and of each fitted run predicted
from all others. What a law's points leave open is said beside it, and laws that the points cannot tell at all are
named with the reason.

Legend: P points, V parameters.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ablations.scaling.figure import draw_form_residuals
from ablations.scaling.forms import LAWS, Fit, Law, find_law
from ablations.scaling.intervals import bootstrap, identifiability, percentiles, profile
from ablations.scaling.ladder import ComparedRow, PointRow, compared
from ablations.scaling.ladder_intervals import DELTA, points_of, predictions, variables_of
from ablations.scaling.options import FormsOptions
from ablations.scaling.points import Points, check_enough, read_table
from ablations.scaling.variable_projection import fit_by_projection
from foundation.command import refuse_unwritable
from foundation.files import write_text
from foundation.tables import write_rows

FORMS_FILE, PARAMETERS_FILE, HELD_FILE, RESIDUALS_FILE, FIGURE_FILE, REPORT_FILE = (
    "forms.csv",
    "parameters.csv",
    "held_out.csv",
    "residuals.csv",
    "forms.png",
    "forms.txt",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FormRow:
    """A law in one row, errors in per cent of the loss (root mean squares).

    Attributes:
        fitted: error of the points that it was fitted to, by degrees of freedom.
        left_out: of each of them, predicted from the others.
        held_out: of the held-out points; NaN where there are none.
        inside: held-out points inside their 90 % intervals, of `held`.
        open: parameters that the points do not identify, by name.
    """

    law: str
    parameters: int
    points: int
    fitted: float
    left_out: float
    held_out: float
    inside: int
    held: int
    open: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class FormParameterRow:
    """A parameter of a law with its 95 % intervals: percentiles of a bootstrap, and for E and exponents a profile
    likelihood (NaN for others)."""

    law: str
    parameter: str
    value: float
    bootstrap_low: float
    bootstrap_high: float
    profile_low: float
    profile_high: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResidualRow:
    """A run under a law: log of loss over law, in per cent."""

    law: str
    run: str
    held_out: int
    loss: float
    residual_percent: float


def forms_command(options: FormsOptions) -> list[FormRow]:
    """Fits, compares, prints and writes.

    Raises:
        ValueError: for a table that is no ladder's, an unknown law, or points that no law can be fitted to.
    """
    refuse_unwritable("--out", options.out, folder=True)
    laws = [find_law(name) for name in options.laws or LAWS]
    rows = read_runs(options.points)
    used = [row for row in rows if not row.held_out]
    held = [row for row in rows if row.held_out]
    forms, parameters, held_rows, residuals, lines = [], [], [], [], []
    for law in laws:
        points = points_of(used, law)
        try:
            check_enough(points, law, options.points)
        except ValueError as error:
            lines.append(f"{law.name}: not fitted. {error}")
            continue
        fit = fit_by_projection(points, law, DELTA)
        draws_RV = bootstrap(points, fit, resamples=options.resamples, delta=DELTA)
        own, open_names, said = parameter_rows(points, fit, draws_RV)
        predicted = predictions(used, held, law, options.resamples, draws_RV) if held else []
        own_held = [compared(row, run) for row, run in zip(predicted, held)]
        forms.append(form_row(points, fit, own_held, open_names))
        parameters, held_rows = [*parameters, *own], [*held_rows, *own_held]
        residuals += residual_rows(rows, fit)
        lines += [f"{law.name}: {law.text}   [{law.source}]", *(f"  {line}" for line in said)]
    if not forms:
        raise ValueError(f"{options.points}: no law can be fitted\n" + "\n".join(lines))
    text = "\n".join([*lines, "", *table_lines(forms)])
    print(text)
    if options.out is not None:
        write_rows(options.out / FORMS_FILE, FormRow, forms)
        write_rows(options.out / PARAMETERS_FILE, FormParameterRow, parameters)
        write_rows(options.out / HELD_FILE, ComparedRow, held_rows)
        write_rows(options.out / RESIDUALS_FILE, ResidualRow, residuals)
        write_text(options.out / REPORT_FILE, text + "\n")
        draw_form_residuals(residuals, options.out / FIGURE_FILE)
        print(f"\nforms: {options.out}")
    return forms


def read_runs(path: Path) -> list[PointRow]:
    """The points that `ladder` wrote.

    Raises:
        ValueError: for a missing column or a cell that is no positive number.
    """
    table = read_table(path)
    columns: dict[str, Sequence] = {}
    for field in dataclasses.fields(PointRow):
        if field.name == "seed" and "seed" not in table.rows[0]:
            continue
        if field.type is str:
            columns[field.name] = table.column(field.name)
        else:
            kind = int if field.type is int else float
            columns[field.name] = [
                kind(value) for value in table.numbers(field.name, zero=field.name in ("held_out", "seed"))
            ]
    return [PointRow(**dict(zip(columns, cells))) for cells in zip(*columns.values())]


def parameter_rows(points: Points, fit: Fit, draws_RV: np.ndarray) -> tuple[list[FormParameterRow], str, list[str]]:
    """Rows, names of what is not identified, and that in sentences."""
    profiles = {name: profile(points, fit, name, delta=DELTA) for name in ("E", *fit.law.exponents)}
    said = identifiability(points, fit, profiles)
    rows = []
    for index, name in enumerate(fit.law.parameters):
        drawn, profiled = percentiles(draws_RV[:, index]), profiles.get(name)
        rows.append(
            FormParameterRow(
                law=fit.law.name,
                parameter=name,
                value=fit.values[name],
                bootstrap_low=drawn.low,
                bootstrap_high=drawn.high,
                profile_low=profiled.low if profiled else math.nan,
                profile_high=profiled.high if profiled else math.nan,
            )
        )
    named = [line.split()[0] if "not identified" in line else line.split()[2] for line in said]
    return rows, " ".join(named), said


def form_row(points: Points, fit: Fit, held: Sequence[ComparedRow], open_names: str) -> FormRow:
    """A law's errors."""
    residual_P = np.log(points.loss_P / fit.predict(points.variables))
    freedom = len(points) - len(fit.law.parameters)
    return FormRow(
        law=fit.law.name,
        parameters=len(fit.law.parameters),
        points=len(points),
        fitted=100 * math.sqrt(float((residual_P**2).sum()) / freedom),
        left_out=100 * _root_mean(left_out(points, fit)),
        held_out=_root_mean([row.error_percent for row in held]),
        inside=sum(row.inside for row in held),
        held=len(held),
        open=open_names,
    )


def left_out(points: Points, fit: Fit) -> list[float]:
    """Log of prediction over truth of each point, from all others."""
    errors = []
    for index in range(len(points)):
        rest = points.subset(np.arange(len(points)) != index)
        refit = fit_by_projection(rest, fit.law, DELTA, start=fit)
        one = points.subset(np.arange(len(points)) == index)
        errors.append(float(np.log(refit.predict(one.variables) / one.loss_P)[0]))
    return errors


def residual_rows(rows: Sequence[PointRow], fit: Fit) -> list[ResidualRow]:
    """Every run, those held out too."""
    law: Law = fit.law
    return [
        ResidualRow(
            law=law.name,
            run=row.run,
            held_out=row.held_out,
            loss=row.loss,
            residual_percent=100 * math.log(row.loss / value),
        )
        for row, value in zip(rows, fit.predict(variables_of(rows, law)))
    ]


def table_lines(forms: Sequence[FormRow]) -> list[str]:
    """The laws, the best of what was held out first."""
    lines = [
        f"{'law':<12}{'parameters':>11}{'fitted %':>10}{'left out %':>12}{'held out %':>12}{'inside 90 %':>13}  open"
    ]
    for row in sorted(forms, key=lambda row: row.held_out if row.held else row.left_out):
        lines.append(
            f"{row.law:<12}{row.parameters:>11}{row.fitted:>10.2f}{row.left_out:>12.2f}{row.held_out:>12.2f}"
            f"{f'{row.inside} of {row.held}':>13}  {row.open}"
        )
    return lines


def _root_mean(errors: Sequence[float]) -> float:
    return math.sqrt(sum(error**2 for error in errors) / len(errors)) if errors else math.nan

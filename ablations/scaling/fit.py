"""`python -m ablations scaling fit`: a law fitted to points in two ways, with intervals, and what the points leave
open."""

import dataclasses
import math
from pathlib import Path

import numpy as np

from ablations.scaling.figure import draw_fit
from ablations.scaling.forms import Fit, Law, find_law
from ablations.scaling.huber import fit_by_huber
from ablations.scaling.intervals import Interval, bootstrap, identifiability, percentiles, profile
from ablations.scaling.isoflop import IsoflopRow, iso_size, isoflops
from ablations.scaling.options import FitOptions
from ablations.scaling.points import Points, check_enough, read_points, without_highest
from ablations.scaling.variable_projection import fit_by_projection
from foundation.command import refuse_unwritable
from foundation.files import write_text
from foundation.tables import write_rows, write_table

FIT_FILE, DRAWS_FILE, RESIDUALS_FILE, ISOFLOP_FILE, FIGURE_FILE, REPORT_FILE = (
    "fit.csv",
    "draws.csv",
    "residuals.csv",
    "isoflop.csv",
    "fit.png",
    "report.txt",
)
# Robust standard deviations of log loss beyond which a point is named.
FAR = 5.0
# By normal noise, the median size of a residual is this share of its standard deviation.
MEDIAN_SHARE = 0.6745


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterRow:
    """A row of `fit.csv`; NaN where an interval is not made.

    Attributes:
        law: its name, the same in all rows.
        parameter: name of the parameter, in the order of `Law.parameters`.
        value: by variable projection.
        cross_check: by L-BFGS from a grid.
        bootstrap_low, bootstrap_high, profile_low, profile_high: 95 %.
    """

    law: str
    parameter: str
    value: float
    cross_check: float
    bootstrap_low: float
    bootstrap_high: float
    profile_low: float
    profile_high: float


def fit_command(options: FitOptions) -> Fit:
    """Fits, prints and writes.

    Raises:
        ValueError: see `read_points`.
    """
    refuse_unwritable("--out", options.out, folder=True)
    law = find_law(options.law)
    points = read_points(options.points, options.columns, law)
    kept = without_highest(points, options.drop_highest)
    used = points.subset(kept)
    check_enough(used, law, options.points)
    fit = fit_by_projection(used, law, options.delta)
    check = fit_by_huber(used, law, options.delta)
    draws_RV = bootstrap(used, fit, resamples=options.resamples, delta=options.delta)
    profiles = {name: profile(used, fit, name, delta=options.delta) for name in ("E", *law.exponents)}
    rows = parameter_rows(fit, check, draws_RV, profiles)
    text = "\n".join(
        [
            f"{law.text}   [{law.source}]",
            f"{len(used)} of {len(points)} points"
            + (f", the {options.drop_highest} highest losses left out" if options.drop_highest else ", none left out"),
            *fit_lines(fit, check, rows),
            *identifiability(used, fit, profiles),
            *outlier_lines(used, fit, options.delta),
        ]
    )
    print(text)
    if options.out is not None:
        write_rows(options.out / FIT_FILE, ParameterRow, rows)
        write_table(options.out / DRAWS_FILE, law.parameters, draws_RV.tolist())
        write_residuals(options.out / RESIDUALS_FILE, points, fit, kept)
        if size := iso_size(law):
            write_rows(options.out / ISOFLOP_FILE, IsoflopRow, isoflops(used, fit, size))
        draw_fit(points, fit, kept, options.out / FIGURE_FILE)
        write_text(options.out / REPORT_FILE, text + "\n")
        print(f"\nfit: {options.out}")
    return fit


def parameter_rows(fit: Fit, check: Fit, draws_RV: np.ndarray, profiles: dict[str, Interval]) -> list[ParameterRow]:
    """One row per parameter of the law."""
    none = Interval(low=float("nan"), high=float("nan"))
    rows = []
    for index, name in enumerate(fit.law.parameters):
        resampled, profiled = percentiles(draws_RV[:, index]), profiles.get(name, none)
        rows.append(
            ParameterRow(
                law=fit.law.name,
                parameter=name,
                value=fit.values[name],
                cross_check=check.values[name],
                bootstrap_low=resampled.low,
                bootstrap_high=resampled.high,
                profile_low=profiled.low,
                profile_high=profiled.high,
            )
        )
    return rows


def fit_lines(fit: Fit, check: Fit, rows: list[ParameterRow]) -> list[str]:
    """The table, and whether the two ways agree."""
    lines = [f"{'':<3}{'projection':>12}{'L-BFGS':>12}{'bootstrap 95 %':>24}{'profile 95 %':>22}"]
    for row in rows:
        profiled = f"{row.profile_low:.4f} to {row.profile_high:.4f}" if math.isfinite(row.profile_low) else ""
        lines.append(
            f"{row.parameter:<3}{row.value:>12.5g}{row.cross_check:>12.5g}"
            f"{f'{row.bootstrap_low:.4g} to {row.bootstrap_high:.4g}':>24}{profiled:>22}"
        )
    ratio = max(fit.objective, 1e-300) / max(check.objective, 1e-300)
    agree = "the same minimum" if abs(ratio - 1) < 1e-3 else "DIFFERENT minima: trust neither before you know why"
    lines.append(f"objective {fit.objective:.8f} by projection, {check.objective:.8f} by L-BFGS: {agree}")
    return lines


def far_points(points: Points, fit: Fit) -> np.ndarray:
    """Which points lie beyond `FAR` robust standard deviations of the log residuals, bool [P]."""
    residual_P = np.log(points.loss_P / fit.predict(points.variables))
    deviation_P = np.abs(residual_P - np.median(residual_P))
    return deviation_P > FAR * max(float(np.median(deviation_P)) / MEDIAN_SHARE, 1e-12)


def outlier_lines(points: Points, fit: Fit, delta: float) -> list[str]:
    """Names points that the law is far from, and says how the fit moves without them. They stay in the fit."""
    far_P = far_points(points, fit)
    if not far_P.any():
        return [f"No point is further than {FAR:g} robust standard deviations from the law."]
    losses = ", ".join(f"{loss:.3f}" for loss in np.sort(points.loss_P[far_P])[::-1][:8])
    line = f"{far_P.sum()} points are further than {FAR:g} robust standard deviations from the law (losses {losses})"
    rest = points.subset(~far_P)
    if len(rest) <= len(fit.law.parameters):
        return [f"{line}; too few are left to say how the fit would move without them."]
    without = fit_by_projection(rest, fit.law, delta, start=fit)
    moved = ", ".join(
        f"{name} {fit.values[name]:.4f} -> {without.values[name]:.4f}" for name in ("E", *fit.law.exponents)
    )
    return [f"{line}; they stay in, and without them the fit moves: {moved}."]


def write_residuals(path: Path, points: Points, fit: Fit, kept: np.ndarray) -> None:
    """One row per point, those left out too."""
    law: Law = fit.law
    fit_P = fit.predict(points.variables)
    in_fit_P = np.isin(np.arange(len(points)), kept)
    columns = zip(
        *(points.variables[name].tolist() for name in law.variables),
        points.loss_P.tolist(),
        fit_P.tolist(),
        np.log(points.loss_P / fit_P).tolist(),
        in_fit_P.tolist(),
    )
    write_table(
        path,
        [*law.variables, "loss", "law", "log_residual", "in_fit"],
        ([f"{x:.6g}" if isinstance(x, float) else x for x in row] for row in columns),
    )

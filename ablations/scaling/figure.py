"""The figures of the scaling commands."""

import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ablations.report.drawing import BAND
from ablations.report.style import INK, MUTED, SERIES, STYLE, WIDTH
from ablations.scaling.forms import Fit
from ablations.scaling.isoflop import IsoflopRow, iso_size, isoflops
from ablations.scaling.points import Points
from ablations.scaling.schedule_laws import Curve
from foundation.files import write_bytes

PAPER = {**STYLE, "figure.facecolor": "white", "savefig.facecolor": "white"}
ISOFLOP_STYLES = {"law": "-", "parabola": "--", "point": ".", "law optimum": "v", "parabola optimum": "X"}


def save(figure: Figure, path: Path) -> None:
    """Writes a figure in the type that the suffix names."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=150, format=path.suffix[1:])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, drawn.getvalue())


def draw_fit(points: Points, fit: Fit, kept: np.ndarray, path: Path) -> None:
    """Loss against size at equal FLOPs (where the law is one of a size and tokens) above the residuals.

    Args:
        kept: indices of the points in the fit; the others are crosses.
    """
    size = iso_size(fit.law)
    with matplotlib.rc_context(PAPER):
        figure = Figure(figsize=(WIDTH * 1.3, 7.0 if size else 3.5), layout="constrained")
        panels = list(figure.subplots(2 if size else 1, 1, squeeze=False)[:, 0])
        if size:
            _isoflop(panels[0], isoflops(points.subset(kept), fit, size), size)
        _residuals(panels[-1], points, fit, kept, size or fit.law.variables[0])
        save(figure, path)


def _isoflop(axes: Axes, rows: Sequence[IsoflopRow], size: str) -> None:
    for budget, colour in zip(dict.fromkeys(row.flops for row in rows), SERIES):
        for kind, style in ISOFLOP_STYLES.items():
            own = [row for row in rows if (row.flops, row.kind) == (budget, kind)]
            label = f"{budget:.1e} FLOP" if kind == "law" else None
            axes.plot([row.params for row in own], [row.loss for row in own], style, color=colour, label=label)
    axes.set_xscale("log")
    axes.set_xlabel(f"{size.replace('_params', '')} parameters")
    axes.set_ylabel("loss at equal FLOPs")
    axes.legend(
        frameon=False, fontsize=8, title="▾ optimum of the law (line)\nx of the parabola (dashes)", title_fontsize=8
    )


def _residuals(axes: Axes, points: Points, fit: Fit, kept: np.ndarray, size: str) -> None:
    residual_P = 100 * (points.loss_P / fit.predict(points.variables) - 1)
    out_P = ~np.isin(np.arange(len(points)), kept)
    axes.axhline(0, color=INK, linewidth=1)
    limit = 1.15 * np.abs(residual_P[~out_P]).max()
    drawn = axes.scatter(
        points.loss_P[~out_P], residual_P[~out_P], c=np.log10(points.variables[size][~out_P]), s=14, cmap="viridis"
    )
    if out_P.any():
        # What was left out may lie far away; it is shown at the edge.
        axes.plot(points.loss_P[out_P], np.clip(residual_P[out_P], -limit, limit), "x", color=MUTED, label="left out")
        axes.legend(frameon=False, fontsize=8)
    figure = axes.figure
    figure.colorbar(drawn, ax=axes, label=f"log10 of {size.replace('_', ' ')}")  # pyright: ignore[reportAttributeAccessIssue]
    axes.set_xlabel("loss")
    axes.set_ylabel("loss over law - 1, %")


def draw_curves(curves: Sequence[tuple[Curve, np.ndarray]], n_fitted: int, path: Path) -> None:
    """Loss against steps with the law over it, above the errors; fitted curves are grey.

    Args:
        curves: each with its prediction, those that were fitted first.
    """
    with matplotlib.rc_context(PAPER):
        figure = Figure(figsize=(WIDTH * 1.3, 7.0), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        below.axhline(0, color=INK, linewidth=1)
        for index, (curve, predicted_P) in enumerate(curves):
            test = index - n_fitted
            colour = MUTED if test < 0 else SERIES[test % len(SERIES)]
            above.plot(curve.step_P, curve.loss_P, ".", color=colour, markersize=2.5, alpha=0.5)
            above.plot(curve.step_P, predicted_P, color=colour, linewidth=1.2, label=None if test < 0 else curve.name)
            below.plot(curve.step_P, predicted_P - curve.loss_P, color=colour, linewidth=1.2)
        every = np.concatenate([curve.loss_P for curve, _ in curves])
        above.set_ylim(every.min() - 0.02, np.quantile(every, 0.98))
        above.set_ylabel("loss: dots; law: lines\n(grey: fitted)")
        below.set_ylabel("law - loss")
        below.set_xlabel("steps")
        above.legend(frameon=False, fontsize=8)
        save(figure, path)


def draw_differences(pairs: tuple[np.ndarray, np.ndarray], curve: Sequence[Any], scale: str, path: Path) -> None:
    """The measured differences, and the difference of laws with its band.

    Args:
        pairs: scales and differences.
        curve: rows with `scale`, `difference`, `low` and `high` (`DifferenceRow`).
        scale: name of the x axis.
    """
    with matplotlib.rc_context(PAPER):
        figure = Figure(figsize=(WIDTH * 1.3, 3.6), layout="constrained")
        axes = figure.subplots()
        x = [row.scale for row in curve]
        axes.axhline(0, color=INK, linewidth=1)
        axes.fill_between(x, [row.low for row in curve], [row.high for row in curve], color=SERIES[0], alpha=BAND)
        axes.plot(x, [row.difference for row in curve], color=SERIES[0])
        axes.plot(*pairs, "o", color=SERIES[0], markersize=4)
        axes.set_xscale("log")
        axes.set_xlabel(scale.replace("_", " "))
        axes.set_ylabel("loss, method - baseline")
        save(figure, path)


def draw_form_residuals(rows: Sequence[Any], path: Path) -> None:
    """A panel per law: what it leaves of every run; triangles were held out.

    Args:
        rows: `ResidualRow`s of all laws, the same runs of each.
    """
    names = list(dict.fromkeys(row.law for row in rows))
    with matplotlib.rc_context(PAPER):
        figure = Figure(figsize=(WIDTH * 1.4, 1.9 * -(-len(names) // 2) + 0.5), layout="constrained")
        panels = figure.subplots(-(-len(names) // 2), 2, squeeze=False, sharex=True, sharey=True).flatten()
        for axes, name, colour in zip(panels, names, itertools.cycle(SERIES)):
            axes.axhline(0, color=INK, linewidth=1)
            for held, marker in ((0, "o"), (1, "^")):
                own = [row for row in rows if row.law == name and row.held_out == held]
                axes.plot(
                    [row.loss for row in own],
                    [row.residual_percent for row in own],
                    marker,
                    color=colour if not held else INK,
                    markersize=4 if not held else 6,
                )
            axes.set_title(name, fontsize=9)
        for axes in panels[len(names) :]:
            axes.set_visible(False)
        figure.supxlabel("loss", fontsize=9)
        figure.supylabel("loss over law - 1, % (triangles: held out)", fontsize=9)
        save(figure, path)

"""Loss against learning rate at every size, without CompleteP and with it: the optimum moves, or stays."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ablations.report.style import INK, SERIES, WIDTH
from ablations.scaling.figure import PAPER, save

STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D")
# Losses further above the lowest of a panel are cut off.
SHOWN = 0.25


def draw_transfer(runs: Sequence[Any], optima: Sequence[Any], path: Path) -> None:
    """A column per parametrization, a row per number of experts; colours are widths, lines depths, triangles optima.

    Args:
        runs: `TransferRow`s.
        optima: `OptimumRow`s.
    """
    names = list(dict.fromkeys(row.parametrization for row in optima))
    experts = sorted({row.experts for row in optima})
    colours = dict(zip(sorted({row.width for row in optima}), SERIES))
    depths = sorted({row.depth for row in optima})
    with matplotlib.rc_context(PAPER):
        figure = Figure(figsize=(WIDTH * 1.4, 3.1 * len(experts) + 0.6), layout="constrained")
        grid = figure.subplots(len(experts), len(names), squeeze=False, sharex=True, sharey="row")
        for row, column in np.ndindex(grid.shape):
            axes: Any = grid[row, column]
            name, count = names[column], experts[row]
            own = [each for each in optima if (each.parametrization, each.experts) == (name, count)]
            for optimum in own:
                key = (name, optimum.width, optimum.depth, count)
                colour, style = colours[optimum.width], depths.index(optimum.depth)
                points: dict[float, list[float]] = {}
                for run in runs:
                    if (run.parametrization, run.width, run.depth, run.experts) == key:
                        points.setdefault(run.learning_rate, []).append(run.loss)
                rates = sorted(points)
                axes.plot(
                    rates,
                    [np.mean(points[rate]) for rate in rates],
                    color=colour,
                    linestyle=STYLES[style % len(STYLES)],
                    marker=MARKERS[style % len(MARKERS)],
                    markersize=3,
                    linewidth=1.1,
                    label=f"{optimum.width} wide, {optimum.depth} layers",
                )
                if np.isfinite(optimum.optimum) and np.isfinite(optimum.high_95):
                    axes.plot([optimum.low_95, optimum.high_95], [optimum.lowest] * 2, color=colour, linewidth=2.5)
                    axes.plot(optimum.optimum, optimum.lowest, "v", color=colour, markersize=7)
            if np.isfinite(base := own[0].optimum / own[0].times_base):
                axes.axvline(base, color=INK, linewidth=0.7, linestyle=":")
            axes.set_xscale("log", base=2)
            # Of every sweep its lowest loss.
            least = [
                min(run.loss for run in runs if (run.width, run.depth, run.experts) == (each.width, each.depth, count))
                for each in optima
                if each.experts == count
            ]
            axes.set_ylim(min(least) - 0.03, max(least) + SHOWN)
            if row == 0:
                axes.set_title(name, fontsize=10)
            if column == 0:
                axes.set_ylabel(f"bits per byte\n{count} experts")
        for axes in grid[-1]:
            axes.set_xlabel("peak learning rate")
        grid[0, -1].legend(frameon=False, fontsize=7)
        save(figure, path)

"""The figure of the recall study: accuracy against the size of the state, every run of the grid and the published
points beside them."""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ablations.recall.published import PublishedPoint
from ablations.recall.results import RunRow, StateRow
from ablations.report.style import INK, MUTED, SERIES, STYLE, WIDTH
from foundation.files import write_bytes

# Colours repeat behind seven plans: the marker then tells them apart.
MARKERS = ("o", "s", "^", "D")


def draw(rows: Sequence[RunRow], states: Sequence[StateRow], published: Sequence[PublishedPoint], path: Path) -> None:
    """Two panels with one x axis: our runs, and what others have published, each over the elements of the state.

    Args:
        path: where the image goes, of the type that the suffix names.
    """
    plans = list(dict.fromkeys(row.plan for row in states))
    with matplotlib.rc_context({**STYLE, "figure.facecolor": "white", "savefig.facecolor": "white"}):
        figure = Figure(figsize=(WIDTH * 1.35, 7.2), layout="constrained")
        ours, theirs = figure.subplots(2, 1, sharex=True)
        for place, plan in enumerate(plans):
            colour, marker = SERIES[place % len(SERIES)], MARKERS[place // len(SERIES) % len(MARKERS)]
            own = [row for row in rows if row.plan == plan]
            ours.plot(
                [row.state_elements for row in own],
                [row.accuracy for row in own],
                linestyle="none",
                marker=marker,
                markersize=3,
                color=colour,
                alpha=0.3,
            )
            best = sorted((row for row in states if row.plan == plan), key=lambda row: row.state_elements)
            ours.errorbar(
                [row.state_elements for row in best],
                [row.accuracy for row in best],
                yerr=[[row.accuracy - row.lowest for row in best], [row.highest - row.accuracy for row in best]],
                marker=marker,
                markersize=6,
                color=colour,
                elinewidth=1,
                label=plan,
            )
        names = list(dict.fromkeys(point.name for point in published))
        for place, name in enumerate(names):
            own = [point for point in published if point.name == name]
            label = f"{name} ({own[0].letter})" if own[0].letter else name
            theirs.plot(
                [point.state_elements for point in own],
                [point.accuracy for point in own],
                marker=MARKERS[place % len(MARKERS)],
                markerfacecolor="none",
                color=INK if own[0].letter else MUTED,
                label=label,
            )
        for axes, title in (
            (ours, "ours: best rate (lines, spans over seeds), every run"),
            (theirs, "published, other settings"),
        ):
            _dress(axes, title)
        theirs.set_xlabel("elements of the state of one text (ours are fp32: four bytes each)")
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=150, format=path.suffix[1:])
        write_bytes(path, drawn.getvalue())


def _dress(axes: Axes, title: str) -> None:
    axes.set_xscale("log")
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel("right answers")
    axes.set_title(title, loc="left", fontsize=10, color=MUTED)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)

"""How each figure is drawn, from the rows of its csv alone.

Series are named where they end, not in a legend; the baseline is ink, the controls grey, and a method keeps its
colour, its dash and its marker through the whole report. Words stand beside what is drawn, never on it.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ablations.report.style import GRID, INK, MUTED, SERIES, Look, label_ends, looks, new_figure
from ablations.report.table import with_unit

# Blended over the page's background in either theme.
BAND = 0.12
# Of single runs beside their mean.
FAINT: dict[str, Any] = {"alpha": 0.45, "linewidth": 0.7}
MEAN = "mean"
# Of the differences, each with a scale of its own.
PAIRED, KNOWN, UNPAIRED = "methods, paired by seed", "controls of known sign", "another order of the data, not paired"
PANELS = (PAIRED, KNOWN, UNPAIRED)
# Inches of a line in a figure of bars.
BAR_ROW = 0.24


def series(rows: list[tuple]) -> dict[str, list[tuple]]:
    """Rows by their first column, which is left out; in the order of first appearance."""
    return {name: [row[1:] for row in group] for name, group in groupby(rows, key=lambda row: row[0])}


def differences(rows: list[tuple]) -> Figure:
    """Rows (panel, method, "mean" or a run, difference, low, high): panels of a scale of their own, and in each of
    them a bar, a mark and single runs per method."""
    present = {row[0] for row in rows}
    panels = {name: series([row[1:] for row in rows if row[0] == name]) for name in PANELS if name in present}
    # Methods in the order of the table, as in every figure; the baseline has no row, but the first look is its.
    look = looks(["baseline", *dict.fromkeys(row[1] for row in rows)])
    counts = [len(groups) for groups in panels.values()]
    figure, all_axes = new_figure(
        0.5 + 0.62 * len(panels) + 0.4 * sum(counts), rows=len(panels), share_x=False, heights=counts
    )
    for axes, (name, groups) in zip(all_axes, panels.items()):
        axes.set_title(name, loc="left", fontsize=9, color=MUTED)
        _differences_panel(axes, groups, look)
    all_axes[-1].set_xlabel("bits per byte, method − baseline   (better ←  → worse)")
    return figure


def _differences_panel(axes: Axes, groups: dict[str, list[tuple]], look: Mapping[str, Look]) -> None:
    axes.axvline(0, color=INK, linewidth=1)
    for y, (method, points) in enumerate(groups.items()):
        _, mean, low, high = points[0]
        colour = look[method].colour
        # Above the bar, so that single runs stay visible where they lie close together.
        axes.scatter(
            [point[1] for point in points[1:]],
            [y + 0.24] * (len(points) - 1),
            s=10,
            color=colour,
            alpha=0.6,
            linewidths=0,
        )
        if low is not None:
            axes.plot([low, high], [y, y], color=colour, linewidth=2.4)
        axes.plot([mean], [y], look[method].marker, color=colour, markersize=6.5)
        number = f"{mean:+.4f}" if low is None else f"{mean:+.4f} ± {mean - low:.4f}"
        axes.annotate(
            number,
            (1, y),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=MUTED,
        )
    axes.set_yticks(range(len(groups)), list(groups))
    for tick, method in zip(axes.get_yticklabels(), groups):
        tick.set_color(look[method].colour)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(4))


def loss_curves(rows: list[tuple]) -> Figure:
    """Rows (series, tokens, mean, low, high): the trunk, then the methods' branches behind it."""
    groups = series(rows)
    figure, (axes,) = new_figure(3.4)
    ends = draw_bands(axes, groups, looks([name for name in groups if name != "trunk"]))
    settle(axes, [row[1:] for row in rows])
    mark_fork(axes, groups)
    tokens_axis(axes)
    axes.set_ylabel("bits per byte, training")
    label_ends(axes, [end for end in ends if end[0] != "trunk"])
    return figure


def validation_curves(rows: list[tuple]) -> Figure:
    """Rows (series, "mean" or a run, tokens, bits per byte): the trunk, then the branches, run by run."""
    groups = series(rows)
    figure, (axes,) = new_figure(3.4)
    ends = draw_runs(axes, groups, looks([name for name in groups if name != "trunk"]))
    settle(axes, [(tokens, y, y, y) for _, _, tokens, y in rows])
    mark_fork(axes, {name: [point[1:] for point in points] for name, points in groups.items()})
    tokens_axis(axes)
    axes.set_ylabel("bits per byte, validation")
    label_ends(axes, [end for end in ends if end[0] != "trunk"])
    return figure


def branch_differences(rows: list[tuple], methods: Sequence[str] = ()) -> Figure:
    """Rows (method, "mean" or a run, tokens, difference): lines about zero, which is the baseline.

    Args:
        methods: all of the report, whose looks they keep here where some of them have no row.
    """
    groups = series(rows)
    figure, (axes,) = new_figure(3.2)
    axes.axhline(0, color=INK, linewidth=1)
    ends = draw_runs(axes, groups, looks(methods or ["baseline", *groups]))
    tokens_axis(axes)
    axes.set_xlabel("tokens since the branch began")
    axes.set_ylabel("bits per byte, method − baseline")
    label_ends(axes, ends)
    return figure


def loss_against_experts(rows: list[tuple]) -> Figure:
    """Rows (method, mean experts, mean, low, high): one line per method through its budgets."""
    groups = series(rows)
    figure, (axes,) = new_figure(3.4)
    ends = draw_bands(axes, groups, looks(list(groups)), points=True)
    axes.set_xlabel("mean experts per token")
    axes.set_ylabel("bits per byte, validation")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    label_ends(axes, ends)
    return figure


def histogram(rows: list[tuple]) -> Figure:
    """Rows (method, experts, share): one panel of bars per method, all with the same x axis."""
    groups = series(rows)
    figure, panels = new_figure(0.6 + 0.62 * len(groups), rows=len(groups))
    look = looks(list(groups))
    most = max(row[1] for row in rows)
    for axes, (method, points) in zip(panels, groups.items()):
        colour = look[method].colour
        axes.bar(
            [experts for experts, _ in points], [share for _, share in points], width=0.84, color=colour, linewidth=0
        )
        mean = sum(experts * share for experts, share in points)
        axes.plot([mean], [0], "^", color=colour, markersize=5, clip_on=False, zorder=3)
        axes.set_xlim(-0.7, most + 0.7)
        axes.set_yticks([])
        axes.grid(visible=False)
        axes.spines["left"].set_visible(False)
        axes.text(1.01, 0.5, method, transform=axes.transAxes, color=colour, va="center")
    panels[-1].set_xlabel("experts used by a token in a layer")
    panels[-1].xaxis.set_major_locator(MaxNLocator(10, integer=True))
    return figure


def routers(rows: list[tuple]) -> Figure:
    """Rows (quantity, series, tokens, mean, low, high): one panel per quantity, over the whole run."""
    quantities = {name: series(own) for name, own in series(rows).items()}
    n_series = max(map(len, quantities.values()))
    # Room for the names of all series beside each panel.
    figure, panels = new_figure(0.6 + len(quantities) * max(1.4, 0.3 + 0.19 * n_series), rows=len(quantities))
    for axes, (quantity, groups) in zip(panels, quantities.items()):
        axes.set_title(quantity, loc="left", fontsize=9, color=MUTED)
        ends = draw_bands(axes, groups, looks([name for name in groups if name != "trunk"]), points=True)
        label_ends(axes, [end for end in ends if end[0] != "trunk"] or ends)
    tokens_axis(panels[-1])
    return figure


def costs(rows: list[tuple]) -> Figure:
    """Rows (way, part, FLOPs, seconds): per way a bar of the whole, and under it one for each part."""
    lines = []
    for index, (way, parts) in enumerate(series(rows).items()):
        lines.append((way, sum(flops for _, flops, _ in parts), SERIES[0] if not index else INK, 1.0))
        lines += [(part, flops, SERIES[0] if not index else INK, 0.5) for part, flops, _ in parts]
    figure, (axes,) = new_figure(0.3 + BAR_ROW * len(lines))
    for y, (_, flops, colour, alpha) in enumerate(lines):
        axes.barh(y, flops, height=0.62, color=colour, alpha=alpha, linewidth=0)
        axes.annotate(
            f"{with_unit(flops)}FLOP",
            (1, y),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=INK if alpha == 1 else MUTED,
        )
    axes.set_yticks(range(len(lines)), [name for name, *_ in lines])
    for tick, (*_, alpha) in zip(axes.get_yticklabels(), lines):
        tick.set_color(INK if alpha == 1 else MUTED)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xticks([])
    axes.set_xlim(left=0)
    axes.grid(visible=False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    return figure


def draw_bands(
    axes: Axes, groups: dict[str, list[tuple]], look: Mapping[str, Look], *, points: bool = False
) -> list[tuple[str, float, str]]:
    """Lines with bands from rows (x, mean, low, high), their points marked where asked; returns (name, last mean,
    colour) for `label_ends`."""
    ends = []
    for name, own in groups.items():
        x, mean, low, high = zip(*own)
        axes.fill_between(x, low, high, color=look[name].colour, alpha=BAND, linewidth=0)
        axes.plot(x, mean, **(look[name].points if points else look[name].line))
        ends.append((name, mean[-1], look[name].colour))
    return ends


def draw_runs(axes: Axes, groups: dict[str, list[tuple]], look: Mapping[str, Look]) -> list[tuple[str, float, str]]:
    """A faint line per run and one for their mean, from rows ("mean" or a run, x, y); returns what `draw_bands`
    does."""
    ends = []
    for name, own in groups.items():
        for run, points in series(own).items():
            x, y = zip(*points)
            # A run that was measured once has no line to be seen by.
            style = look[name].line if len(points) > 1 else look[name].points
            axes.plot(x, y, **{**style, **({} if run == MEAN else FAINT)})
            if run == MEAN:
                ends.append((name, y[-1], look[name].colour))
    return ends


def settle(axes: Axes, points: list[tuple]) -> None:
    """Sets the y axis by rows (x, mean, low, high) without the first few per cent, which fall from the uniform
    distribution and would flatten everything after them."""
    start = 0.06 * max(point[0] for point in points)
    settled = [point for point in points if point[0] >= start] or points
    low, high = min(point[2] for point in settled), max(point[3] for point in settled)
    axes.set_ylim(low - 0.05 * (high - low), high + 0.02 * (high - low))


def mark_fork(axes: Axes, groups: Mapping[str, list[tuple]]) -> None:
    """A line where the trunk ends, its sides named above the panel, where no curve runs."""
    if "trunk" not in groups:
        return
    fork = groups["trunk"][-1][0]
    axes.axvline(fork, color=GRID, linewidth=1, linestyle=(0, (3, 3)))
    for text, side, offset in (("trunk", "right", -4), ("branches", "left", 4)):
        axes.annotate(
            text,
            (fork, 1),
            xycoords=("data", "axes fraction"),
            xytext=(offset, 4),
            textcoords="offset points",
            ha=side,
            va="bottom",
            color=MUTED,
            annotation_clip=False,
        )


def tokens_axis(axes: Axes) -> None:
    """Tokens on the x axis, written as 1M instead of 1000000."""
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: with_unit(value).replace(" ", "") if value else "0"))
    axes.xaxis.set_major_locator(MaxNLocator(6))

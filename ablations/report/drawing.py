"""How each figure is drawn, from the rows of its csv alone.

Series are named where they end, not in a legend; the baseline is ink, the controls grey, and a method keeps its
colour through the whole report.
"""

from itertools import groupby

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ablations.report.style import GRID, INK, MUTED, SERIES, colours, label_ends, new_figure
from ablations.report.table import with_unit

# Blended over the page's background in either theme.
BAND = 0.12


def series(rows: list[tuple]) -> dict[str, list[tuple]]:
    """Rows by their first column, which is left out; in the order of first appearance."""
    return {name: [row[1:] for row in group] for name, group in groupby(rows, key=lambda row: row[0])}


def differences(rows: list[tuple]) -> Figure:
    """Rows (method, "mean" or a run, difference, low, high): a bar, a mark and single runs per method."""
    groups = series(rows)
    figure, (axes,) = new_figure(0.75 + 0.42 * len(groups))
    # The baseline has no row, but the first colour is its.
    colour = colours(["baseline", *groups])
    axes.axvline(0, color=INK, linewidth=1)
    for y, (method, points) in enumerate(groups.items()):
        _, mean, low, high = points[0]
        # Above the bar, so that single runs stay visible where they lie close together.
        axes.scatter(
            [point[1] for point in points[1:]],
            [y + 0.24] * (len(points) - 1),
            s=10,
            color=colour[method],
            alpha=0.6,
            linewidths=0,
        )
        if low is not None:
            axes.plot([low, high], [y, y], color=colour[method], linewidth=2.4)
        axes.plot([mean], [y], "o", color=colour[method], markersize=6.5)
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
        tick.set_color(colour[method])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    axes.set_xlabel("bits per byte, method − baseline   (better ←  → worse)")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    return figure


def loss_curves(rows: list[tuple]) -> Figure:
    """Rows (series, tokens, mean, low, high): the trunk, then the methods' branches behind it."""
    groups = series(rows)
    methods = [name for name in groups if name != "trunk"]
    figure, (axes,) = new_figure(3.4)
    colour = {**colours(methods), "trunk": MUTED}
    ends = draw_bands(axes, groups, colour)
    # The first few per cent fall from the uniform distribution and would flatten everything after them.
    start = 0.06 * max(row[1] for row in rows)
    settled = [row for row in rows if row[1] >= start] or rows
    low, high = min(row[3] for row in settled), max(row[4] for row in settled)
    axes.set_ylim(low - 0.05 * (high - low), high + 0.02 * (high - low))
    if "trunk" in groups:
        tokens, mean, *_ = groups["trunk"][len(groups["trunk"]) // 2]
        axes.annotate("trunk", (tokens, mean), xytext=(4, 6), textcoords="offset points", color=MUTED)
        axes.axvline(groups["trunk"][-1][0], color=GRID, linewidth=1, linestyle=(0, (3, 3)))
    tokens_axis(axes)
    axes.set_ylabel("bits per byte, training")
    label_ends(axes, [end for end in ends if end[0] != "trunk"])
    return figure


def branch_differences(rows: list[tuple]) -> Figure:
    """Rows (method, tokens, mean, low, high) of differences: lines about zero, which is the baseline."""
    groups = series(rows)
    figure, (axes,) = new_figure(3.2)
    axes.axhline(0, color=INK, linewidth=1)
    ends = draw_bands(axes, groups, colours(["baseline", *groups]))
    tokens_axis(axes)
    axes.set_xlabel("tokens since the branch began")
    axes.set_ylabel("bits per byte, method − baseline")
    label_ends(axes, ends)
    return figure


def loss_against_experts(rows: list[tuple]) -> Figure:
    """Rows (method, mean experts, mean, low, high): one line per method through its budgets."""
    groups = series(rows)
    figure, (axes,) = new_figure(3.4)
    ends = draw_bands(axes, groups, colours(list(groups)), marker="o")
    axes.set_xlabel("mean experts per token")
    axes.set_ylabel("bits per byte, validation")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    label_ends(axes, ends)
    return figure


def histogram(rows: list[tuple]) -> Figure:
    """Rows (method, experts, share): one panel of bars per method, all with the same x axis."""
    groups = series(rows)
    figure, panels = new_figure(0.6 + 0.62 * len(groups), rows=len(groups))
    colour = colours(list(groups))
    most = max(row[1] for row in rows)
    for axes, (method, points) in zip(panels, groups.items()):
        axes.bar(
            [experts for experts, _ in points],
            [share for _, share in points],
            width=0.84,
            color=colour[method],
            linewidth=0,
        )
        mean = sum(experts * share for experts, share in points)
        axes.plot([mean], [0], "^", color=colour[method], markersize=5, clip_on=False, zorder=3)
        axes.set_xlim(-0.7, most + 0.7)
        axes.set_yticks([])
        axes.grid(visible=False)
        axes.spines["left"].set_visible(False)
        axes.text(1.01, 0.5, method, transform=axes.transAxes, color=colour[method], va="center")
    panels[-1].set_xlabel("experts used by a token in a layer")
    panels[-1].xaxis.set_major_locator(MaxNLocator(10, integer=True))
    return figure


def routers(rows: list[tuple]) -> Figure:
    """Rows (series, layer, experts, dead experts, entropy): one panel per quantity, layers on the x axis."""
    groups = series(rows)
    # Room for the names of all series beside each panel.
    figure, panels = new_figure(0.6 + 3 * max(1.1, 0.19 * len(groups)), rows=3)
    colour = {**colours([name for name in groups if name != "trunk"]), "trunk": MUTED}
    for column, (axes, quantity) in enumerate(
        zip(panels, ("experts per token", "dead experts", "entropy, nats")), start=1
    ):
        for name, points in groups.items():
            axes.plot(
                [point[0] for point in points],
                [point[column] for point in points],
                marker="o",
                markersize=3.5,
                color=colour[name],
            )
        axes.set_ylabel(quantity)
        label_ends(axes, [(name, points[-1][column], colour[name]) for name, points in groups.items()])
    panels[-1].set_xlabel("layer")
    panels[-1].xaxis.set_major_locator(MaxNLocator(10, integer=True))
    return figure


def costs(rows: list[tuple]) -> Figure:
    """Rows (way, part, FLOPs, seconds): one stacked bar per way, its parts named where there is room."""
    groups = series(rows)
    figure, (axes,) = new_figure(1.9)
    for y, parts in enumerate(groups.values()):
        left = 0.0
        total = sum(flops for _, flops, _ in parts)
        for index, (part, flops, _) in enumerate(parts):
            axes.barh(
                y,
                flops,
                left=left,
                height=0.52,
                color=INK if y else SERIES[0],
                alpha=1 - 0.6 * index / len(parts),
                linewidth=0,
            )
            # Narrower parts have no room for their name.
            if flops > 0.12 * max(sum(f for _, f, _ in group) for group in groups.values()):
                axes.text(left + flops / 2, y - 0.33, part, ha="center", va="bottom", color=MUTED, fontsize=8)
            left += flops
        axes.text(left, y, f"  {with_unit(total)}FLOP", va="center", color=INK)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_ylim(len(groups) - 0.5, -0.75)
    axes.set_xticks([])
    axes.grid(visible=False)
    axes.margins(x=0.18)
    axes.set_xlim(left=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", labelcolor=INK)
    return figure


def draw_bands(
    axes: Axes, groups: dict[str, list[tuple]], colour: dict[str, str], marker: str = ""
) -> list[tuple[str, float, str]]:
    """Lines with bands from rows (x, mean, low, high); returns (name, last mean, colour) for `label_ends`."""
    ends = []
    for name, points in groups.items():
        x, mean, low, high = zip(*points)
        axes.fill_between(x, low, high, color=colour[name], alpha=BAND, linewidth=0)
        axes.plot(x, mean, color=colour[name], marker=marker, markersize=3.5)
        ends.append((name, mean[-1], colour[name]))
    return ends


def tokens_axis(axes: Axes) -> None:
    """Tokens on the x axis, written as 1M instead of 1000000."""
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: with_unit(value).replace(" ", "") if value else "0"))
    axes.xaxis.set_major_locator(MaxNLocator(6))

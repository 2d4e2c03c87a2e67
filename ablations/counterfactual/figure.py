"""The figure of the counterfactuals: what each allocation gains at the same total of experts."""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ablations.counterfactual.measure import EVEN, HINDSIGHT, ORACLE, OWN, REPLAYED
from ablations.counterfactual.tables import POOLED, WHOLE, AllocationRow
from ablations.counterfactual.verdict import headline
from ablations.report.style import INK, MUTED, SERIES, STYLE, WIDTH
from foundation.files import write_bytes

COLOURS = {OWN: SERIES[1], ORACLE: SERIES[0]}


def draw(rows: Sequence[AllocationRow], path: Path) -> None:
    """Above, gains of all allocations over the even one, but for that of who knows each token's luck, which would leave
    no room for the others; below, own choice and oracle in halves, domains and layers.

    Args:
        rows: of the pooled runs, where there are several, their means are drawn as dots and single runs beside them.
        path: where the image goes, of the type that the suffix names.
    """
    runs = list(dict.fromkeys(row.run for row in rows))
    main = POOLED if POOLED in runs else runs[0]
    whole = [row for row in rows if row.part == WHOLE and row.allocation not in (EVEN, REPLAYED, HINDSIGHT)]
    names = [row.allocation for row in whole if row.run == main]
    parts = list(dict.fromkeys(row.part for row in rows if row.part != WHOLE))
    with matplotlib.rc_context({**STYLE, "figure.facecolor": "white", "savefig.facecolor": "white"}):
        height = 1.4 + 0.3 * len(names) + 0.36 * len(parts)
        figure = Figure(figsize=(WIDTH * 1.3, height), layout="constrained")
        above, below = figure.subplots(2, 1, height_ratios=[len(names), max(1, 1.2 * len(parts))])
        for y, name in enumerate(names):
            single = [row.gain for row in whole if row.allocation == name and row.run not in (main, POOLED)]
            above.scatter(single, [y + 0.25] * len(single), s=9, color=MUTED, linewidths=0)
            (row,) = (row for row in whole if row.allocation == name and row.run == main)
            _bar(above, row, y, COLOURS.get(name, INK))
        above.set_yticks(range(len(names)), names)
        figure.suptitle(headline(rows), fontsize=9, color=INK)
        for y, part in enumerate(parts):
            for shift, name in ((-0.14, OWN), (0.14, ORACLE)):
                for row in rows:
                    if (row.run, row.part, row.allocation) == (main, part, name):
                        _bar(below, row, y + shift, COLOURS[name])
        below.set_yticks(range(len(parts)), parts)
        for axes, count in ((above, len(names)), (below, len(parts))):
            axes.set_ylim(count - 0.5, -0.5)
            axes.axvline(0, color=INK, linewidth=1)
            axes.grid(visible=False, axis="y")
            axes.grid(visible=True, axis="x")
            axes.xaxis.set_major_locator(MaxNLocator(5))
        below.set_xlabel("bits per byte gained over an even allocation   (worse ← → better)")
        for name in (OWN, ORACLE):
            below.plot([], [], "o-", color=COLOURS[name], label=name)
        below.legend(frameon=False, fontsize=8)
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=150)
        write_bytes(path, drawn.getvalue())


def _bar(axes: Axes, row: AllocationRow, y: float, colour: str) -> None:
    axes.plot([row.gain_low, row.gain_high], [y, y], color=colour, linewidth=2)
    axes.plot([row.gain], [y], "o", color=colour, markersize=4.5)

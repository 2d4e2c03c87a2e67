"""The figure of a search for a mixture: what each takes of every domain, and what the best one gains there."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ablations.mixture.options import MACRO, TARGET
from ablations.mixture.rows import ShareRow
from ablations.report.style import INK, MUTED, SERIES, STYLE, WIDTH
from ablations.scaling.figure import save
from ablations.text.differences import DifferenceRow

COLOURS = (SERIES[0], INK, SERIES[1])


def draw(shares: Sequence[ShareRow], differences: Sequence[DifferenceRow], path: Path) -> None:
    """Shares above the differences in bits per byte with their intervals, one line a domain.

    Args:
        path: where the image goes, of the type that the suffix names.
    """
    arms = list(dict.fromkeys(row.mixture for row in shares))
    domains = [row.domain for row in shares if row.mixture == arms[0] and row.domain not in (MACRO, TARGET)]
    (aim,) = (row.domain for row in shares if row.mixture == arms[0] and row.domain not in domains)
    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "x", "figure.facecolor": "white"}):
        figure = Figure(figsize=(WIDTH * 1.3, 1.6 + 0.62 * len(domains)), layout="constrained")
        above, below = figure.subplots(2, 1)
        for place, (arm, colour) in enumerate(zip(arms, COLOURS)):
            own = [row.share for row in shares if row.mixture == arm and row.domain in domains]
            y = [number + 0.25 * (place - 1) for number in range(len(domains))]
            above.barh(y, own, height=0.22, color=colour, label=arm)
        above.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        _dress(above, domains, "share of the training tokens")
        below.axvline(0, color=INK, linewidth=1)
        rows = [aim, *domains]
        for place, (against, colour) in enumerate(zip(arms[1:], COLOURS[1:])):
            own = {row.domain: row for row in differences if row.against == against}
            for number, domain in enumerate(rows):
                row, y = own[domain], number + 0.26 * (place - 0.5)
                below.plot([row.low, row.high], [y, y], color=colour, linewidth=2)
                below.plot(
                    [row.difference], [y], "o", color=colour, markersize=5, label=against if not number else None
                )
        _dress(below, rows, "bits per byte, best mixture − the other (better ←  → worse), 95 %")
        save(figure, path)


def _dress(axes: Axes, names: Sequence[str], title: str) -> None:
    axes.set_yticks(range(len(names)), list(names))
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_title(title, loc="left", fontsize=9, color=MUTED)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)

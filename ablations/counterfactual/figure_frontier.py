"""The figure of the frontier: bits per byte against experts, and against seconds of a decoded token."""

import io
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from ablations.difficulty.frontier import OWN, TRAINED, UNIFORM
from ablations.report.style import SERIES, STYLE, WIDTH
from foundation.files import write_bytes

LINES = {OWN: ("-", "o"), UNIFORM: ("--", "."), TRAINED: ("none", "s")}


def draw_frontier(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws the figure.

    Args:
        rows: of frontier.csv.
        path: where the image goes, of the type that the suffix names.
    """
    names = list(dict.fromkeys(row["weights"] for row in rows))
    times = [column for column in rows[0] if column.endswith("_seconds")]
    panels = {"mean_experts": "mean experts per token and layer"} | {
        column: f"microseconds per token, {column.removesuffix('_seconds').replace('_', ' ')}" for column in times
    }
    with matplotlib.rc_context({**STYLE, "figure.facecolor": "white", "savefig.facecolor": "white"}):
        figure = Figure(figsize=(WIDTH * 1.3, 2.6 * len(panels)), layout="constrained")
        for axes, (column, label) in zip(figure.subplots(len(panels), 1), panels.items()):
            scale = 1e6 if column in times else 1.0
            for index, name in enumerate(names):
                for allocation, (line, marker) in LINES.items():
                    # Joined in the order of their experts, whatever the clock made of it.
                    own = (row for row in rows if (row["weights"], row["allocation"]) == (name, allocation))
                    ordered = sorted(own, key=lambda row: row["mean_experts"])
                    points = [(scale * row[column], row["bits_per_byte"]) for row in ordered]
                    if points:
                        axes.plot(
                            *zip(*points),
                            color=SERIES[index % len(SERIES)],
                            linestyle=line,
                            marker=marker,
                            label=f"{name}, {allocation}",
                        )
            axes.set_xlabel(label)
            axes.set_ylabel("bits per byte")
        figure.axes[0].legend(frameon=False, fontsize=7)
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=150)
        write_bytes(path, drawn.getvalue())

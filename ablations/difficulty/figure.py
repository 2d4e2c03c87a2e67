"""The figure of the difficulty study: experts by difficulty above, the frontier of bits per byte below."""

import io
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from ablations.difficulty.frontier import OWN, RANDOM, TRAINED, UNIFORM
from ablations.difficulty.results import ResultRow, Results
from ablations.report.style import INK, MUTED, SERIES, STYLE, WIDTH
from foundation.files import write_bytes

LINES = {OWN: "-", UNIFORM: "--", RANDOM: ":"}


def draw(results: Results, path: Path) -> None:
    """Draws the figure of a study.

    Args:
        results: every table of the study.
        path: where the image goes, of the type that the suffix names.
    """
    runs = list(dict.fromkeys(row["method"] for row in results.deciles))
    methods = list(dict.fromkeys(results.methods[run] for run in runs))
    colour = {run: SERIES[methods.index(results.methods[run]) % len(SERIES)] for run in runs}
    # A method is named once, however many seeds it has.
    labelled = {next(run for run in runs if results.methods[run] == method) for method in methods}
    with matplotlib.rc_context({**STYLE, "figure.facecolor": "white", "savefig.facecolor": "white"}):
        figure = Figure(figsize=(WIDTH * 1.3, 7.5), layout="constrained")
        above, below = figure.subplots(2, 1)
        for run in runs:
            rows = [row for row in results.deciles if row["method"] == run and row["difficulty"] == "reference_loss"]
            above.plot(
                [row["decile"] for row in rows],
                [row["mean_experts"] for row in rows],
                color=colour[run],
                marker="o",
                label=results.methods[run] if run in labelled else None,
            )
        above.axhline(results.k, color=MUTED, linewidth=0.8)
        above.set_xlabel("tokens by the loss of the reference model, tenths, easiest first")
        above.set_ylabel("experts per token and layer")
        above.legend(frameon=False)
        for run in runs:
            for allocation, line in LINES.items():
                rows = frontier_curve(results.frontier, run, allocation)
                if rows:
                    below.plot(
                        [row["mean_experts"] for row in rows],
                        [row["bits_per_byte"] for row in rows],
                        marker=".",
                        color=colour[run],
                        linestyle=line,
                        label=f"{results.methods[run]}, {allocation}" if run in labelled else None,
                    )
        trained = sorted(
            (row for row in results.frontier if row["allocation"] == TRAINED), key=lambda row: row["mean_experts"]
        )
        if trained:
            x, y = [row["mean_experts"] for row in trained], [row["bits_per_byte"] for row in trained]
            below.plot(x, y, color=INK, marker="s", linestyle="none", label="static, trained at this k")
        below.set_xlabel("mean experts per token and layer")
        below.set_ylabel("bits per byte, real text")
        below.legend(frameon=False, fontsize=8)
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=150)
        write_bytes(path, drawn.getvalue())


def frontier_curve(frontier: list[ResultRow], method: str, allocation: str) -> list[ResultRow]:
    """The points of one line, ascending in experts: the order in which they are joined."""
    rows = (row for row in frontier if (row["weights"], row["allocation"]) == (method, allocation))
    return sorted(rows, key=lambda row: row["mean_experts"])

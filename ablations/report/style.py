"""How figures look: palette, type, and SVG that follows the page's light or dark theme.

Figures are drawn in the light palette. `svg` then replaces each colour by a CSS variable of the same meaning, so the
page can give it another value in the dark. Series colours start from the colour-blind-safe set of Okabe and Ito
(jfly.uni-koeln.de/color), darkened where it is too pale on white.
"""

import dataclasses
import html
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED, GRID = "#1a1c20", "#6a7079", "#dcdfe4"
SERIES = ("#0072b2", "#d55e00", "#00896a", "#a8508a", "#b57a00", "#2f9bd6", "#7a5a4a")
DARK_INK, DARK_MUTED, DARK_GRID = "#e8eaed", "#9aa1ab", "#343a43"
DARK_SERIES = ("#56b4f5", "#ff8c42", "#35cfa5", "#e79ccb", "#f0c04a", "#9ad8ff", "#cfae9d")

VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    **{colour: f"--series-{i}" for i, colour in enumerate(SERIES)},
}
DARK = {
    "--ink": DARK_INK,
    "--muted": DARK_MUTED,
    "--grid": DARK_GRID,
    **{f"--series-{i}": colour for i, colour in enumerate(DARK_SERIES)},
}

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}

# Inches; with type of 10 pt a figure stays readable at the width of a phone and does not shout at that of a column.
WIDTH = 5.4

# Arms that measure noise, by the names of their files.
CONTROLS = ("twin", "other_order")
# Dashes and markers differ where colours may not: to colour-blind eyes, and in print.
DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 1.5, 2)), (0, (1, 1.2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Look:
    """How a series is drawn wherever it appears.

    Attributes:
        dash: a line style of matplotlib.
    """

    colour: str
    dash: Any
    marker: str

    @property
    def line(self) -> dict[str, Any]:
        """For a line."""
        return {"color": self.colour, "linestyle": self.dash}

    @property
    def points(self) -> dict[str, Any]:
        """For a line with its points marked."""
        return {**self.line, "marker": self.marker, "markersize": 4}


def looks(methods: Sequence[str]) -> dict[str, Look]:
    """One look per method, the same in every figure.

    Args:
        methods: the baseline first, in the order of the table.

    Returns:
        By method, and for "trunk": a solid line of ink for the baseline, grey ones for trunk and controls, then the
        series colours in turn, each with a dash and a marker of its own.
    """
    others = [method for method in methods[1:] if method not in CONTROLS]
    named = {
        method: Look(
            colour=SERIES[index % len(SERIES)],
            dash=DASHES[1:][index % (len(DASHES) - 1)],
            marker=MARKERS[1:][index % (len(MARKERS) - 1)],
        )
        for index, method in enumerate(others)
    }
    grey = {
        name: Look(colour=MUTED, dash=dash, marker="o") for name, dash in zip(("trunk", *CONTROLS), ("-", *DASHES[2:]))
    }
    first = {name: Look(colour=INK, dash="-", marker="o") for name in methods[:1]}
    return {**first, **grey, **named}


def new_figure(
    height: float, rows: int = 1, *, share_x: bool = True, heights: Sequence[float] | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure of `rows` panels above each other; drawn without a window system.

    Args:
        height: in inches.
        heights: of the panels, in any unit; equal by default.
    """
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    panels = figure.subplots(rows, 1, sharex=share_x, squeeze=False, height_ratios=heights)
    return figure, list(panels[:, 0])


def spread(values: list[float], gap: float) -> list[float]:
    """Positions for labels that would overlap.

    Args:
        values: where they belong.
        gap: the least distance between two, in the same unit.

    Returns:
        A position per label: in the order of the values, moved as little as a pass over clusters allows.
    """
    order = sorted(range(len(values)), key=lambda index: values[index])
    # Clusters of labels that touch are laid out around the mean of what they label, and merged while they overlap.
    clusters: list[list[int]] = []
    for index in order:
        clusters.append([index])
        while len(clusters) > 1 and _bottom(clusters[-1], values, gap) - _top(clusters[-2], values, gap) < gap:
            clusters[-2:] = [clusters[-2] + clusters[-1]]
    placed = [0.0] * len(values)
    for cluster in clusters:
        for rank, index in enumerate(cluster):
            placed[index] = _bottom(cluster, values, gap) + rank * gap
    return placed


# Lowest and highest label of a cluster that is laid out around the mean of what it labels.
def _bottom(cluster: list[int], values: list[float], gap: float) -> float:
    return sum(values[index] for index in cluster) / len(cluster) - gap * (len(cluster) - 1) / 2


def _top(cluster: list[int], values: list[float], gap: float) -> float:
    return _bottom(cluster, values, gap) + gap * (len(cluster) - 1)


def label_ends(axes: Axes, ends: list[tuple[str, float, str]]) -> None:
    """Names series at the right edge; labels that would touch are moved apart.

    Args:
        ends: (name, y in data units, colour) of each.
    """
    low, high = axes.get_ylim()
    height = axes.get_position().height * axes.figure.get_figheight()  # pyright: ignore[reportAttributeAccessIssue]
    # Inches that a line of this type takes, in data units.
    gap = (high - low) * 0.17 / height
    places = spread([y for _, y, _ in ends], gap)
    for (name, _, colour), place in zip(ends, places):
        # The y position is in data units, the x position a fixed distance from the edge of the panel.
        axes.annotate(
            name,
            (1, place),
            xycoords=("axes fraction", "data"),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            ha="left",
            color=colour,
            annotation_clip=False,
        )


def svg(draw: Callable[[], Figure], label: str) -> str:
    """A figure as an inline SVG element without external references, its colours CSS variables.

    Args:
        draw: makes the figure, within the style of this file.
        label: read by screen readers.
    """
    buffer = io.StringIO()
    # The salt makes the ids of clip paths and markers unique to this figure within the page, and the same in every run.
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": label}):
        draw().savefig(buffer, format="svg", metadata={"Creator": None, "Date": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Out goes what a page already has or must not have twice: metadata, a global style, namespaces, names of groups,
    # the font.
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"|(?<=<g) id="[^"]*"|font-family: [^;"]*;? ?', "", text)
    text = re.sub(
        r'<svg [^>]*viewBox="([^"]*)"[^>]*>',
        rf'<svg viewBox="\1" role="img" aria-label="{html.escape(label)}">',
        text,
        count=1,
    )
    return re.sub(
        r"#[0-9a-f]{6}", lambda match: f"var({VARIABLES[match[0]]})" if match[0] in VARIABLES else match[0], text
    )

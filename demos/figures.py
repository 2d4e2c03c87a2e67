"""The page's two figures, in the report's style: what the cache costs over the length, and bits per byte against
experts."""

import csv
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ablations.report.style import GRID, INK, MUTED, SERIES, label_ends, new_figure, svg
from lm.accounting import kv_bytes
from lm.config import ModelConfig

LONGEST = 1 << 17


def cache_figure(config: ModelConfig, tokens: int) -> str:
    """Bytes of the model's cache and of full attention in every layer, up to 128k tokens, as an SVG element.

    Args:
        tokens: of the text that is shown, which is marked; 0 for none yet.
    """

    def draw() -> Figure:
        figure, (axes,) = new_figure(2.9)
        lengths = [1 << n for n in range(LONGEST.bit_length())]
        full = dataclasses.replace(config, layer_plan="F")
        ends = []
        for name, shown, colour, dashes in (
            ("full attention", full, MUTED, (0, (4, 2))),
            ("this model", config, SERIES[0], "-"),
        ):
            sizes = [kv_bytes(shown, length) for length in lengths]
            axes.plot(lengths, sizes, color=colour, linestyle=dashes)
            ends.append((name, float(sizes[-1]), colour))
        if tokens:
            axes.axvline(tokens, color=GRID, linewidth=1)
            axes.annotate("this text", (tokens, 0.02), xycoords=("data", "axes fraction"), xytext=(4, 0),
                          textcoords="offset points", color=MUTED)  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n / 1024:g}k" if n >= 1024 else f"{n:g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda size, _: size_text(size)))
        axes.set_xlabel("tokens")
        axes.set_ylabel("bytes of the cache")
        for name, size, colour in ends:
            axes.annotate(name, (LONGEST, size), xytext=(5, 0), textcoords="offset points", va="center",
                          color=colour, annotation_clip=False)  # fmt: skip
        return figure

    return svg(draw, "bytes of the cache against the number of tokens")


def frontier_figure(lines: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Bits per byte against mean experts per token, a line per method, as an SVG element."""

    def draw() -> Figure:
        figure, (axes,) = new_figure(2.9)
        ends = []
        for place, (name, points) in enumerate(lines.items()):
            colour = INK if place == 0 else SERIES[(place - 1) % len(SERIES)]
            axes.plot(*zip(*points), color=colour, marker="osD^v"[place % 5], markersize=4)
            ends.append((name, points[-1][1], colour))
        axes.set_xlabel("mean experts per token")
        axes.set_ylabel("bits per byte")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        label_ends(axes, ends)
        return figure

    return svg(draw, "bits per byte against mean experts per token")


def read_frontier(path: Path) -> dict[str, list[tuple[float, float]]]:
    """The points (mean experts, bits per byte) of each method of a csv, by experts. Its columns: method, mean_experts
    and bits_per_byte (or mean, as a report's loss_against_experts.csv has it); others are left alone.

    Raises:
        ValueError: for a file that cannot be read, lacks a column or holds no number where one belongs.
    """
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--frontier {path}: cannot be read ({error})") from error
    columns = list(rows[0]) if rows else []
    score = next((name for name in ("bits_per_byte", "mean") if name in columns), None)
    if score is None or "mean_experts" not in columns:
        raise ValueError(
            f"--frontier {path}: columns {', '.join(columns) or 'none'}; legal: method, mean_experts, bits_per_byte"
        )
    lines: dict[str, list[tuple[float, float]]] = {}
    for number, row in enumerate(rows, 2):
        try:
            point = (float(row["mean_experts"]), float(row[score]))
        except (TypeError, ValueError):
            raise ValueError(
                f"--frontier {path}:{number}: {row['mean_experts']!r}, {row[score]!r} are no two numbers"
            ) from None
        if not all(map(math.isfinite, point)):
            raise ValueError(f"--frontier {path}:{number}: {point} are not finite")
        lines.setdefault(row.get("method") or path.stem, []).append(point)
    return {method: sorted(points) for method, points in lines.items()}


def size_text(n_bytes: float) -> str:
    """A number of bytes with the unit that keeps it short."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if n_bytes >= unit:
            return f"{n_bytes / unit:.3g} {name}"
    return f"{n_bytes:g} B"

"""The figure of `python -m lm long-context`: seconds per 1,000 tokens and bytes of the cache over a long text."""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

from foundation.files import write_bytes

# Okabe and Ito's colours, which colour-blind eyes tell apart (jfly.uni-koeln.de/color).
COLOURS = ("#0072b2", "#d55e00", "#00896a", "#a8508a")
MUTED = "#6a7079"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongContextRow:
    """After `tokens` tokens. Seconds are per 1,000 tokens since the row before; `decode_seconds` per token, 0 where
    nothing was decoded."""

    plan: str
    tokens: int
    cache_bytes: int
    full_attention_bytes: int
    saved: float
    seconds: float
    linear_seconds: float
    softmax_seconds: float
    decode_seconds: float
    peak_bytes: int


def draw_long_context(rows: Sequence[LongContextRow], path: Path) -> None:
    """Draws one curve per plan; svg, png or pdf by the file's name."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6.5), layout="constrained", facecolor="white")
    above, below = figure.subplots(2, 1, sharex=True)
    plans = list(dict.fromkeys(row.plan for row in rows))
    for plan, colour in zip(plans, COLOURS * len(plans)):
        of_plan = [row for row in rows if row.plan == plan]
        tokens = [row.tokens for row in of_plan]
        above.plot(tokens, [row.seconds for row in of_plan], color=colour, marker="o", markersize=3, label=plan)
        if any(row.linear_seconds for row in of_plan):
            linear = [row.linear_seconds for row in of_plan]
            above.plot(tokens, linear, color=colour, linestyle="--", label=f"{plan}, its linear layers alone")
        peak = max(row.peak_bytes for row in of_plan) / 2**30
        saved = f"{plan}: {of_plan[-1].saved:.1%} less, peak memory {peak:.2f} GiB"
        cached = [row.cache_bytes / 1e6 for row in of_plan]
        below.plot(tokens, cached, color=colour, marker="o", markersize=3, label=saved)
    full = [(row.tokens, row.full_attention_bytes / 1e6) for row in rows if row.plan == plans[0]]
    below.plot(*zip(*full), color=MUTED, label="full attention in every layer")
    above.set(ylabel="seconds per 1,000 tokens of the prompt", ylim=(0, None))
    below.set(ylabel="bytes of the cache, MB", xlabel="tokens read", yscale="log")
    below.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
    above.legend(frameon=False)
    below.legend(frameon=False, loc="lower right")
    for axes in (above, below):
        axes.grid(axis="y", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn, kind = io.BytesIO(), path.suffix[1:] or "svg"
    # The same figure, byte for byte, whenever it is drawn.
    with matplotlib.rc_context({"svg.hashsalt": "long-context"}):
        figure.savefig(drawn, format=kind, dpi=110, metadata={"Date": None} if kind == "svg" else None)
    write_bytes(path, drawn.getvalue())

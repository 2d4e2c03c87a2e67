"""The figure of the study: how far a setting can be trusted, against what it costs."""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from ablations.agreement.settings import SETTINGS, SMALLER_MODEL, Setting
from ablations.agreement.table import SettingRow
from ablations.report.style import INK, MUTED, SERIES, STYLE, WIDTH
from foundation.files import write_bytes

# By share of the tokens that the trunk takes.
MARKERS = {0.7: "s", 0.85: "o", 0.9: "^"}
COLOURS = {0.0: SERIES[0], 0.5: SERIES[1], 0.85: SERIES[2]}
PALE = 0.4


def draw(rows: Sequence[SettingRow], path: Path) -> None:
    """One panel per family: the share of separable pairs that are ordered as in full runs, with its interval, over the
    share of their FLOPs.

    Args:
        path: where the image goes, of the type that the suffix names.
    """
    families = list(dict.fromkeys(row.family for row in rows))
    with matplotlib.rc_context({**STYLE, "figure.facecolor": "white", "savefig.facecolor": "white"}):
        figure = Figure(figsize=(WIDTH * 1.3, 1.2 + 2.4 * len(families)), layout="constrained")
        panels = list(figure.subplots(len(families), 1, sharex=True, squeeze=False)[:, 0])
        for axes, family in zip(panels, families):
            for row in (row for row in rows if row.family == family and row.separable):
                _point(axes, row)
            axes.axhline(0.5, color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)))
            axes.set_ylim(-0.03, 1.03)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.set_ylabel(f"separable pairs\nas in full runs\n({family})")
        panels[-1].set_xlabel("FLOPs of training, share of the full runs'")
        panels[-1].xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        panels[-1].set_xlim(left=0)
        used = [SETTINGS[name] for name in dict.fromkeys(row.setting for row in rows)]
        figure.legend(handles=_legend(used), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=150, format=path.suffix[1:])
        write_bytes(path, drawn.getvalue())


def _point(axes: Axes, row: SettingRow) -> None:
    look = _look(SETTINGS[row.setting])
    axes.plot(
        [row.flops] * 2,
        [row.separable_share_low, row.separable_share_high],
        color=look["color"],
        alpha=0.5 * look["alpha"],
        linewidth=1.2,
    )
    axes.plot([row.flops], [row.separable_share], linestyle="none", clip_on=False, **look)


def _look(setting: Setting) -> dict:
    """Marker by fork, colour by frozen share, hollow where weights are merged, pale at the small rate."""
    if setting == SMALLER_MODEL:
        return {"marker": "*", "color": INK, "markersize": 10, "alpha": 1.0}
    assert setting.trunk_share is not None
    look = {"marker": MARKERS[setting.trunk_share], "color": COLOURS[setting.freeze], "markersize": 6.5}
    hollow = {"markerfacecolor": "none"} if setting.anneal == "merge" else {}
    return {**look, **hollow, "alpha": PALE if setting.small_rate else 1.0}


def _legend(used: Sequence[Setting]) -> list[Line2D]:
    """One entry for everything that tells the settings apart which were used."""
    branched = [setting for setting in used if setting.trunk_share is not None]

    def entry(label: str, **look) -> Line2D:
        return Line2D(
            [], [], **{"linestyle": "none", "marker": "o", "color": MUTED, "markersize": 6, "label": label, **look}
        )

    entries = [
        entry(f"{100 * freeze:.0f} % frozen", color=COLOURS[freeze])
        for freeze in sorted({setting.freeze for setting in branched})
    ]
    entries += [
        entry(f"fork at {100 * share:.0f} %", marker=MARKERS[share])
        for share in sorted({setting.trunk_share for setting in branched if setting.trunk_share is not None})
    ]
    if any(setting.anneal == "merge" for setting in branched):
        entries.append(entry("merged, not decayed", markerfacecolor="none"))
    if any(setting.small_rate for setting in branched):
        entries.append(entry("a third of the rate", alpha=PALE))
    if SMALLER_MODEL in used:
        entries.append(entry("smaller model, whole", marker="*", color=INK))
    return entries

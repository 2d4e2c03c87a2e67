"""The report of a refinement: one HTML page, csv tables beside it, and a summary for the terminal.

`layers.csv` (what came to each layer, what it dropped, and what nobody else would have), `reasons.csv`,
`languages.csv`, `domains.csv`, `dropped_samples.csv` depend on the input and the settings alone; `speed.csv` is what
this run took.
"""

import csv
import html
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corpus.refine.cascade import LAYERS
from corpus.refine.config import LAYER_NAMES
from corpus.refine.outcome import COUNTS, SAMPLES
from corpus.refine.passes import Job
from foundation.files import read_json, write_text
from foundation.tables import read_rows, write_rows, write_table

PASSES = ("judged", "scored", "edited")
PAGE = "report.html"
CSS_FILE = Path(__file__).with_name("report.css")
MEGABYTE = 1e6
RULES = LAYER_NAMES[:8]
# Of the rules the language asks py3langid.
MODELS = ("language", "perplexity", "quality", "clusters")
TOGETHER = {
    "rules": RULES,
    "without a model": tuple(name for name in LAYER_NAMES if name not in MODELS),
    "all": LAYER_NAMES,
}


@dataclass(frozen=True)
class LayerRow:
    """One layer's row of `layers.csv`. Of bytes: UTF-8 of the text as it came in.

    Attributes:
        state: "on", or why it is off.
        entered, kept, dropped: documents.
        alone: documents that it dropped and no other layer would have.
        changed: documents that were kept with a text which this layer changed.
        characters: by how many characters it changed them.
    """

    layer: str
    state: str
    entered: int
    kept: int
    dropped: int
    kept_share: float
    dropped_bytes: int
    alone: int
    changed: int
    characters: int


@dataclass(frozen=True)
class SpeedRow:
    """Seconds of one core in a layer, or in several, see `TOGETHER`, and megabytes of input a second: of all input, as
    every layer sees every document."""

    layer: str
    seconds: float
    mb_per_second: float


@dataclass(frozen=True)
class Report:
    """What a refinement did.

    Attributes:
        totals: documents and bytes, in and kept; personal data masked.
    """

    folder: Path
    layers: list[LayerRow]
    totals: dict[str, int]


def write_report(out: Path, job: Job, shards: Sequence[str], unknown: Sequence[str]) -> Report:
    """Adds up what the shards say, and writes page and tables.

    Args:
        unknown: files of the input folders that no reader knows.
    """
    counts: dict[str, Counter[str]] = {name: Counter() for name in COUNTS}
    samples: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    seconds: Counter[str] = Counter()
    for shard in shards:
        found = read_json(job.file("written", shard, "done"))
        for name in COUNTS:
            counts[name].update(found[name])
        for layer, own in found["samples"].items():
            samples[layer] = sorted([*samples.get(layer, []), *own], key=lambda pair: -pair[0])[:SAMPLES]
        for name in PASSES:
            seconds.update(read_json(job.file(name, shard, "done")))
    totals = {**counts["totals"], **{f"masked {kind}": n for kind, n in sorted(counts["masked"].items())}}
    layers = _layer_rows(job, counts)
    n_bytes = counts["totals"]["bytes_in"]
    speed = [
        SpeedRow(name, round(taken, 3), round(n_bytes / MEGABYTE / taken, 2))
        for name, taken in seconds.items()
        if taken
    ]
    for name, members in TOGETHER.items():
        total = sum(seconds[layer] for layer in members)
        speed.append(SpeedRow(name, round(total, 3), round(n_bytes / MEGABYTE / max(total, 1e-9), 2)))
    write_rows(out / "layers.csv", LayerRow, layers)
    write_rows(out / "speed.csv", SpeedRow, speed)
    write_table(out / "totals.csv", ("what", "count"), totals.items())
    for name, columns in (
        ("reasons", ("layer", "reason", "language")),
        ("languages", ("language",)),
        ("domains", ("domain",)),
    ):
        write_table(out / f"{name}.csv", *_table(name, columns, counts[name]))
    rows = [
        (layer, sample["reason"], sample["language"], sample["domain"], sample["alone"], sample["text"])
        for layer, found in samples.items()
        for _, sample in found
    ]
    columns = ("layer", "reason", "language", "domain", "alone", "text")
    write_table(out / "dropped_samples.csv", columns, sorted(rows, key=str))
    report = Report(out, layers, totals)
    write_text(out / PAGE, _page(report, speed, counts, samples, unknown))
    return report


def read_report(out: Path) -> Report:
    """What `write_report` wrote.

    Raises:
        ValueError: where it is not there.
    """
    try:
        with (out / "totals.csv").open(encoding="utf-8") as file:
            totals = {row["what"]: int(row["count"]) for row in csv.DictReader(file)}
    except OSError as error:
        raise ValueError(f"{out}: no report of a refinement here ({error.strerror})") from error
    return Report(out, read_rows(out / "layers.csv", LayerRow), totals)


def _layer_rows(job: Job, counts: dict[str, Counter[str]]) -> list[LayerRow]:
    entered, rows = counts["totals"]["in"], []
    for layer in LAYERS:
        dropped = counts["dropped"][layer.name]
        state = "on"
        if layer.name in job.config.without:
            state = "left out"
        elif layer.name in ("perplexity", "quality") and not job.config.trusted and job.config.models is None:
            state = "off: no trusted set"
        rows.append(
            LayerRow(
                layer=layer.name,
                state=state,
                entered=entered,
                kept=entered - dropped,
                dropped=dropped,
                kept_share=round((entered - dropped) / max(entered, 1), 6),
                dropped_bytes=counts["dropped_bytes"][layer.name],
                alone=counts["alone"][layer.name],
                changed=counts["changed_documents"][layer.name],
                characters=counts["changed"][layer.name],
            )
        )
        entered -= dropped
    # Nothing is lost: what the last layer keeps is what was written.
    assert entered == counts["totals"]["kept"], (entered, counts["totals"])
    return rows


def _table(name: str, columns: Sequence[str], counts: Counter[str]) -> tuple[Sequence[str], list[tuple[Any, ...]]]:
    """Columns and rows of counts whose keys are separated by tabs; for languages and domains one row per key."""
    if name == "reasons":
        ordered = sorted(counts.items(), key=lambda pair: (pair[0].split("\t")[0], -pair[1], pair[0]))
        return (*columns, "documents"), [(*key.split("\t"), n) for key, n in ordered]
    # A domain is what a record says: it may have tabs of its own.
    keys = sorted({key.rpartition("\t")[0] for key in counts})
    measures = ("in", "kept", "bytes_in", "bytes_kept")
    return (*columns, *measures), [(key, *(counts[f"{key}\t{measure}"] for measure in measures)) for key in keys]


def summary(report: Report) -> str:
    """One line per layer, and what is kept."""
    totals = report.totals
    lines = [f"{'layer':<16} {'in':>10} {'dropped':>9} {'kept':>8} {'alone':>8} {'changed':>8}"]
    for row in report.layers:
        note = "" if row.state == "on" else f"   {row.state}"
        lines.append(
            f"{row.layer:<16} {row.entered:>10,} {row.dropped:>9,} {row.kept_share:>8.2%} {row.alone:>8,}"
            f" {row.changed:>8,}{note}"
        )
    share = totals["bytes_kept"] / max(totals["bytes_in"], 1)
    masked = ", ".join(
        f"{n:,} {kind.removeprefix('masked ')}" for kind, n in totals.items() if kind.startswith("masked")
    )
    return "\n".join(
        [
            *lines,
            f"kept            {totals['kept']:,} of {totals['in']:,} documents, {totals['bytes_kept']:,} of"
            f" {totals['bytes_in']:,} bytes ({share:.1%})",
            f"masked          {masked or 'nothing'}",
            f"report          {report.folder / PAGE}",
        ]
    )


def _page(
    report: Report,
    speed: Sequence[SpeedRow],
    counts: dict[str, Counter[str]],
    samples: dict[str, list[tuple[int, dict[str, Any]]]],
    unknown: Sequence[str],
) -> str:
    totals = report.totals
    share = totals["bytes_kept"] / max(totals["bytes_in"], 1)
    speeds = {row.layer: row for row in speed}
    title = f"{totals['kept']:,} of {totals['in']:,} documents kept, {share:.1%} of the text"
    layers = []
    for row in report.layers:
        taken = speeds.get(row.layer)
        shown = (row.dropped - row.alone, row.alone)
        bar = "".join(f'<i style="width:{100 * n / max(row.entered, 1):.2f}%"></i>' for n in shown)
        cells = (f"{row.entered:,}", f"{row.dropped:,}", f"{row.kept_share:.2%}", f"{row.alone:,}", f"{row.changed:,}")
        layers.append(
            _row(
                row.layer if row.state == "on" else f"{row.layer} ({row.state})",
                f'<div class="bar">{bar}</div>',
                *cells,
                f"{taken.mb_per_second:g}" if taken else "",
            )
        )
    heads = ("layer", "dropped, and alone", "in", "dropped", "kept", "alone", "changed", "MB/s of one core")
    parts = [
        f"<h1>{title}</h1>",
        f"<p>{totals['bytes_kept'] / MEGABYTE:,.1f} of {totals['bytes_in'] / MEGABYTE:,.1f} MB. Kept and"
        " dropped add up to what came in, layer by layer. <b>Alone</b> counts what no other layer would have dropped:"
        " documents that a layer drops are shown to all layers behind it.</p>",
        _html_table(heads, layers),
        f'<p class="muted">All layers together: {speeds["all"].mb_per_second:g} MB/s of one core, the eight of rules'
        f" {speeds['rules'].mb_per_second:g}.</p>",
        "<h2>Languages and domains</h2>",
        *(
            _html_table(columns, [_row(*map(_cell, row)) for row in rows])
            for columns, rows in (
                _table("languages", ("language",), counts["languages"]),
                _table("domains", ("domain",), counts["domains"]),
            )
        ),
        "<h2>Personal data masked</h2>",
        f"<p>{', '.join(f'{n:,} {kind}' for kind, n in sorted(counts['masked'].items())) or 'None.'}</p>",
        "<h2>What was dropped, layer by layer</h2>",
        *(_dropped(layer, counts["reasons"], samples.get(layer.name, [])) for layer in LAYERS),
    ]
    if unknown:
        parts += ["<h2>Files that no reader knows</h2>", f"<p>{html.escape(', '.join(unknown))}</p>"]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{CSS_FILE.read_text()}</style><main>{''.join(parts)}</main></html>\n"
    )


def _dropped(layer: Any, reasons: Counter[str], samples: Sequence[tuple[int, dict[str, Any]]]) -> str:
    thresholds = "; ".join(
        f"{language}: " + ", ".join(f"{name} {json.dumps(value)}" for name, value in rules.items())
        for language, rules in layer.thresholds.items()
    )
    own: Counter[str] = Counter()
    for key, n in reasons.items():
        name, reason, language = key.split("\t")
        if name == layer.name:
            own[f"{reason} ({language})"] += n
    rows = [
        _row(
            html.escape(str(sample["reason"])),
            _cell(sample["language"] or ""),
            _cell(sample["domain"]),
            "yes" if sample["alone"] else "",
            text=sample["text"],
        )
        for _, sample in samples
    ]
    listed = ", ".join(f"{n:,} {html.escape(reason)}" for reason, n in own.most_common()) or "nothing"
    table = _html_table(("reason", "language", "domain", "alone", "text"), rows) if rows else ""
    return (
        f"<details><summary><b>{layer.name}</b>: {listed}</summary>"
        f'<p class="muted">{html.escape(layer.source)}.<br>{html.escape(thresholds)}</p>{table}</details>'
    )


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else html.escape(str(value))


def _row(*cells: str, text: str | None = None) -> str:
    last = "" if text is None else f'<td class="text">{html.escape(text)}</td>'
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}{last}</tr>"


def _html_table(heads: Sequence[str], rows: Sequence[str]) -> str:
    first = "".join(f"<th>{head}</th>" for head in heads)
    return f'<div class="scroll"><table><tr>{first}</tr>{"".join(rows)}</table></div>'

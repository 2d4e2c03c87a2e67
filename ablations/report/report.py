"""One self-contained HTML file for a comparison: no network, readable on a phone, light and dark, with a csv beside
every figure.

Everything comes from the run folders through `records.read_records`. The csv files lie in `figures/` beside the report
and, so that the file can be sent alone, inside it as data links too.
"""

import base64
import html
import json
import math
from pathlib import Path

from ablations.comparison.cost import CostComparison, compare_costs, cost_rows, duration
from ablations.comparison.records import Records, read_records
from ablations.report.domains import domain_table
from ablations.report.figures import Figure, all_figures
from ablations.report.sample import samples
from ablations.report.style import DARK, VARIABLES, svg
from ablations.report.table import (
    LOSS,
    METHOD,
    SHOWN,
    VERDICT,
    TableRow,
    footnotes,
    reference_cells,
    table_rows,
    table_text,
    with_unit,
    write_csv,
)
from foundation.command import CannotGoOn
from foundation.console import escaped
from foundation.files import write_text
from foundation.tables import write_table

REPORT_FILE = "report.html"
TABLE_FILE = "table.csv"
# What the first sentence says of the methods with each kind of verdict.
FINDINGS = {
    "better": "better",
    "worse": "worse",
    "smaller": "not told apart",
    "withheld": "withheld because the fork moved the loss by more than the difference",
}
CSS_FILE = Path(__file__).with_name("report.css")


def show(folder: Path) -> Path:
    """Writes the report of a comparison, from the run folders alone, and prints its table.

    Args:
        folder: of the comparison, `<out>/comparisons/<hash>`.

    Returns:
        The path of the report.

    Raises:
        ValueError: where the folder holds no comparison, or no finished branch of its baseline.
        CannotGoOn: behind the report, when damaged runs were left out of it.
    """
    records = read_records(folder)
    # Written first: whatever happens to what is printed, the report is there.
    report = write_report(records)
    print(f"\n{table_text(records)}\n\nreport: {report}", flush=True)
    if records.damaged:
        raise CannotGoOn(f"left out of the report, because damaged: {'; '.join(records.damaged)}")
    return report


def write_report(records: Records) -> Path:
    """Writes `report.html`, `table.csv` and `figures/*.csv` into the comparison's folder.

    Returns:
        The path of the report.
    """
    figures = all_figures(records)
    write_csv(records, records.folder / TABLE_FILE)
    for figure in figures:
        write_table(records.folder / "figures" / f"{figure.name}.csv", figure.columns, figure.rows)
    # Last, because the page holds the csv files as data links.
    path = records.folder / REPORT_FILE
    write_text(path, page(records, figures))
    return path


def page(records: Records, figures: list[Figure]) -> str:
    """The report as HTML.

    Args:
        figures: whose csv files, like the table's, must have been written already.
    """
    rows, costs = table_rows(records), compare_costs(records)
    staged = " on one staged trunk" if records.comparison.trunk_tokens else ""
    title = headline(records, rows)
    environment = html.escape(json.dumps(records.environment, indent=2))
    body = [
        f'<p class="kicker">Comparison of methods{staged}</p>',
        f"<h1>{html.escape(title)}</h1>",
        facts(records, rows, costs),
        "<h2>Result</h2>",
        table(records, rows),
        "".join(["<ul class=notes>", *(f"<li>{html.escape(note)}</li>" for note in footnotes(records)), "</ul>"]),
        f"<p>{csv_link(records.folder / TABLE_FILE)}</p>",
        domains(records),
        '<h2>Figures</h2><div class="figures">',
        *(figure_block(records, figure) for figure in figures),
        "</div>",
        "<h2>Cost</h2>",
        cost_table(costs),
        written_texts(records),
        "<h2>Methods</h2>",
        methods(records),
        "<h2>Plan and environment</h2>",
        f"<pre>{html.escape(records.comparison.plan)}</pre>",
        f"<p>Repeated by</p><pre>{html.escape(records.comparison.command)}</pre>",
        f"<details><summary>environment</summary><pre>{environment}</pre></details>",
    ]
    style = theme() + CSS_FILE.read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport"'
        ' content="width=device-width,'
        f' initial-scale=1"><title>{html.escape(title)}</title><style>{style}</style></head>\n<body><main>\n'
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def headline(records: Records, rows: list[TableRow]) -> str:
    """The finding in one sentence, without claiming more than the verdicts do, and what this run could have seen."""
    judged = [row for row in rows if not (row.is_baseline or row.method in records.comparison.controls)]
    found = []
    for kind, said in FINDINGS.items():
        if named := [row.method for row in judged if row.outcome.kind == kind]:
            found.append(f"{enumeration(named)} {'is' if len(named) == 1 else 'are'} {said}")
    limits = [row.outcome.detectable for row in judged if row.outcome.kind != "none" and row.outcome.detectable]
    if not found or not limits:
        return f"Against {records.comparison.baseline}, nothing can be said yet: no method has a pair and its noise."
    least, most = f"{min(limits):.4f}", f"{max(limits):.4f}"
    seen = least if least == most else f"{least} to {most}"
    return (
        f"Against {records.comparison.baseline} ({records.comparison.about}), {'; '.join(found)}; this run could have"
        f" seen a difference of {seen} bits per byte."
    )


def enumeration(names: list[str]) -> str:
    """Names as a sentence lists them: `a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def facts(records: Records, rows: list[TableRow], costs: CostComparison) -> str:
    """The handful of numbers a reader wants first."""
    comparison = records.comparison
    shown = {
        "baseline, bits/byte": f"{rows[0].bits_per_byte.mean:.4f}",
        "xz -9, bits/byte": f"{comparison.xz_bits_per_byte:.4f}",
        "tokens, trunk + branch": f"{with_unit(comparison.trunk_tokens)} + {with_unit(comparison.branch_tokens)}",
        "runs": str(sum(row.runs for row in rows)),
        "frozen": f"{comparison.boundary} of {comparison.n_layers} blocks" if comparison.boundary else "nothing",
        "cost of the staged runs": duration(costs.staged.seconds),
        "FLOPs, of one full run per method": share_text(costs.share_of_once),
        "FLOPs, of full runs with all seeds": share_text(costs.share_of_all_seeds),
        "the answer is about": comparison.about,
    }
    entries = (f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in shown.items())
    return f'<dl class="facts">{"".join(entries)}</dl>'


def share_text(share: float) -> str:
    """In percent; a dash where not all costs are known."""
    return "-" if math.isnan(share) else f"{100 * share:.0f} %"


def table(records: Records, rows: list[TableRow]) -> str:
    """The result table; each cell carries its heading, so that on a narrow screen a row can become a card."""
    colours = {"better": "verdict better", "worse": "verdict worse"}
    head = "".join(
        f"<th{' class=verdict' if column is VERDICT else ''}>{html.escape(column.heading or '')}</th>"
        for column in SHOWN
    )
    lines = []
    for row in rows:
        line = []
        for column in SHOWN:
            cell_class = f' class="{colours.get(row.outcome.kind, "verdict muted")}"' if column is VERDICT else ""
            label = html.escape(column.heading or "")
            line.append(f'<td{cell_class} data-label="{label}">{html.escape(column.cell(row))}</td>')
        lines.append("".join(line))
    lines += [
        f'<td class="muted">{cells[METHOD]}</td><td data-label="{LOSS.heading}">{cells[LOSS]}</td>'
        for cells in reference_cells(records)
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<div class="scroll"><table class="result"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def domains(records: Records) -> str:
    """Bits per byte by domain; nothing where the text has none."""
    rows = domain_table(records)
    if not rows:
        return ""
    names = [html.escape(cell) for cell in rows[0]]
    head = "".join(f"<th>{name}</th>" for name in names)
    cells = (
        "".join(f'<td data-label="{name}">{html.escape(cell)}</td>' for name, cell in zip(names, row))
        for row in rows[1:]
    )
    lines = "".join(f"<tr>{line}</tr>" for line in cells)
    return (
        "<h2>By domain</h2><p>Bits per byte of the validation text's domains, mean over runs.</p>"
        f'<div class="scroll"><table class="domains"><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def written_texts(records: Records) -> str:
    """What trained models write; nothing where none is left."""
    found = samples(records)
    if not found:
        return ""
    texts = (
        f"<p>{html.escape(each.method)}, {each.bits_per_byte:.4f} bits per byte,"
        f" <code>{html.escape(each.run)}</code></p>"
        f'<pre class="written">{html.escape(escaped(each.text))}</pre>'
        for each in found
    )
    return (
        "<h2>What the models write</h2><p>From an empty document, temperature 0.8, top-p 0.95, seed 0: what a level of"
        f" bits per byte looks like.</p>{''.join(texts)}"
    )


def figure_block(records: Records, figure: Figure) -> str:
    """A figure with its title, its caption and a link to its csv."""
    drawn = svg(lambda: figure.draw(figure.rows), figure.title)
    link = csv_link(records.folder / "figures" / f"{figure.name}.csv")
    caption = f"<figcaption>{html.escape(figure.caption)} {link}</figcaption>"
    return f'<figure id="{figure.name}"><h3>{html.escape(figure.title)}</h3>{drawn}{caption}</figure>'


def csv_link(path: Path) -> str:
    """A link that holds the whole file, so that it works where the report was sent alone."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<a download="{path.name}" href="data:text/csv;base64,{data}">{path.name}</a>'


def cost_table(costs: CostComparison) -> str:
    """The costs as a table: FLOPs, time, and the share of what the staged runs cost."""
    lines = []
    for what, flops, seconds in cost_rows(costs):
        row_class = ' class="sum"' if what.startswith("staged") else ""
        share = f"{100 * flops / costs.staged.flops:.0f} %"
        lines.append(
            f"<tr{row_class}><td>{html.escape(what)}</td><td>{flops:.3g}</td>"
            f"<td>{duration(seconds)}</td><td>{share}</td></tr>"
        )
    head = "<tr><th></th><th>FLOPs</th><th>time</th><th>of staged</th></tr>"
    note = (
        "From scratch: every method's whole network for the same tokens, evaluation left out; time is FLOPs divided by"
        " the trunk's measured speed. Controls measure noise and are no method: they count on the staged side alone."
    )
    return (
        f'<div class="scroll"><table class="cost">{head}{"".join(lines)}</table></div><ul'
        f" class=notes><li>{note}</li></ul>"
    )


def methods(records: Records) -> str:
    """Every method's question and what it changes."""
    entries = (
        f"<dt>{html.escape(m.name)}</dt><dd>{html.escape(m.question)} Changes: {m.kind}.</dd>"
        for m in records.comparison.methods
    )
    return f'<dl class="methods">{"".join(entries)}</dl>'


def theme() -> str:
    """The figure colours as CSS variables, light and dark."""
    light = "".join(f"{variable}:{colour};" for colour, variable in VARIABLES.items())
    dark = "".join(f"{variable}:{colour};" for variable, colour in DARK.items())
    return f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"

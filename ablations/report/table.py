"""The table of a comparison: one row per method, as text for the terminal and as csv.

The csv holds the same rows in full precision, with the intervals as half widths.
"""

import csv
import dataclasses
import statistics
from pathlib import Path

from ablations.comparison.cost import compare_costs, cost_text
from ablations.comparison.records import Records
from ablations.comparison.statistics import (
    REFERENCE,
    Interval,
    mean_interval,
    noise_statement,
    paired_difference,
    verdict,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableRow:
    """One method. `difference` is None for the baseline; means over runs where nothing else is said.

    Attributes:
        bits_per_byte: validation text, lower is better.
        mean_experts: real experts per token in the layers above the boundary, at evaluation; asked_experts: what it was
            asked to be.
        active_parameters, forward_flops: per token, whole network.
        cache_bytes_4k, cache_bytes_64k: per token of a sequence of that length.
        tokens_per_second: at the median step of all branches.
    """

    method: str
    runs: int
    bits_per_byte: Interval
    difference: Interval | None
    verdict: str
    mean_experts: float
    asked_experts: float
    active_parameters: float
    forward_flops: float
    cache_bytes_4k: float
    cache_bytes_64k: float
    tokens_per_second: float


def table_rows(records: Records) -> list[TableRow]:
    """One row per method with a finished branch; the baseline first."""
    baseline = {key: result.bits_per_byte for key, result in records.results[records.comparison.baseline].items()}
    rows = []
    for method in records.methods:
        results = records.results[method]
        losses = {key: result.bits_per_byte for key, result in results.items()}
        is_baseline = method == records.comparison.baseline
        # A method whose finished runs share no seed with the baseline's (an interrupted comparison) has nothing to be
        # paired with yet.
        difference = None if is_baseline or not losses.keys() & baseline.keys() else paired_difference(losses, baseline)
        seconds = [seconds for run in records.branches[method].values() for seconds in run.seconds]

        def mean(name: str, results=results) -> float:
            return statistics.fmean(getattr(result, name) for result in results.values())

        rows.append(
            TableRow(
                method=method,
                runs=len(results),
                bits_per_byte=mean_interval(losses),
                difference=difference,
                verdict=REFERENCE if is_baseline else verdict(difference) if difference else "no pair yet",
                mean_experts=mean("mean_experts"),
                asked_experts=mean("asked_experts"),
                active_parameters=mean("active_parameters"),
                forward_flops=mean("forward_flops"),
                cache_bytes_4k=mean("cache_bytes_4k"),
                cache_bytes_64k=mean("cache_bytes_64k"),
                tokens_per_second=records.comparison.tokens_per_step / statistics.median(seconds),
            )
        )
    return rows


HEADINGS = (
    "method",
    "bits/byte",
    "difference",
    "verdict",
    "experts",
    "active",
    "FLOPs/token",
    "KV/token 4K",
    "KV/token 64K",
    "tokens/s",
)


def cells(row: TableRow) -> tuple[str, ...]:
    """The row as a reader sees it, in the order of `HEADINGS`."""
    difference = "" if row.difference is None else with_interval(row.difference, signed=True)
    return (
        row.method,
        with_interval(row.bits_per_byte),
        difference,
        row.verdict,
        f"{row.mean_experts:.2f} ({100 * (row.mean_experts / row.asked_experts - 1):+.1f} %)",
        with_unit(row.active_parameters),
        with_unit(row.forward_flops),
        with_unit(row.cache_bytes_4k) + "B",
        with_unit(row.cache_bytes_64k) + "B",
        f"{row.tokens_per_second:,.0f}",
    )


def footnotes(records: Records) -> list[str]:
    """What a reader must know to read the table right."""
    comparison = records.comparison
    above = ", the part above the frozen boundary" if comparison.boundary else ""
    notes = [
        f"bits/byte: validation text of {comparison.valid_bytes:,} bytes, lower is better.",
        noise_statement(len(comparison.trunk_seeds), len(comparison.branch_seeds)),
        (
            "difference: method minus baseline, paired by seed; a verdict is at 95 %, so of twenty methods without"
            " effect about one earns one."
        ),
        (
            f"experts: real experts per token in {comparison.trained_blocks}{above}, and how far off what was asked;"
            " thresholds are set on text that is neither trained on nor measured. Active parameters and FLOPs/token"
            " (forward): the whole network."
        ),
        "tokens/s: training a branch" + (", the frozen prefix read from the cache." if comparison.boundary else "."),
    ]
    if comparison.fresh:
        notes.append(
            f"Blocks from {comparison.boundary} on are fresh in every branch, the baseline's too, because a method"
            " changes them."
        )
    if "no_op" in records.methods:
        notes.append(
            "no_op: the baseline once more with other branch seeds, so its data order differs too; what separates them"
            " is noise."
        )
        notes.append(
            "The other methods share the baseline's data order seed by seed; it cancels in their differences: narrower"
            " intervals."
        )
    planned = len(comparison.trunk_seeds) * len(comparison.branch_seeds)
    finished = {method.name: len(records.results.get(method.name, ())) for method in comparison.methods}
    if unfinished := [f"{method} {count} of {planned}" for method, count in finished.items() if count < planned]:
        notes.append(f"Not all runs are finished: {', '.join(unfinished)}.")
    return notes


def table_text(records: Records) -> str:
    """Table, footnotes and ledger for the terminal."""
    xz = ("xz -9, same text", f"{records.comparison.xz_bits_per_byte:.4f}", *("" for _ in HEADINGS[2:]))
    body = [HEADINGS, *(cells(row) for row in table_rows(records)), xz]
    widths = [max(len(line[column]) for line in body) for column in range(len(HEADINGS))]
    # Names and verdicts read from the left, numbers line up at the right.
    lines = [
        "  ".join(c.ljust(w) if i in (0, 3) else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))).rstrip()
        for line in body
    ]
    lines.insert(1, "-" * max(len(line) for line in lines))
    return "\n".join([*lines, "", *footnotes(records), "", cost_text(compare_costs(records))])


def write_csv(records: Records, path: Path) -> None:
    """The rows of the table in full precision."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        writer.writerows(csv_row(row) for row in table_rows(records))


CSV_COLUMNS = (
    "method",
    "runs",
    "bits_per_byte",
    "bits_per_byte_half_width",
    "difference",
    "difference_half_width",
    "verdict",
    "mean_experts",
    "asked_experts",
    "active_parameters",
    "forward_flops_per_token",
    "cache_bytes_per_token_4k",
    "cache_bytes_per_token_64k",
    "tokens_per_second",
)


def csv_row(row: TableRow) -> tuple:
    difference = (None, None) if row.difference is None else (row.difference.mean, row.difference.half_width)
    return (
        row.method,
        row.runs,
        row.bits_per_byte.mean,
        row.bits_per_byte.half_width,
        *difference,
        row.verdict,
        row.mean_experts,
        row.asked_experts,
        row.active_parameters,
        row.forward_flops,
        row.cache_bytes_4k,
        row.cache_bytes_64k,
        row.tokens_per_second,
    )


def with_interval(interval: Interval, signed: bool = False) -> str:
    sign = "+" if signed else ""
    mean = f"{interval.mean:{sign}.4f}"
    return mean if interval.half_width is None else f"{mean} ± {interval.half_width:.4f}"


def with_unit(number: float) -> str:
    """Three significant digits with k, M, G or T (powers of 1000)."""
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        # 999.5 k already rounds to 1 M.
        if abs(number) >= 0.9995 * factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:.3g} "

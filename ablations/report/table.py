"""The table of a comparison: one row per method, as text for the terminal and as csv.

A column is declared once, in `COLUMNS`; the text, the csv and the report are loops over that list. The csv holds the
same rows in full precision, with the intervals as half widths.
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Literal

from ablations.comparison.cost import compare_costs, cost_text
from ablations.comparison.records import BranchResult, Records
from ablations.comparison.reliability import reliability_statement
from ablations.comparison.statistics import Interval, RunKey, mean_interval, student_quantile
from ablations.comparison.verdicts import Outcome, controls_statement, noise_statement, outcomes, would_see
from ablations.report.domains import domain_text
from foundation.tables import write_table

# Share of the baseline's FLOPs by which an arm may differ and count as equal.
EQUAL = 0.02
# Of the trunks in the csv.
TRUNK = "trunk"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableRow:
    """One method: its finished branches beside the baseline's, from which the columns take their values.

    Attributes:
        method: its name.
        is_baseline: whether it is what the others are measured against.
        results: of its finished branches.
        outcome: beside the baseline.
    """

    method: str
    is_baseline: bool
    results: Mapping[RunKey, BranchResult]
    outcome: Outcome

    @property
    def runs(self) -> int:
        """Finished branches."""
        return len(self.results)

    @cached_property
    def bits_per_byte(self) -> Interval:
        """Of the validation text, lower is better."""
        return mean_interval({key: result.bits_per_byte for key, result in self.results.items()})

    @property
    def difference(self) -> Interval | None:
        """Method minus baseline in bits per byte, paired by seed; None for the baseline and where nothing pairs."""
        return None if self.outcome.difference is None else self.outcome.difference.interval

    @property
    def verdict(self) -> str:
        """What the difference allows to say, see `ablations.comparison.verdicts`."""
        return self.outcome.words

    def mean(self, measured: str) -> float:
        """The mean over branches of one number of `BranchResult`, named by its field."""
        return statistics.fmean(getattr(result, measured) for result in self.results.values())


def table_rows(records: Records) -> list[TableRow]:
    """One row per method with a finished branch; the baseline first."""
    comparison = records.comparison
    found = outcomes(records)
    return [
        TableRow(
            method=method,
            is_baseline=method == comparison.baseline,
            results=records.results[method],
            outcome=found[method],
        )
        for method in records.methods
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """One column of the table.

    Attributes:
        name: in the csv.
        value: what the csv holds, in full precision; None is an empty cell.
        heading: above the column, for a reader; None leaves the column to the csv.
        text: the cell as a reader sees it; given where there is a heading.
        aligned: of names and verdicts to the left, of numbers to the right, so that their digits line up.
    """

    name: str
    value: Callable[[TableRow], str | float | None]
    heading: str | None = None
    text: Callable[[TableRow], str] | None = None
    aligned: Literal["left", "right"] = "right"

    def __post_init__(self) -> None:
        assert (self.heading is None) == (self.text is None), f"column {self.name!r}: a heading and a text, or neither"

    def cell(self, row: TableRow) -> str:
        """The cell as a reader sees it."""
        assert self.text is not None, f"column {self.name!r} is not shown"
        return self.text(row)


METHOD = Column(
    name="method", value=lambda row: row.method, heading="method", text=lambda row: row.method, aligned="left"
)
RUNS = Column(name="runs", value=lambda row: row.runs)
LOSS = Column(
    name="bits_per_byte",
    value=lambda row: row.bits_per_byte.mean,
    heading="bits/byte",
    text=lambda row: with_interval(row.bits_per_byte),
)
VERDICT = Column(
    name="verdict", value=lambda row: row.verdict, heading="verdict", text=lambda row: row.verdict, aligned="left"
)
COLUMNS = (
    METHOD,
    RUNS,
    LOSS,
    Column(name="bits_per_byte_half_width", value=lambda row: row.bits_per_byte.half_width),
    Column(
        name="difference",
        value=lambda row: None if row.difference is None else row.difference.mean,
        heading="difference",
        text=lambda row: "" if row.difference is None else with_interval(row.difference, signed=True),
    ),
    Column(
        name="difference_half_width",
        value=lambda row: None if row.difference is None else row.difference.half_width,
    ),
    Column(
        name="detectable",
        value=lambda row: row.outcome.detectable,
        heading="would see",
        text=lambda row: "" if row.outcome.detectable is None else f"{row.outcome.detectable:.4f}",
    ),
    Column(
        name="fork_shock",
        value=lambda row: row.outcome.fork_shock,
        heading="at the fork",
        text=lambda row: "" if row.outcome.fork_shock is None else f"{row.outcome.fork_shock:+.4f}",
    ),
    VERDICT,
    # Both numbers of experts are per token and layer above the boundary: used at evaluation, and asked for.
    Column(
        name="mean_experts",
        value=lambda row: row.mean("mean_experts"),
        heading="experts",
        text=lambda row: used_of_asked(row.mean("mean_experts"), row.mean("asked_experts")),
    ),
    Column(name="asked_experts", value=lambda row: row.mean("asked_experts")),
    # Parameters and FLOPs are per token, of the whole network.
    Column(
        name="total_parameters",
        value=lambda row: row.mean("total_parameters"),
        heading="total",
        text=lambda row: with_unit(row.mean("total_parameters")),
    ),
    Column(
        name="active_parameters",
        value=lambda row: row.mean("active_parameters"),
        heading="active",
        text=lambda row: with_unit(row.mean("active_parameters")),
    ),
    Column(
        name="forward_flops_per_token",
        value=lambda row: row.mean("forward_flops"),
        heading="FLOPs/token",
        text=lambda row: with_unit(row.mean("forward_flops")),
    ),
    # Bytes of the cache per token of a sequence of 4,096 and of 65,536 tokens.
    Column(
        name="cache_bytes_per_token_4k",
        value=lambda row: row.mean("cache_bytes_4k"),
        heading="KV/token 4K",
        text=lambda row: with_unit(row.mean("cache_bytes_4k")) + "B",
    ),
    Column(
        name="cache_bytes_per_token_64k",
        value=lambda row: row.mean("cache_bytes_64k"),
        heading="KV/token 64K",
        text=lambda row: with_unit(row.mean("cache_bytes_64k")) + "B",
    ),
)
SHOWN = tuple(column for column in COLUMNS if column.heading is not None)


def footnotes(records: Records) -> list[str]:
    """What a reader must know to read the table right."""
    comparison = records.comparison
    above = ", the part above the frozen boundary" if comparison.boundary else ""
    notes = [
        f"bits/byte: validation text of {comparison.valid_bytes:,} bytes, lower is better.",
        f"What the answer is about: {comparison.about}.",
        noise_statement(records),
        (
            "difference: method minus baseline, paired by seed and text, with its 95 % interval. Verdicts are corrected"
            " for the number of methods (Holm): a table of methods without effect holds one in 5 % of cases at most."
        ),
        (
            "would see: the true difference that this run would have told from zero in 80 % of cases. at the fork:"
            " training loss of the first step, ahead of any update, minus the baseline's; a verdict on less than that"
            " is withheld."
        ),
        (
            f"experts: real experts per token in {comparison.trained_blocks}{above}, and how far off what was asked;"
            " thresholds are set on text that is neither trained on nor measured. Total and active parameters and"
            " FLOPs/token (forward): the whole network."
        ),
    ]
    notes[1:1] = [few_seeds(records), *below_the_trunk(records)]
    if unequal := unequal_budgets(records):
        notes.append(unequal)
    if comparison.fresh and comparison.trunk_tokens:
        notes.append(
            f"Blocks from {comparison.boundary} on are fresh in every branch, the baseline's too, because a method"
            " changes them."
        )
    if "twin" in records.methods:
        notes.append(
            "twin: the baseline once more in the same order, its weights at the fork changed by as much as rounding"
            " does; what separates them is rounding."
        )
    if "other_order" in records.methods:
        notes.append(
            "other_order: the baseline once more with other branch seeds, so its data order differs too; what separates"
            " them is noise."
        )
    if sentence := controls_statement(records):
        notes.append(sentence)
    if offer := would_see(records):
        notes.append(offer)
    if comparison.form:
        notes.append(reliability_statement(comparison.form))
    planned = len(comparison.trunk_seeds) * len(comparison.branch_seeds)
    finished = {method.name: len(records.results.get(method.name, ())) for method in comparison.methods}
    if unfinished := [f"{method} {count} of {planned}" for method, count in finished.items() if count < planned]:
        notes.append(f"Not all runs are finished: {', '.join(unfinished)}.")
    if records.missing:
        notes.append(
            f"Missing: {', '.join(map(str, records.missing))}. Curves and costs of that training are left out; what is"
            " shown of the branches is whole. A comparison that needs the trunk trains it again."
        )
    notes += [f"Damaged and left out: {sentence}." for sentence in records.damaged]
    if records.damaged:
        notes.append(f"The command of this comparison: {records.comparison.command}")
    return notes


def few_seeds(records: Records) -> str:
    """What stands behind a plus-minus sign, and why it is so large where there are few runs."""
    comparison = records.comparison
    n = len(comparison.trunk_seeds) if len(comparison.trunk_seeds) > 1 else len(comparison.branch_seeds)
    what = "trunks" if len(comparison.trunk_seeds) > 1 else "seeds"
    if n < 2:
        return "One seed: no spread of bits/byte is known, so none is shown beside it."
    t = student_quantile(n - 1)
    return (
        f"Behind bits/byte: half of a 95 % interval, {t:.1f} standard errors of the mean over {n} {what} (Student's t"
        f" with {n - 1} degree{'s' * (n > 2)} of freedom; 12.7 with two {what}, 2.0 with many)."
    )


def trunk_bits(records: Records) -> float | None:
    """Bits per byte at the trunks' ends, their mean; None where none is left."""
    trunks = [run.bits_per_byte for run in records.trunks.values()]
    return statistics.fmean(trunks) if trunks else None


def below_the_trunk(records: Records) -> list[str]:
    """A warning for arms that end worse than the trunk that they start from: more training has cost them."""
    if (trunk := trunk_bits(records)) is None:
        return []
    worse = {row.method: row.bits_per_byte.mean - trunk for row in table_rows(records)}
    worse = {method: more for method, more in worse.items() if more > 0}
    if not worse:
        return []
    named = ", ".join(f"{method} by {more:.4f}" for method, more in worse.items())
    return [
        f"WARNING: worse than the trunk that they start from ({trunk:.4f}): {named}. Such branches are too short, or"
        " their rate too high, to say what a method is worth: more --tokens, a smaller --trunk-share, another"
        " --learning-rate."
    ]


def unequal_budgets(records: Records) -> str | None:
    """One sentence on arms that train on other tokens, or compute with other FLOPs per token, than the baseline."""
    rows = {row.method: row for row in table_rows(records)}
    baseline, own = rows[records.comparison.baseline], records.branches[records.comparison.baseline]
    steps = len(next(iter(own.values())).losses)
    found = []
    for method, row in rows.items():
        flops = row.mean("forward_flops") / baseline.mean("forward_flops")
        tokens = len(next(iter(records.branches[method].values())).losses) / steps
        parts = [f"{tokens:.2g} times the tokens"] * (abs(tokens - 1) > 0.01)
        parts += [f"{flops:.2f} times the FLOPs per token"] * (abs(flops - 1) > EQUAL)
        if parts:
            found.append(f"{method} ({', '.join(parts)})")
    return f"Not at the baseline's cost: {'; '.join(found)}." if found else None


def reference_cells(records: Records) -> list[dict[Column, str]]:
    """The last lines of the table: where branches begin, and what a compressor without a model needs for the text."""
    trunk = trunk_bits(records)
    lines = [] if trunk is None else [{METHOD: "trunk at its end", LOSS: f"{trunk:.4f}"}]
    return [*lines, {METHOD: "xz -9, same text", LOSS: f"{records.comparison.xz_bits_per_byte:.4f}"}]


def table_text(records: Records) -> str:
    """Table, footnotes and costs for the terminal."""
    body = [
        [column.heading or "" for column in SHOWN],
        *([column.cell(row) for column in SHOWN] for row in table_rows(records)),
        *([cells.get(column, "") for column in SHOWN] for cells in reference_cells(records)),
    ]
    widths = [max(len(cell) for cell in cells) for cells in zip(*body)]
    lines = ["  ".join(_padded(*place) for place in zip(SHOWN, line, widths)).rstrip() for line in body]
    lines.insert(1, "-" * max(len(line) for line in lines))
    domains = [domain_text(records), ""] * bool(domain_text(records))
    return "\n".join([*lines, "", *footnotes(records), "", *domains, cost_text(compare_costs(records))])


def _padded(column: Column, cell: str, width: int) -> str:
    return cell.ljust(width) if column.aligned == "left" else cell.rjust(width)


def write_csv(records: Records, path: Path) -> None:
    """The rows of the table in full precision, and the trunks' as `trunk`."""
    rows = [[column.value(row) for column in COLUMNS] for row in table_rows(records)]
    if (trunk := trunk_bits(records)) is not None:
        known = {METHOD: TRUNK, RUNS: len(records.trunks), LOSS: trunk}
        rows.append([known.get(column) for column in COLUMNS])
    write_table(path, [column.name for column in COLUMNS], rows)


def with_interval(interval: Interval, signed: bool = False) -> str:
    """Four decimals, with the half width where one is known; `signed` also shows a plus."""
    sign = "+" if signed else ""
    mean = f"{interval.mean:{sign}.4f}"
    return mean if interval.half_width is None else f"{mean} ± {interval.half_width:.4f}"


def used_of_asked(used: float, asked: float) -> str:
    """A mean of experts, and how far off what was asked for it is, in percent."""
    return f"{used:.2f} ({100 * (used / asked - 1):+.1f} %)"


def with_unit(number: float) -> str:
    """Three significant digits with k, M, G or T (powers of 1000)."""
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        # 999.5 k already rounds to 1 M.
        if abs(number) >= 0.9995 * factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:.3g} "

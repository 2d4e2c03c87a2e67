"""The figures of a report as data: each is a small table, drawn from that table only, so the csv beside a figure is
what was plotted.

Bands over seeds show the range from the lowest to the highest run, not a confidence interval: with three seeds that is
what is known of them.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable

from matplotlib.figure import Figure as Drawing

from ablations.comparison.cost import compare_costs
from ablations.comparison.records import Comparison, RecordedRun, Records
from ablations.comparison.verdicts import outcomes
from ablations.report import drawing

FigureRows = list[tuple]
# Points per curve: enough for its shape, few enough that the noise of single batches is averaged away.
TRUNK_BINS, BRANCH_BINS, DIFFERENCE_BINS = 48, 10, 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure.

    Attributes:
        name: of its csv file, and its anchor in the report.
        title, caption: for the reader.
        columns, rows: its csv; the first column names the series.
        draw: makes its picture from the rows and from nothing else.
    """

    name: str
    title: str
    caption: str
    columns: tuple[str, ...]
    rows: FigureRows
    draw: Callable[[FigureRows], Drawing]


def all_figures(records: Records) -> list[Figure]:
    """Every figure that the finished runs can fill, in the order of the report."""
    kinds = (differences, loss_curves, branch_differences, loss_against_experts, histogram, routers, costs)
    return [figure for kind in kinds if (figure := kind(records)).rows]


def differences(records: Records) -> Figure:
    """The result: every method's paired difference from the baseline, its interval and its single runs."""
    baseline = {key: result.bits_per_byte for key, result in records.results[records.comparison.baseline].items()}
    rows: FigureRows = []
    for method, outcome in outcomes(records).items():
        if outcome.difference is None:
            continue
        losses = {key: result.bits_per_byte for key, result in records.results[method].items() if key in baseline}
        interval = outcome.difference.interval
        rows.append((method, "mean", interval.mean, interval.low, interval.high))
        rows += [(method, f"trunk {t} seed {s}", losses[t, s] - baseline[t, s], None, None) for t, s in sorted(losses)]
    return Figure(
        name="differences",
        title="Difference from the baseline",
        caption=(
            "Validation bits per byte, method minus baseline, paired by seed; left of zero is better. "
            "Bar: 95 % interval of the mean. Small dots: single runs."
        ),
        columns=("method", "what", "difference", "low", "high"),
        rows=rows,
        draw=drawing.differences,
    )


def loss_curves(records: Records) -> Figure:
    """Training loss over the whole token budget: the trunk, then every method's branches."""
    comparison = records.comparison
    rows: FigureRows = [
        ("trunk", *point) for point in band([curve(run, comparison) for run in records.trunks.values()], TRUNK_BINS)
    ]
    for method in records.methods:
        runs = records.branches[method].values()
        rows += [
            (method, *point)
            for point in band([curve(run, comparison, comparison.trunk_tokens) for run in runs], BRANCH_BINS)
        ]
    return Figure(
        name="loss_curves",
        title="Training loss",
        caption=(
            "Bits per byte of the training batches against tokens seen. Line: mean over seeds; band: range over seeds."
        ),
        columns=("series", "tokens", "mean", "low", "high"),
        rows=rows,
        draw=drawing.loss_curves,
    )


def branch_differences(records: Records) -> Figure:
    """Training loss of a branch minus that of the baseline's branch with the same seed, which sees the same batches in
    the same order."""
    baseline = records.branches[records.comparison.baseline]
    rows: FigureRows = []
    for method in records.methods[1:]:
        # It sees other batches: nothing to subtract batch by batch.
        if method in records.comparison.reordered:
            continue
        pairs = [(run, baseline[key]) for key, run in records.branches[method].items() if key in baseline]
        rows += [
            (method, *point)
            for point in band([curve_difference(*pair, records.comparison) for pair in pairs], DIFFERENCE_BINS)
        ]
    return Figure(
        name="branch_differences",
        title="Branches against the baseline, batch by batch",
        caption=(
            "Training bits per byte of each branch minus those of the baseline's branch with the same seed, which sees"
            " the same batches (other_order sees others and is left out). Below zero is better. Line: mean over seeds;"
            " band: range over seeds."
        ),
        columns=("method", "tokens", "mean", "low", "high"),
        rows=rows,
        draw=drawing.branch_differences,
    )


def loss_against_experts(records: Records) -> Figure:
    """The same weights under other budgets: what each method loses with fewer experts."""
    rows: FigureRows = []
    tokens = next(iter(records.results[records.comparison.baseline].values())).budget_tokens
    for method in records.methods:
        results = list(records.results[method].values())
        # All branches of a comparison were measured at the same budgets, in ascending order.
        for points in zip(*(result.budgets for result in results)):
            losses = [point.bits_per_byte for point in points]
            experts = statistics.fmean(point.mean_experts for point in points)
            rows.append((method, experts, statistics.fmean(losses), min(losses), max(losses)))
    return Figure(
        name="loss_against_experts",
        title="Loss against experts used",
        caption=(
            "The trained weights run with other mean numbers of experts per token in"
            f" {records.comparison.trained_blocks}: bits per byte of {tokens:,} tokens of the validation text, in"
            " batches spaced evenly through it. Line: mean over seeds; band: range over seeds."
        ),
        columns=("method", "mean_experts", "mean", "low", "high"),
        rows=rows,
        draw=drawing.loss_against_experts,
    )


def histogram(records: Records) -> Figure:
    """How many experts the tokens of the validation text used."""
    rows: FigureRows = []
    for method in records.methods:
        counts = [result.experts_histogram for result in records.results[method].values()]
        everything = sum(sum(count) for count in counts)
        for experts in range(max(len(count) for count in counts)):
            used = sum(count[experts] for count in counts if experts < len(count))
            rows.append((method, experts, used / everything))
    return Figure(
        name="experts_per_token",
        title="Experts per token",
        caption=(
            "Share of the validation text's (token, layer) pairs that used each number of experts, all seeds together;"
            " the tick marks the mean."
        ),
        columns=("method", "experts", "share"),
        rows=rows,
        draw=drawing.histogram,
    )


def routers(records: Records) -> Figure:
    """What the routers of each layer did when training ended."""
    rows: FigureRows = []
    for name, runs in {
        "trunk": records.trunks,
        **{method: records.branches[method] for method in records.methods},
    }.items():
        last = [run.diagnostics[-1].layers for run in runs.values() if run.diagnostics]
        # Runs of one name report the same layers: the trunk all, a branch those that it trains.
        for layers in zip(*last):
            values = (
                [layer.realised for layer in layers],
                [layer.dead_experts for layer in layers],
                [layer.entropy for layer in layers],
            )
            rows.append((name, layers[0].layer, *(statistics.fmean(value) for value in values)))
    return Figure(
        name="routers",
        title="Routers by layer",
        caption=(
            "In the last step of training, mean over seeds: experts per token, experts that no token of the step used,"
            " and the entropy of the router's probabilities. The trunk has all layers, a branch those that it trains."
        ),
        columns=("series", "layer", "mean_experts", "dead_experts", "entropy"),
        rows=rows,
        draw=drawing.routers,
    )


def costs(records: Records) -> Figure:
    """The costs: staged phases against one full training per method."""
    costs = compare_costs(records)
    rows: FigureRows = [("staged", phase, cost.flops, cost.seconds) for phase, cost in costs.phases.items()]
    rows += [("from scratch", method, cost.flops, cost.seconds) for method, cost in costs.per_method.items()]
    return Figure(
        name="costs",
        title="What it cost",
        caption=(
            f"FLOPs of this comparison (branches per method: {costs.seeds}) and of training each method once from"
            " scratch; controls measure noise and are no method."
        ),
        columns=("way", "part", "flops", "seconds"),
        rows=rows,
        draw=drawing.costs,
    )


def curve(run: RecordedRun, comparison: Comparison, offset: int = 0) -> list[tuple[int, float]]:
    """The training curve of a run.

    Args:
        comparison: for the tokens of a step and the bytes of a token.
        offset: tokens seen before the first step.

    Returns:
        (tokens seen, training bits per byte) of every step.
    """
    to_bits_per_byte = 1 / (math.log(2) * comparison.bytes_per_token)
    return [
        (offset + step * comparison.tokens_per_step, loss * to_bits_per_byte) for step, loss in enumerate(run.losses, 1)
    ]


def curve_difference(run: RecordedRun, baseline: RecordedRun, comparison: Comparison) -> list[tuple[int, float]]:
    """(tokens since the branch began, training bits per byte minus the baseline's) of every step of a pair that saw the
    same batches."""
    return [
        (tokens, y - reference)
        for (tokens, y), (_, reference) in zip(curve(run, comparison), curve(baseline, comparison))
    ]


def band(curves: list[list[tuple[int, float]]], bins: int) -> FigureRows:
    """Mean and range over curves of the same steps.

    Args:
        curves: (tokens, value) of every step; the longer ones are cut to the shortest.
        bins: pieces of equal length within which each curve is averaged first, fewer where there are fewer steps.

    Returns:
        (tokens at the end of the piece, mean, low, high) of every piece.
    """
    n_steps = min((len(points) for points in curves), default=0)
    bins = min(bins, n_steps)
    rows: FigureRows = []
    for number in range(bins):
        piece = slice(number * n_steps // bins, (number + 1) * n_steps // bins)
        means = [statistics.fmean(y for _, y in points[piece]) for points in curves]
        rows.append((curves[0][piece.stop - 1][0], statistics.fmean(means), min(means), max(means)))
    return rows

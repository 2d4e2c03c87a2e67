"""The figures of a report as data: each is a small table, drawn from that table only, so the csv beside a figure is
what was plotted.

Bands over seeds show the range from the lowest to the highest run, not a confidence interval: with three seeds that is
what is known of them.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure as Drawing

from ablations.comparison.cost import compare_costs
from ablations.comparison.records import BranchResult, Comparison, RecordedRun, Records
from ablations.comparison.statistics import RunKey
from ablations.comparison.verdicts import outcomes
from ablations.report import drawing
from ablations.report.drawing import KNOWN, MEAN, PAIRED, UNPAIRED
from staged_training.validation import VALIDATED

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
    kinds = (
        *(differences, loss_curves, validation_curves, branch_differences, loss_against_experts, histogram),
        *(routers, costs),
    )
    return [figure for kind in kinds if (figure := kind(records)).rows]


def differences(records: Records) -> Figure:
    """The result: every method's paired difference from the baseline, its interval and its single runs. What is far
    larger than a method's effect, what is known and what another order does, has a panel and a scale of its own."""
    comparison = records.comparison
    baseline = {key: result.bits_per_byte for key, result in records.results[comparison.baseline].items()}
    rows: FigureRows = []
    for method, outcome in outcomes(records).items():
        if outcome.difference is None:
            continue
        panel = UNPAIRED if method in comparison.reordered else KNOWN if method in comparison.known else PAIRED
        losses = {key: result.bits_per_byte for key, result in records.results[method].items() if key in baseline}
        interval = outcome.difference.interval
        rows.append((panel, method, MEAN, interval.mean, interval.low, interval.high))
        rows += [(panel, method, run_name(*key), losses[key] - baseline[key], None, None) for key in sorted(losses)]
    return Figure(
        name="differences",
        title="Difference from the baseline",
        caption=(
            "Validation bits per byte, method minus baseline; left of zero is better. Bar: 95 % interval of the mean."
            " Small dots: single runs. Panels have scales of their own: methods see the baseline's batches in its order"
            " (paired by seed), controls of known sign show what an effect looks like, and another order of the data"
            " what runs scatter by that are not paired."
        ),
        columns=("panel", "method", "what", "difference", "low", "high"),
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


def validation_curves(records: Records) -> Figure:
    """Validation loss in the course of trunk and branches, run by run."""
    comparison = records.comparison
    rows: FigureRows = by_run("trunk", {(t, 0): validation(run, comparison) for t, run in records.trunks.items()})
    for method in records.methods:
        runs = records.branches[method]
        rows += by_run(method, {key: validation(run, comparison, comparison.trunk_tokens) for key, run in runs.items()})
    return Figure(
        name="validation_curves",
        title="Validation loss",
        caption=(
            f"Bits per byte of {VALIDATED} batches of the validation text while training ran, each curve shifted so"
            " that it ends at the run's value in the table, which is of the whole text. Thin: single runs; thick: their"
            " mean."
        ),
        columns=("series", "run", "tokens", "bits_per_byte"),
        rows=rows,
        draw=drawing.validation_curves,
    )


def branch_differences(records: Records) -> Figure:
    """Training loss of a branch minus that of the baseline's branch with the same seed, which sees the same batches in
    the same order."""
    baseline = records.branches[records.comparison.baseline]
    lengths = {len(run.losses) for run in baseline.values()}
    rows: FigureRows = []
    for method in records.methods[1:]:
        # Another order, or more batches in an order of their own: nothing to subtract batch by batch.
        longer = {len(run.losses) for run in records.branches[method].values()} != lengths
        if longer or method in records.comparison.reordered:
            continue
        pairs = {key: (run, baseline[key]) for key, run in records.branches[method].items() if key in baseline}
        curves = {key: curve_difference(*pair, records.comparison) for key, pair in pairs.items()}
        n_steps = min((len(points) for points in curves.values()), default=0)
        rows += by_run(method, {key: binned(points[:n_steps], DIFFERENCE_BINS) for key, points in curves.items()})
    return Figure(
        name="branch_differences",
        title="Branches against the baseline, batch by batch",
        caption=(
            "Training bits per byte of each branch minus those of the baseline's branch with the same seed, which sees"
            " the same batches (arms of another order or length see others and are left out). Below zero is better."
            " Thin: single runs; thick: their mean."
        ),
        columns=("method", "run", "tokens", "difference"),
        rows=rows,
        draw=functools.partial(drawing.branch_differences, methods=records.methods),
    )


def loss_against_experts(records: Records) -> Figure:
    """The same weights under other budgets: what each method loses with fewer experts."""
    rows: FigureRows = []
    tokens = next(iter(records.results[records.comparison.baseline].values())).budget_tokens
    for method in records.methods:
        results = list(records.results[method].values())
        # All branches of a comparison were measured at the same budgets, in ascending order.
        for points in zip(*(level_of_the_table(result) for result in results)):
            losses = [loss for _, loss in points]
            experts = statistics.fmean(used for used, _ in points)
            rows.append((method, experts, statistics.fmean(losses), min(losses), max(losses)))
    return Figure(
        name="loss_against_experts",
        title="Loss against experts used",
        caption=(
            "The trained weights run with other mean numbers of experts per token in"
            f" {records.comparison.trained_blocks}. The change from the number that a method trained with was measured"
            f" on {tokens:,} tokens of the validation text, in batches spaced evenly through it, and stands on the"
            " table's value, which is of the whole text. Line: mean over seeds; band: range over seeds."
        ),
        columns=("method", "mean_experts", "mean", "low", "high"),
        rows=rows,
        draw=drawing.loss_against_experts,
    )


def level_of_the_table(result: BranchResult) -> list[tuple[float, float]]:
    """(mean experts, bits per byte) at every budget: the change from the branch's own number of experts on the batches
    that budgets are measured on, added to what the whole validation text gave."""
    experts = [point.mean_experts for point in result.budgets]
    losses = [point.bits_per_byte for point in result.budgets]
    own = float(np.interp(result.mean_experts, experts, losses))
    return [(used, result.bits_per_byte + loss - own) for used, loss in zip(experts, losses)]


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
    """What the routers did over the whole run: means over layers and seeds, and the range over layers."""
    comparison = records.comparison
    steps = comparison.tokens_per_step
    rows: FigureRows = []
    for quantity, measured in (
        ("experts per token", lambda layer: layer.realised),
        ("dead experts", lambda layer: layer.dead_experts),
        ("entropy, nats", lambda layer: layer.entropy),
    ):
        for name, runs in {
            "trunk": records.trunks,
            **{method: records.branches[method] for method in records.methods},
        }.items():
            offset = 0 if name == "trunk" else comparison.trunk_tokens
            # Runs of one name end their intervals at the same steps and report the same layers.
            for lines in zip(*(run.diagnostics for run in runs.values() if run.diagnostics)):
                by_layer = [
                    statistics.fmean(measured(layer) for layer in layers)
                    for layers in zip(*(line.layers for line in lines))
                ]
                where = offset + lines[0].step * steps
                rows.append((quantity, name, where, statistics.fmean(by_layer), min(by_layer), max(by_layer)))
    return Figure(
        name="routers",
        title="Routers in the course of training",
        caption=(
            "Experts per token, experts that no token of a step used, and the entropy of the routers' probabilities, in"
            " the steps that ended an interval of progress. Line: mean over layers and seeds; band: range over layers."
            " The trunk has all layers, a branch those that it trains."
        ),
        columns=("quantity", "series", "tokens", "mean", "low", "high"),
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


def validation(run: RecordedRun, comparison: Comparison, offset: int = 0) -> list[tuple[int, float]]:
    """(tokens seen, validation bits per byte) in the course of a run, ending at the value of the whole text."""
    measured = [
        (offset + line.step * comparison.tokens_per_step, line.valid_bits_per_byte)
        for line in run.diagnostics
        if line.valid_bits_per_byte is not None
    ]
    return [(tokens, y - measured[-1][1] + run.bits_per_byte) for tokens, y in measured]


def by_run(name: str, curves: dict[RunKey, list[tuple[int, float]]]) -> FigureRows:
    """Rows (name, "mean" or a run, tokens, value) of curves that have the same steps; none without curves."""
    curves = {key: points for key, points in sorted(curves.items()) if points}
    rows: FigureRows = [(name, run_name(*key), *point) for key, points in curves.items() for point in points]
    together = zip(*curves.values())
    return rows + [(name, MEAN, points[0][0], statistics.fmean(y for _, y in points)) for points in together]


def run_name(trunk_seed: int, branch_seed: int) -> str:
    """A run in a csv."""
    return f"trunk {trunk_seed} seed {branch_seed}"


def binned(points: list[tuple[int, float]], bins: int) -> list[tuple[int, float]]:
    """Means of pieces of equal length, fewer where there are fewer steps; (tokens at the end of the piece, mean)."""
    return [(tokens, mean) for tokens, mean, _, _ in band([points], bins)]


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

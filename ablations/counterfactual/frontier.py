"""The frontier: bits per byte against the mean number of experts, and against measured seconds per token.

Every trained model runs with the same number of experts for every token, at each budget; one whose policy chooses the
number runs by that, too, its thresholds calibrated to each budget; and one with a fixed number is a point of its own,
the static model trained at it. `frontier` writes frontier.csv, differences.csv, frontier.png and verdict.txt.

Legend: N counted tokens, D documents, R resamples.
"""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ablations.counterfactual.figure_frontier import draw_frontier
from ablations.counterfactual.options import FrontierOptions
from ablations.counterfactual.text import Text, held_out_text, run_names
from ablations.counterfactual.timing import Seconds, policies_of, seconds_per_token, set_policies
from ablations.difficulty.correlations import document_weights
from ablations.difficulty.frontier import OWN, TRAINED, UNIFORM, Point, bits_per_byte, difference, rivals
from ablations.difficulty.observe import observe
from foundation.command import leave_options, refuse_unwritable
from foundation.environment import device_name
from foundation.files import write_text
from foundation.tables import write_table
from lm.budget import set_budget
from lm.model import LanguageModel
from lm.pretrained import find_model, load_calibration_tokens, load_pretrained
from moe.freed_memory import keep_freed_memory
from routing.policies.top_k import TopK
from routing.policy import Policy

Row = dict[str, Any]


def frontier(options: FrontierOptions) -> Path:
    """Measures every run at every budget, and prints the verdict.

    Returns:
        The folder of the results.

    Raises:
        ValueError: for runs or text that do not fit.
    """
    refuse_unwritable("--out", options.out, folder=True)
    if options.threads:
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    text = held_out_text(options.run, options.text)
    weights_RD = document_weights(len(text.domain_D), options.resamples)
    points: list[Point] = []
    rows: list[Row] = []
    for name, run in zip(run_names(options.run), options.run):
        found, seconds = measure_run(name, run, text, options)
        points += found
        rows += [frontier_row(point, seconds[_key(point)], text, weights_RD) for point in found]
    differences = [
        difference_row(point, rival, text, weights_RD)
        for point in points
        if point.allocation == OWN
        for rival in rivals(point, points)
    ]
    leave_options(options.out)
    for name, table in (("frontier", rows), ("differences", differences)):
        columns = list(table[0]) if table else ["weights"]
        write_table(
            options.out / f"{name}.csv", columns, ([_shown(row[column]) for column in columns] for row in table)
        )
    draw_frontier(rows, options.out / "frontier.png")
    said = frontier_text(rows, differences, text.source)
    write_text(options.out / "verdict.txt", said)
    print(f"\n{said}\nresults: {options.out}", flush=True)
    return options.out


def measure_run(name: str, run: Path, text: Text, options: FrontierOptions) -> tuple[list[Point], dict[str, Seconds]]:
    """All points of one trained model, and the seconds of each by `allocation asked`.

    Args:
        name: what tables call it.
    """
    folder = find_model(run)
    model = load_pretrained(folder, "cuda" if torch.cuda.is_available() else "cpu")
    points, policies = [], {}
    for allocation, asked, installed in settings(model, folder, options):
        set_policies(model, installed)
        print(f"{name}: {allocation}, {asked:g} experts", flush=True)
        point = Point(weights=name, allocation=allocation, asked=asked, observed=observe(model, text.windows))
        points.append(point)
        policies[_key(point)] = installed
    seconds = seconds_per_token(
        model,
        policies,
        torch.from_numpy(text.windows.inputs_N),
        prefill=options.prefill,
        decode=options.decode,
        sequences=options.sequences,
        repeats=options.repeats,
    )
    return points, seconds


def settings(model: LanguageModel, folder: Path, options: FrontierOptions) -> list[tuple[str, float, list[Policy]]]:
    """(allocation, mean asked for, policies of all layers) of every point; budgets that a policy cannot reach are named
    and left out."""
    trained = [copy.deepcopy(policy) for policy in policies_of(model)]
    routed = [router for router in model.routers() if router.n_experts > 1]
    if any(router.policy.config.needs_whole_batch for router in routed):
        raise ValueError(
            f"{folder}: {type(routed[0].policy.config).__name__} looks at later tokens, it cannot generate"
        )
    own_mean = routed[0].policy.asked_experts
    chooses = any(router.policy.budget is not None for router in routed)
    budgets: list[float] = sorted({*map(float, options.budgets), *([own_mean] if own_mean is not None else [])})
    found: list[tuple[str, float, list[Policy]]] = []
    for mean in budgets if chooses else ():
        set_policies(model, [copy.deepcopy(policy) for policy in trained])
        try:
            set_budget(model, mean, load_calibration_tokens(folder).to(model.embedding_VD.device))
        except ValueError as refused:
            print(f"left out: {refused}", flush=True)
            continue
        found.append((OWN, mean, policies_of(model)))
    fixed = routed[0].policy.config.fixed_experts
    if fixed is not None:
        found.append((TRAINED, fixed, trained))
    for k in options.budgets:
        if k > min(router.n_experts for router in routed):
            print(f"left out: {k} experts, of {min(router.n_experts for router in routed)} that there are", flush=True)
        elif k != fixed:
            model.set_policy(TopK(k=k))
            found.append((UNIFORM, k, policies_of(model)))
    return found


def frontier_row(point: Point, seconds: Seconds, text: Text, weights_RD: np.ndarray) -> Row:
    """A point of the frontier; seconds are per token."""
    bits = bits_per_byte(point, text.windows, weights_RD)
    return {
        "weights": point.weights,
        "allocation": point.allocation,
        "asked": float(point.asked),
        "mean_experts": point.observed.mean_experts,
        "bits_per_byte": bits.value,
        "bits_per_byte_low": bits.low,
        "bits_per_byte_high": bits.high,
        "prefill_seconds": seconds.prefill,
        **{f"decode_{n}_seconds": each for n, each in seconds.decode.items()},
    }


def difference_row(point: Point, rival: Point, text: Text, weights_RD: np.ndarray) -> Row:
    """A model's own allocation minus a rival at the same number asked for, in bits per byte; negative is better."""
    bits = difference(point, rival, text.windows, weights_RD)
    return {
        "weights": point.weights,
        "asked": float(point.asked),
        "mean_experts": point.observed.mean_experts,
        "against": rival.weights,
        "against_allocation": rival.allocation,
        "difference": bits.value,
        "difference_low": bits.low,
        "difference_high": bits.high,
    }


def frontier_text(rows: list[Row], differences: list[Row], source: str) -> str:
    """The table, how much of the experts' saving the clock sees, and the differences, in words."""
    times = [column for column in rows[0] if column.endswith("_seconds")]
    lines = [f"Text: {source}. {device_name()}, {torch.get_num_threads()} threads; microseconds per token.", ""]
    heads = "".join(f"{column.removesuffix('_seconds').replace('_', ' '):>11}" for column in times)
    lines.append(f"{'weights':<40} {'allocation':<16} {'experts':>8} {'bits per byte':>14}{heads}")
    for row in rows:
        clock = "".join(f"{1e6 * row[column]:>11.1f}" for column in times)
        numbers = f"{row['mean_experts']:>8.3f} {row['bits_per_byte']:>14.4f}{clock}"
        lines.append(f"{row['weights']:<40} {row['allocation']:<16} {numbers}")
    lines.append("")
    for weights in dict.fromkeys(row["weights"] for row in rows):
        for allocation in (OWN, UNIFORM):
            own = sorted(
                (row for row in rows if (row["weights"], row["allocation"]) == (weights, allocation)),
                key=lambda row: row["mean_experts"],
            )
            if len(own) > 1:
                lines.append(f"{weights}, {allocation}: {saving_sentence(own[0], own[-1], times)}")
    for row in differences:
        low, high = row["difference_low"], row["difference_high"]
        word = "better than" if high < 0 else "worse than" if low > 0 else "not separable from"
        lines.append(
            f"{row['weights']} at {row['mean_experts']:.2f}: {word} {row['against']} ({row['against_allocation']}),"
            f" {row['difference']:+.4f} [{low:+.4f}, {high:+.4f}] bits per byte"
        )
    return "\n".join(lines) + "\n"


def saving_sentence(few: Row, many: Row, times: list[str]) -> str:
    """How far the clock follows the experts: the share of time saved by the share of experts saved."""
    saved = 1 - few["mean_experts"] / many["mean_experts"]
    shares = ", ".join(
        f"{column.removesuffix('_seconds').replace('_', ' ')} {(1 - few[column] / many[column]) / saved:.2f}"
        for column in times
    )
    return (
        f"from {many['mean_experts']:.2f} to {few['mean_experts']:.2f} experts, seconds fall this many times as fast as"
        f" experts: {shares}"
    )


def _key(point: Point) -> str:
    return f"{point.allocation} {point.asked:g}"


def _shown(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) and math.isfinite(value) else value

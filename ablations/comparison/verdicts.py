"""What a comparison may say of each of its arms, from the runs that have finished.

A verdict needs its difference to be told from zero at 5 % over the whole table (Holm over its methods; controls, of
noise or of known sign, are none), and a fork that moved the loss by less than that difference: a branch that spends
itself on recovering from its fork has not answered its question.
"""

import dataclasses
import math
import statistics
from typing import Literal

import numpy as np

from ablations.comparison.cost import duration
from ablations.comparison.records import RecordedRun, Records
from ablations.comparison.statistics import CONFIDENCE, Difference, RunKey, Text, holm, paired_difference

ERROR = 1 - CONFIDENCE
Kind = Literal["better", "worse", "smaller", "withheld", "control", "reference", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """One arm beside the baseline.

    Attributes:
        difference: None for the baseline and where nothing pairs.
        detectable: the smallest true difference that this comparison sees in 80 % of cases, in bits per byte, at the
            level that the first verdict of a table needs.
        fork_shock: training loss of the first step, which comes ahead of the first update, minus the baseline's on the
            same batch, in bits per byte; None where the batches differ.
        kind: "smaller" where the difference is not told from zero; "none" where nothing can be said.
        words: for the reader.
    """

    difference: Difference | None
    detectable: float | None
    fork_shock: float | None
    kind: Kind
    words: str


def outcomes(records: Records) -> dict[str, Outcome]:
    """Of every method with a finished run, the baseline first."""
    comparison = records.comparison
    baseline = records.branches[comparison.baseline]
    bits = {method: bits_by_run(runs) for method, runs in records.branches.items()}
    twins = bits.get("twin") if "twin" in comparison.controls else None
    text = text_of(baseline)
    differences = {
        method: paired_difference(bits[method], bits[comparison.baseline], text, twins)
        for method in records.methods[1:]
        if bits[method].keys() & baseline.keys()
    }
    p_values = {method: difference.p_value for method, difference in differences.items()}
    adjusted = holm({method: p for method, p in p_values.items() if method not in comparison.controls})
    found = {
        comparison.baseline: Outcome(
            difference=None, detectable=None, fork_shock=None, kind="reference", words="reference"
        )
    }
    for method in records.methods[1:]:
        if (difference := differences.get(method)) is None:
            found[method] = Outcome(difference=None, detectable=None, fork_shock=None, kind="none", words="no pair yet")
            continue
        control = method in comparison.controls
        n_trunks = len({trunk for trunk, _ in bits[method].keys() & baseline.keys()})
        detectable = difference.detectable(ERROR / (1 if control else len(adjusted)))
        shock = None if method in comparison.reordered else fork_shock(records, method)
        if (known := comparison.known.get(method)) is not None:
            # Its fork is part of the effect that is known, so no shock withholds it.
            kind, words = "control", seen(difference, p_values[method], known)
        elif control:
            kind, words = "control", "within noise" if p_values[method] >= ERROR else "false alarm"
            # A twin's noise is rounding: what another order does, a single pair cannot tell.
            if method in comparison.reordered and difference.n == 1:
                kind, words = "none", "not judged: one order has no spread"
        else:
            kind, words = judged(difference, adjusted[method], detectable, shock)
        found[method] = Outcome(
            difference=difference,
            detectable=detectable,
            fork_shock=shock,
            kind=kind,
            words=words + scope(difference, n_trunks, comparison.trunk_tokens) * (kind != "none"),
        )
    return found


def judged(difference: Difference, p_value: float, detectable: float, shock: float | None) -> tuple[Kind, str]:
    """A method's verdict without its scope.

    Args:
        p_value: adjusted for the table.
        detectable, shock: see `Outcome`.
    """
    if difference.runs is None:
        return "none", "no verdict: one seed, and no twin to measure rounding"
    if p_value >= ERROR:
        # Never less than the interval allows, which may lie off the middle.
        return "smaller", f"smaller than {max(detectable, abs(difference.mean) + difference.half_width()):.4f}"
    if words := withheld(difference.mean, shock):
        return "withheld", words
    return ("better", "better") if difference.mean < 0 else ("worse", "worse")


def withheld(distance: float, shock: float | None) -> str | None:
    """Why a difference earns no verdict however narrow its interval: its fork moved the loss by more. None where it
    did not.

    Args:
        distance: of the difference from what it was held against (0, or a margin), in bits per byte, either sign.
        shock: see `Outcome`.
    """
    if shock is None or abs(shock) <= abs(distance):
        return None
    return f"withheld: the fork itself moved the loss by {shock:+.3f}"


def seen(difference: Difference, p_value: float, known: str) -> str:
    """Whether a control came out as it is known to, without its scope."""
    if difference.runs is None:
        return f"not judged: one seed, and no twin to measure rounding (known to be {known})"
    if p_value >= ERROR:
        return f"not seen: known to be {known}"
    came_out = "better" if difference.mean < 0 else "worse"
    return f"{known} as known" if came_out == known else f"came out {came_out}: known to be {known}"


def controls_statement(records: Records) -> str | None:
    """One sentence for the reader: whether a comparison saw what is known; None without such controls."""
    known, found = records.comparison.known, outcomes(records)
    arms = {method: found[method].words for method in records.methods if method in known}
    if not arms:
        return None
    failed = [method for method, words in arms.items() if f"{known[method]} as known" not in words]
    if not failed:
        names = ", ".join(f"{method} {known[method]}" for method in arms)
        return f"{'Both' if len(arms) == 2 else 'All'} controls came out as known: {names}."
    return (
        "The run could not see its own controls, so the verdicts beside them mean little: "
        + "; ".join(f"{method} {arms[method]}" for method in failed)
        + "."
    )


def scope(difference: Difference, n_trunks: int, trunk_tokens: int) -> str:
    """What a verdict is confined to."""
    if not trunk_tokens:
        return "" if difference.n > 1 else " on this seed"
    if n_trunks > 1:
        return ""
    return " on this trunk" if difference.n > 1 else " on this seed of this trunk"


def fork_shock(records: Records, method: str) -> float:
    """See `Outcome`; mean over the pairs."""
    runs, baseline = records.branches[method], records.branches[records.comparison.baseline]
    shocks = [runs[key].losses[0] - baseline[key].losses[0] for key in runs.keys() & baseline.keys()]
    return statistics.fmean(shocks) / (math.log(2) * records.comparison.bytes_per_token)


def bits_by_run(runs: dict[RunKey, RecordedRun]) -> dict[RunKey, np.ndarray]:
    """Bits of every section of the validation text, by run."""
    return {key: np.array([section.nats for section in run.sections]) / math.log(2) for key, run in runs.items()}


def text_of(runs: dict[RunKey, RecordedRun]) -> Text:
    """The validation text that all runs of a comparison were measured on."""
    sections = next(iter(runs.values())).sections
    return Text(
        n_bytes_S=np.array([section.n_bytes for section in sections]),
        document_S=np.array([section.document for section in sections]),
    )


def noise_statement(records: Records) -> str:
    """One sentence for the reader: which noise the intervals of a comparison hold."""
    n_trunks, n_branches = len(records.comparison.trunk_seeds), len(records.comparison.branch_seeds)
    sections = next(iter(records.branches[records.comparison.baseline].values())).sections
    text = f"the noise of the validation text ({len(sections)} sections of {sections[-1].document + 1} documents)"
    if not records.comparison.trunk_tokens:
        runs = f"run noise (fresh weights, data order, the method's draws) over {n_branches} seeds"
        return f"Intervals hold {text} and {runs if n_branches > 1 else 'no run noise, of one seed'}."
    if n_trunks > 1:
        return (
            f"Intervals hold {text}, trunk noise (initial weights, trunk data order) and branch noise, over {n_trunks}"
            f" trunks, each the mean of {n_branches} branch seed{'s' * (n_branches > 1)}."
        )
    if n_branches > 1:
        return (
            f"Intervals hold {text} and branch noise (branch data order, fresh weights, the method's draws) over"
            f" {n_branches} seeds on one trunk, and not trunk noise: another trunk may shift or reorder the methods"
            " (--trunk-seeds N measures that)."
        )
    return (
        f"One seed: intervals hold {text} and what rounding does to a twin, and speak of this seed on this trunk only"
        " (--seeds N, or --trunk-seeds N, measures their noise)."
    )


def would_see(records: Records, more: int = 3) -> str | None:
    """What more seeds (trunks, where there are several) would cost and show, from the seconds that those of this
    comparison took; None where no method has the spread of two."""
    comparison = records.comparison
    found = outcomes(records)
    spread = [
        outcome.difference
        for method, outcome in found.items()
        if method not in comparison.controls and outcome.difference is not None and outcome.difference.n > 1
    ]
    if not spread:
        return None
    error = ERROR / len(spread)
    now = max(difference.detectable(error) for difference in spread)
    then = max(difference.with_more(more).detectable(error) for difference in spread)
    branches = [run for runs in records.branches.values() for run in runs.values()]
    seconds = math.fsum(cost.seconds for run in branches for cost in run.costs.values()) / len(branches)
    seconds *= len(records.methods) * more
    what = "seeds"
    if len(comparison.trunk_seeds) > 1:
        what, trunks = "trunks", records.trunks.values()
        seconds *= len(comparison.branch_seeds)
        seconds += more * math.fsum(cost.seconds for run in trunks for cost in run.costs.values()) / max(len(trunks), 1)
    return (
        f"{more} more {what}, about {duration(seconds)}, would see a difference of {then:.4f} in every method, now"
        f" {now:.4f}."
    )

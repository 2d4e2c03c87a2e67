"""A gate: one method against the baseline, with as many seeds as an answer takes.

Every look is a comparison like any other, of the baseline and the method with so many seeds, in the same folders: a
later look trains the new seeds only, and so does a comparison behind it. The verdict lies in the folder of the last
look's comparison, under the try's number.
"""

import dataclasses
import math
from pathlib import Path

from ablations.comparison.compare import SharedExecution, prepare_job
from ablations.comparison.cost import compare_costs, duration
from ablations.comparison.options import Options
from ablations.comparison.records import Cost, Records, read_records
from ablations.comparison.registry import BASELINE, find_methods
from ablations.comparison.shares import run_side_by_side
from ablations.comparison.verdicts import outcomes
from ablations.gate import ledger
from ablations.gate.decision import Answer, GateConfig, Look, decide, error_of_look, judge, looks_of
from foundation.command import CannotGoOn
from foundation.environment import git, short_commit, uncommitted_changes
from foundation.files import fingerprint
from foundation.serialize import save_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateCost:
    """What the runs behind a verdict cost, finished before or now.

    Attributes:
        flops, seconds: of trunks, stored activations, branches and evaluation.
        branch_flops, branch_seconds: of them what was spent for this question: the method's and the baseline's branches
            with their evaluation.
        full_run_flops: of training the baseline's whole network once, from scratch.
        share_of_full_run: `flops` by `full_run_flops`; None where a trunk's costs are gone.
    """

    flops: float
    seconds: float
    branch_flops: float
    branch_seconds: float
    full_run_flops: float
    share_of_full_run: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateVerdict:
    """`gate_<number>.json`, and what `--json` prints. Differences are the method's bits per byte minus the baseline's.

    Attributes:
        reason: of the verdict, in words.
        effect, interval, level, minimum_detectable_effect: of the last look, see `decision.Look`.
        looks: that were taken.
        max_seeds: that a try may train.
        seeds: that were trained, on each of `trunk_seeds` trunks.
        error: of all tries on this trunk together.
        ledger_number: of this try among them.
        commit: of the checkout, None outside of one; `uncommitted_changes` says whether its files were edited.
        comparison: folder of the last look's.
    """

    method: str
    verdict: Answer
    reason: str
    effect: float
    interval: tuple[float, float]
    level: float
    minimum_detectable_effect: float
    margin: float
    fork_shock: float | None
    looks: tuple[Look, ...]
    seeds: int
    max_seeds: int
    trunk_seeds: int
    error: float
    ledger_number: int
    cost: GateCost
    commit: str | None
    uncommitted_changes: bool | None
    comparison: str


def gate(name: str, options: Options, config: GateConfig) -> tuple[GateVerdict, Path]:
    """Trains and looks until there is an answer or `options.seeds` are spent.

    Args:
        name: of the method.

    Returns:
        The verdict, and the file that it was written to.

    Raises:
        ValueError: for a method or options that no verdict can come of.
        CannotGoOn: where a finished run is damaged.
        foundation.stopping.Interrupted: after a stop signal, with everything saved; the same call continues.
    """
    methods = find_methods([name])
    if name == BASELINE:
        raise ValueError(f"{BASELINE}: name a method to hold against it")
    if options.dry_run:
        raise ValueError(
            f"--dry-run: a gate exits with a verdict; `compare {name} --seeds {options.seeds} --dry-run` shows the plan"
        )
    looks = looks_of(options.seeds)
    asked = ledger.enter(options.out, new_try(name, options, config))
    error = error_of_look(config.error, n_looks=len(looks), number=asked.number)
    print(
        f"gate {name}: try {asked.number} on this trunk, looks at {', '.join(map(str, looks))} seeds, each at"
        f" {100 * (1 - error):.3g} %",
        flush=True,
    )
    folder, records = options.out, None

    def look(seeds: int) -> Look:
        nonlocal folder, records
        found = run_side_by_side(methods, dataclasses.replace(options, seeds=seeds))
        assert found is not None, "only a dry run has no folder"
        folder, records = found, read_records(found)
        outcome = outcomes(records).get(name)
        wanted = options.trunk_seeds * seeds
        if outcome is None or outcome.difference is None or len(records.branches[name]) < wanted or records.damaged:
            raise CannotGoOn(f"{found}: runs are missing; {'; '.join(records.damaged) or 'none is damaged'}")
        # As in a comparison, a control's fork is part of what is known of it.
        shock = None if name in records.comparison.known else outcome.fork_shock
        taken = judge(outcome.difference, shock, seeds=seeds, margin=config.margin, error=error)
        print(f"{look_text(taken)}\n", flush=True)
        return taken

    taken = decide(looks, look)
    assert records is not None, "there is at least one look"
    last = taken[-1]
    verdict = GateVerdict(
        method=name,
        verdict=last.answer,
        reason=last.words,
        effect=last.effect,
        interval=(last.low, last.high),
        level=last.level,
        minimum_detectable_effect=last.detectable,
        margin=config.margin,
        fork_shock=last.fork_shock,
        looks=tuple(taken),
        seeds=last.seeds,
        max_seeds=options.seeds,
        trunk_seeds=options.trunk_seeds,
        error=config.error,
        ledger_number=asked.number,
        cost=cost_of(records),
        commit=git("rev-parse", "HEAD"),
        uncommitted_changes=uncommitted_changes(),
        comparison=str(folder),
    )
    path = folder / f"gate_{asked.number}.json"
    save_json(path, verdict)
    ledger.answer(options.out, asked, last.answer)
    return verdict, path


def new_try(name: str, options: Options, config: GateConfig) -> ledger.Try:
    """The try of a question that was not asked before; its number is the ledger's to give."""
    job = prepare_job(find_methods([name]), dataclasses.replace(options, seeds=1))
    plan = SharedExecution(job, job.plans[0]).plan
    branch = next(branch for branch in plan.branches if branch.method == name)
    identity = [plan.branch_identity(branch), options.trunk_seeds, options.seeds, config.margin, config.error]
    return ledger.Try(
        number=0,
        trunk=plan.trunk_hash,
        question=fingerprint(identity),
        method=name,
        margin=config.margin,
        error=config.error,
        seeds=options.seeds,
        commit=short_commit(),
    )


def cost_of(records: Records) -> GateCost:
    """See `GateCost`."""
    costs = compare_costs(records)
    branches = sum(
        (cost for runs in records.branches.values() for run in runs.values() for cost in run.costs.values()),
        Cost(flops=0.0, seconds=0.0),
    )
    full = costs.per_method[records.comparison.baseline].flops
    return GateCost(
        flops=costs.staged.flops,
        seconds=costs.staged.seconds,
        branch_flops=branches.flops,
        branch_seconds=branches.seconds,
        full_run_flops=full,
        share_of_full_run=costs.staged.flops / full if costs.complete else None,
    )


def look_text(look: Look) -> str:
    """One look as one line."""
    return (
        f"{look.seeds} seeds: {look.effect:+.4f} bits per byte, {look.low:+.4f} to {look.high:+.4f} at"
        f" {100 * look.level:.3g} %: {look.answer}, {look.words}"
    )


def verdict_text(verdict: GateVerdict, path: Path) -> str:
    """A verdict for people."""
    cost, seconds = verdict.cost, duration(verdict.cost.seconds)
    share = math.nan if cost.share_of_full_run is None else 100 * cost.share_of_full_run
    return "\n".join(
        [
            f"{verdict.method}: {verdict.verdict}, {verdict.reason}",
            f"A difference of {verdict.minimum_detectable_effect:.4f} from the margin would have been seen in 80 % of"
            " cases.",
            f"The runs behind it cost {cost.flops:.3g} FLOPs and {seconds}, {share:.0f} % of one full run of the"
            f" baseline. Try {verdict.ledger_number} on this trunk.",
            f"verdict: {path}",
        ]
    )

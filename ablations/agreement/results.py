"""The finished runs of a study as one table, and what the statistics are computed from: that table alone."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ablations.agreement.study import TRUTH, Study
from ablations.comparison.compare import SharedExecution
from ablations.comparison.registry import BASELINE
from staged_training.execute import Execution
from staged_training.flops import planned_caching
from staged_training.record import RESULT, Ledger, read_run

TRUNK, CACHING = "trunk", "caching"
BASELINE_FAMILY = "baseline"
FAMILIES = ("routing", "architecture", "all")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRow:
    """A finished run, or what storing a trunk's activations for one boundary has cost.

    Attributes:
        setting: `TRUTH`, or a cheap setting; a run that several share has a row in each.
        arm: or `TRUNK`, or `CACHING`.
        family: "routing" or "architecture", that of the baseline and of what arms share "baseline".
        seed: of a branch or a whole run; of a trunk its own.
        trunk_seed: equal to `seed` in whole runs.
        boundary, fresh: where and how a branch begins; arms are compared with the baseline of equal ones.
        bits_per_byte: of the whole validation text; NaN where nothing was measured.
        flops, seconds: of training, as recorded; evaluation, which all runs have alike, is left out.
        folder: of the run.
    """

    setting: str
    arm: str
    family: str
    seed: int
    trunk_seed: int
    boundary: int
    fresh: int
    bits_per_byte: float
    flops: float
    seconds: float
    folder: str

    @property
    def cut(self) -> tuple[int, int]:
        """What it shares with its baseline."""
        return self.boundary, self.fresh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """Full runs and cheap ones of the same arms and seeds.

    Attributes:
        arms: the baseline first.
        truth_AS: bits per byte of full runs, arms by seeds.
        cheap_AS: bits per byte of the cheap runs minus those of their own baseline of the same seed; 0 for the
            baseline itself. Only such differences can be compared across boundaries.
        missing: arms that were left out because a run of theirs is missing.
    """

    arms: tuple[str, ...]
    truth_AS: np.ndarray
    cheap_AS: np.ndarray
    missing: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """FLOPs and seconds as shares of those of the full runs."""

    flops: float
    seconds: float


def run_rows(study: Study) -> list[RunRow]:
    """Every finished run, setting by setting, the full runs first."""
    rows = []
    for whole in study.wholes:
        execution = study.execution(whole)
        family = study.families[whole.arm]
        rows += _row(execution, whole.setting, whole.arm, family, "trunk", seed=whole.seed)
    for setting, jobs in study.jobs.items():
        seen: set = set()
        for job in jobs:
            for execution in (SharedExecution(job, plan) for plan in job.plans):
                plan = execution.plan
                if execution.trunk_folder not in seen:
                    rows += _row(execution, setting, TRUNK, BASELINE_FAMILY, "trunk", seed=plan.trunk_seed)
                stored = (execution.trunk_folder, plan.boundary)
                if plan.boundary and execution.config.cache and stored not in seen:
                    rows += _caching_row(execution, setting)
                seen |= {execution.trunk_folder, stored}
                for branch in plan.branches:
                    row = _row(
                        execution,
                        setting,
                        branch.method,
                        study.families[branch.method],
                        "branches",
                        seed=branch.seed,
                        folder=execution.folder_of(branch),
                    )
                    rows += [
                        dataclasses.replace(each, boundary=branch.boundary, fresh=int(branch.fresh)) for each in row
                    ]
    return rows


def _row(
    execution: Execution, setting: str, arm: str, family: str, kind: str, *, seed: int, folder: Path | None = None
) -> Iterator[RunRow]:
    """The row of a run where it is finished. `kind` is that of its ledger."""
    folder = folder or execution.trunk_folder
    if not (folder / RESULT).exists():
        return
    record = read_run(folder)
    cost = record.ledger.costs[kind]
    yield RunRow(
        setting=setting,
        arm=arm,
        family=family,
        seed=seed,
        trunk_seed=execution.plan.trunk_seed,
        boundary=0,
        fresh=0,
        bits_per_byte=record.result["bits_per_byte"],
        flops=cost["flops"],
        seconds=cost["seconds"],
        folder=str(folder),
    )


def _caching_row(execution: Execution, setting: str) -> Iterator[RunRow]:
    """What one boundary's activations of the training text have cost: the trunk's ledger holds those of all settings
    and boundaries, and of the validation text, in one sum."""
    folder, plan = execution.trunk_folder, execution.plan
    cost = Ledger.load(folder).costs.get(CACHING) if (folder / RESULT).exists() else None
    if cost is None:
        return
    flops = planned_caching(plan)
    yield RunRow(
        setting=setting,
        arm=CACHING,
        family=BASELINE_FAMILY,
        seed=plan.trunk_seed,
        trunk_seed=plan.trunk_seed,
        boundary=plan.boundary,
        fresh=0,
        bits_per_byte=float("nan"),
        flops=flops,
        seconds=flops * cost["seconds"] / cost["flops"],
        folder=str(folder),
    )


def scores(rows: Sequence[RunRow], setting: str, family: str, seeds: int) -> Scores:
    """The arms of a family, or of all, in full runs and in a setting.

    Args:
        seeds: of every arm; one that lacks a run, or whose baseline does, is left out.

    Raises:
        ValueError: where a full run of the baseline is missing: nothing can be measured against it.
    """
    truth = {(row.arm, row.seed): row.bits_per_byte for row in rows if row.setting == TRUTH}
    cheap = {(row.arm, row.seed): row for row in rows if row.setting == setting and _is_arm(row)}
    baselines = {
        (*row.cut, row.seed): row.bits_per_byte
        for row in rows
        if row.setting == setting and _is_arm(row) and row.family == BASELINE_FAMILY
    }
    families = {row.arm: row.family for row in rows if _is_arm(row)}
    baseline = next((arm for arm, own in families.items() if own == BASELINE_FAMILY), BASELINE)
    if absent := [seed for seed in range(seeds) if (baseline, seed) not in truth]:
        raise ValueError(
            f"the full run of {baseline} with seed {absent[0]} did not finish, so no arm has a true difference"
        )
    arms, truths, differences, missing = [], [], [], []
    for arm in (arm for arm, own in families.items() if arm != baseline and family in (own, "all")):
        try:
            own = [truth[arm, seed] for seed in range(seeds)]
            pairs = [cheap[arm, seed] for seed in range(seeds)]
            differences.append([row.bits_per_byte - baselines[*row.cut, row.seed] for row in pairs])
        except KeyError:
            missing.append(arm)
            continue
        arms.append(arm)
        truths.append(own)
    return Scores(
        arms=(baseline, *arms),
        truth_AS=np.array([[truth[baseline, seed] for seed in range(seeds)], *truths]),
        cheap_AS=np.array([[0.0] * seeds, *differences]),
        missing=tuple(missing),
    )


def cost_share(rows: Sequence[RunRow], setting: str, arms: Iterable[str]) -> Share:
    """What a setting has cost for some arms, as a share of their full runs.

    Args:
        arms: the baseline among them; trunks, stored activations and baselines are counted as far as these arms need
            them.
    """
    arms = set(arms)
    own = [row for row in rows if row.setting == setting and row.arm in arms and row.family != BASELINE_FAMILY]
    cuts = {row.cut for row in own}
    shared = [
        row
        for row in rows
        if row.setting == setting
        and row.family == BASELINE_FAMILY
        and (
            row.arm == TRUNK
            or (row.arm == CACHING and row.boundary in {boundary for boundary, _ in cuts})
            or (row.arm in arms and row.cut in cuts)
        )
    ]
    full = [row for row in rows if row.setting == TRUTH and row.arm in arms]
    spent = [*own, *shared]
    return Share(
        flops=sum(row.flops for row in spent) / sum(row.flops for row in full),
        seconds=sum(row.seconds for row in spent) / sum(row.seconds for row in full),
    )


def _is_arm(row: RunRow) -> bool:
    return row.arm not in (TRUNK, CACHING)

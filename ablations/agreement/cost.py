"""What a study costs, told before it starts: runs, FLOPs as a share of the full runs, and seconds."""

from collections.abc import Iterable

import torch

from ablations.agreement.study import BRANCHES, TRUTH, WHOLE, Study, Task, Whole, tasks_of
from ablations.comparison.cost import duration
from ablations.comparison.shares import jobs_of
from staged_training.estimate import estimate
from staged_training.execute import Execution
from staged_training.flops import Planned, planned, planned_caching
from staged_training.record import RESULT, Ledger


def cost_text(study: Study) -> str:
    """Runs and FLOPs of the study, setting by setting, and the seconds of what is left, measured on a few steps of each
    arm."""
    cached = study.options.execution.cache
    truth = total(planned(whole.plan, None, cached=cached) for whole in study.wholes if whole.setting == TRUTH)
    lines = [f"{'setting':<34} {'runs':>5} {'FLOPs':>10} {'of the full runs':>17}"]

    def line(name: str, runs: int, flops: float) -> str:
        return f"{name:<34} {runs:>5} {flops:>10.3g} {100 * flops / truth:>15.1f} %"

    by_setting: dict[str, list[Whole]] = {}
    for whole in study.wholes:
        by_setting.setdefault(whole.setting, []).append(whole)
    for setting, wholes in by_setting.items():
        lines.append(line(setting, len(wholes), total(planned(whole.plan, None, cached=cached) for whole in wholes)))
    for setting, jobs in study.jobs.items():
        plans = [plan for job in jobs for plan in job.plans]
        trunks = {plan.trunk_seed: plan for plan in plans}
        stored = {(plan.trunk_seed, plan.boundary): plan for plan in plans if plan.boundary and cached}
        branches = [(plan, branch) for plan in plans for branch in plan.branches]
        flops = total(planned(plan, None, cached=cached) for plan in trunks.values())
        flops += total(planned(plan, branch, cached=cached) for plan, branch in branches)
        flops += sum(map(planned_caching, stored.values()))
        lines.append(line(setting, len(trunks) + len(branches), flops))
    tasks = [task for part in (WHOLE, BRANCHES) for task in tasks_of(study, part)]
    waiting = [task for task in tasks if not task.finished]
    trained = total(planned(task.plan, task.branch, cached=cached) for task in tasks)
    lines += [
        line("all, what settings share once", len(tasks), trained),
        f"{len(tasks) - len(waiting)} of {len(tasks)} runs are finished.",
    ]
    if waiting:
        lines.append(time_text(study, waiting))
    return "\n".join(lines)


def time_text(study: Study, waiting: list[Task]) -> str:
    """The estimate for what is left, in words."""
    jobs = jobs_of(study.options.comparison(study.options.staging))
    threads = torch.get_num_threads()
    # As many as a process of those side by side has.
    torch.set_num_threads(max(1, threads // jobs))
    try:
        rates = seconds_per_flop(study)
    finally:
        torch.set_num_threads(threads)
    cached = study.options.execution.cache
    seconds = 0.0
    for task in waiting:
        cost = planned(task.plan, task.branch, cached=cached)
        seconds += (cost.training + cost.evaluation) * rates[task.arm, task.plan.model.d_model]
    return (
        f"estimated time {duration(seconds / jobs)}, {jobs} run{'s' * (jobs > 1)} side by side, measured on the first"
        " steps of each arm"
    )


def seconds_per_flop(study: Study) -> dict[tuple[str, int], float]:
    """Of training each arm whole, by its name and the model's width: as its first seed took where it is finished,
    measured on a few steps otherwise."""
    rates = {}
    for whole in study.wholes:
        if whole.seed == 0:
            execution = study.execution(whole)
            rates[whole.arm, whole.plan.model.d_model] = speed(execution)
    return rates


def speed(execution: Execution) -> float:
    """Seconds per FLOP of a whole run."""
    if (execution.trunk_folder / RESULT).exists():
        cost = Ledger.load(execution.trunk_folder).costs["trunk"]
        return cost["seconds"] / cost["flops"]
    return estimate(execution).trunk / planned(execution.plan, None, cached=True).training


def total(costs: Iterable[Planned]) -> float:
    """FLOPs of training alone: every run is evaluated alike, however it was trained."""
    return sum(cost.training for cost in costs)

"""`--processes N`: every run of a comparison, trunk or branch, trained and evaluated by N processes together, for
models that are too large for one device: their weights are cut over the processes (`staged_training.many_processes`),
in the same folders, by the same plan.

The command itself prepares the text, writes down what is compared, starts the processes and shows what they have
trained. Where torchrun starts the processes, `torchrun --nproc-per-node N -m ablations compare ...`, the first of them
does all of that.
"""

import foundation.starting  # noqa: F401

# isort: split

import sys
from collections.abc import Sequence
from pathlib import Path

from ablations.comparison.compare import (
    Job,
    SharedExecution,
    describe_job,
    described_job,
    prepare_job,
    run_comparison,
    run_in_turn,
)
from ablations.comparison.measure import budgets_of
from ablations.comparison.options import Options
from ablations.method import Method
from foundation.command import run_command
from foundation.environment import under_torchrun
from staged_training.estimate import estimate
from staged_training.launch import launch
from staged_training.processes import Processes

MODULE = "ablations.comparison.together"


def run_together(methods: list[Method], options: Options) -> Path | None:
    """`run_comparison`, each run by all processes.

    Raises:
        ValueError: for models, policies or batches that cannot be cut over them, and for `--processes` under torchrun.
        SystemExit: when a process fails, and, under torchrun, at the end of all but the first.
    """
    if not under_torchrun():
        # What is estimated here would be a model in one process: they do it themselves.
        return run_comparison(methods, options, launched, estimated=False)
    if options.processes > 1:
        raise ValueError(f"--processes {options.processes}: torchrun has started them already; legal: none")
    # A second of imports that a comparison in one process need not wait for.
    from staged_training.many_processes import joined

    with joined(options.expert_parallel) as processes:
        # The others wait until the text is prepared.
        folder = processes.from_first(
            lambda: run_comparison(methods, options, lambda job, executions: None, estimated=False)
        )
        if folder is not None:
            train(methods, options, processes)
    if not processes.first:
        # One is enough to show what all have trained.
        raise SystemExit(0)
    return folder


def launched(job: Job, executions: list[SharedExecution]) -> None:
    """Starts the processes, and waits until they have trained what is not finished."""
    if all(execution.finished for execution in executions):
        return
    file = describe_job(job)
    launch(job.options.processes, [MODULE, str(file)])
    file.unlink()


def train(methods: list[Method], options: Options, processes: Processes) -> None:
    """What every process does."""
    job = prepare_job(methods, options)
    executions = [SharedExecution(job, plan, processes) for plan in job.plans]
    print(processes, flush=True)
    for execution in executions:
        if not processes.from_first(lambda found=execution: found.finished):
            budgets = len(budgets_of(job.baseline))
            estimated = estimate(execution, budgets=budgets, budget_batches=options.budget_batches)
            print(f"trunk {execution.plan.trunk_seed}: {estimated}", flush=True)
    run_in_turn(job, executions)


def train_described(file: Path) -> None:
    """One of the processes that `launched` starts."""
    from staged_training.many_processes import joined

    methods, options = described_job(file)
    with joined(options.expert_parallel) as processes:
        train(methods, options, processes)


def main(arguments: Sequence[str] | None = None) -> None:
    """A process of `launched`."""
    run_command(
        lambda given: Path((sys.argv[1:] if given is None else given)[0]), train_described, arguments, continues=True
    )


if __name__ == "__main__":
    main()

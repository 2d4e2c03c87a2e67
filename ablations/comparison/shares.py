"""`--jobs N`: the runs of a comparison side by side in processes of their own, in the same folders, with the same bits;
`--executor slurm` makes jobs of the same processes.

On a CPU one thread for each of N runs does more than N threads for one: a small model's operators are too short to be
worth cutting up. First the trunks, dealt out in turn, then the branches, the longest first to whoever has least. What a
process that was killed leaves is taken up by the comparison itself behind them, from its last checkpoint.
"""

import foundation.starting  # noqa: F401

# isort: split

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from ablations.comparison.compare import (
    Job,
    SharedExecution,
    describe_job,
    described_job,
    prepare_job,
    run_branch,
    run_comparison,
    run_in_turn,
)
from ablations.comparison.options import Options
from ablations.comparison.slurm import run_jobs, slurm_executor
from ablations.comparison.together import run_together
from ablations.method import Method
from foundation.command import run_command
from foundation.environment import ROOT, under_torchrun
from staged_training.dealing import dealt
from staged_training.record import RESULT

if TYPE_CHECKING:
    import submitit

Part = Literal["trunks", "branches"]
MODULE = "ablations.comparison.shares"


def run_side_by_side(methods: list[Method], options: Options) -> Path | None:
    """`run_comparison`, in as many processes or jobs as the options say."""
    if options.processes > 1 or under_torchrun():
        return run_together(methods, options)
    if options.executor == "slurm":
        # Ahead of everything else: it refuses what the cluster cannot be asked.
        executor = slurm_executor(options)
        return run_comparison(methods, options, lambda job, executions: run_in_jobs(job, executions, executor))
    jobs = jobs_of(options)
    return run_comparison(methods, options, run_in_turn if jobs == 1 else run_in_shares, jobs=jobs)


def jobs_of(options: Options) -> int:
    """How many runs train side by side."""
    if options.jobs:
        return options.jobs
    return 1 if torch.cuda.is_available() else torch.get_num_threads()


def run_in_shares(job: Job, executions: list[SharedExecution]) -> None:
    """Runs what of the comparison is not finished in processes of their own, and waits for them.

    Raises:
        foundation.stopping.Interrupted: after a stop signal, once every process has saved and gone.
    """
    waiting, count = [execution for execution in executions if not execution.finished], jobs_of(job.options)
    if waiting:
        file = describe_job(job)
        if len(waiting) > 1:
            share_out(file, "trunks", count)
        # A single trunk is trained here, with all threads, and so is one that a killed process has left.
        for execution in waiting:
            execution.activations()
        share_out(file, "branches", count)
        file.unlink()
    run_in_turn(job, [execution for execution in waiting if not execution.finished])


def run_in_jobs(job: Job, executions: list[SharedExecution], executor: "submitit.Executor") -> None:
    """Runs what of the comparison is not finished as jobs of a cluster, trunks too, and waits for them.

    Raises:
        foundation.command.CannotGoOn: for a job that dies again and again, see `run_jobs`.
    """
    waiting = [
        execution.folder_of(branch)
        for execution in executions
        for branch in execution.plan.branches
        if not (execution.folder_of(branch) / RESULT).exists()
    ]
    if not waiting:
        return
    file = describe_job(job)
    runs: dict[Part, int] = {"trunks": len(executions), "branches": len(waiting)}
    for part, most in runs.items():
        count = min(job.options.jobs or most, most)
        run_jobs(executor, part, [share_command(file, part, index, count) for index in range(count)])
    file.unlink()


def share_command(file: Path, part: str, index: int, count: int, module: str = MODULE) -> list[str]:
    """What runs one share, see `run_share`."""
    return [sys.executable, "-m", module, str(file), part, str(index), str(count)]


def share_out(file: Path, part: str, count: int, module: str = MODULE) -> bool:
    """Runs one part in `count` processes, and waits for them.

    Args:
        file: what the processes are to know.
        module: that each of them runs, given the file, the part, its own number and `count`.

    Returns:
        Whether all ended well; what another has left is for the caller to do.
    """
    threads = str(max(1, torch.get_num_threads() // count))
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    print(f"{part}: {count} processes, threads of each: {threads}", flush=True)
    processes: list[subprocess.Popen] = []
    try:
        for index in range(count):
            processes.append(
                subprocess.Popen(share_command(file, part, index, count, module), cwd=ROOT, env=environment)
            )
        for process in processes:
            process.wait()
    except BaseException:
        # A terminal's Ctrl-C has reached them already, any other signal only this process. Asked twice in short order
        # they save once.
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
        raise
    for index, process in enumerate(processes):
        if process.returncode:
            print(
                f"{part}: process {index + 1} of {count} ended with exit code {process.returncode}; what it left is"
                " done here",
                flush=True,
            )
    return not any(process.returncode for process in processes)


def run_share(file: Path, part: Part, index: int, count: int) -> None:
    """Share `index` of `count` of one part of the comparison that `file` describes."""
    job = prepare_job(*described_job(file))
    executions = [SharedExecution(job, plan) for plan in job.plans]
    if part == "trunks":
        for execution in executions[index::count]:
            execution.activations()
        return
    runs = [(execution, branch) for execution in executions for branch in execution.plan.branches]
    for number in dealt([branch.stage.n_batches for _, branch in runs], count)[index]:
        run_branch(job, *runs[number])


def _parsed(given: Sequence[str] | None) -> tuple[Path, Part, int, int]:
    file, part, index, count = sys.argv[1:] if given is None else given
    return Path(file), "trunks" if part == "trunks" else "branches", int(index), int(count)


def main(arguments: Sequence[str] | None = None) -> None:
    """A process of `run_in_shares`."""
    run_command(
        _parsed,
        lambda share: run_share(*share),
        arguments,
        continues=True,
    )


if __name__ == "__main__":
    main()

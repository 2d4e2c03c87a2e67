"""`--executor slurm`: shares of a comparison as jobs of a cluster, through submitit.

A job is the command line that a process of this machine would be, so folders and bits are the same. It needs the
checkout and `--out` on a file system that all machines see; what is not training, preparing the text and reading the
records, happens where the command was given, which waits for its jobs. Their output lies in `<out>/slurm/`.
"""

import time
from typing import TYPE_CHECKING, Any

from ablations.comparison.options import Options
from foundation.command import CannotGoOn
from foundation.environment import ROOT

if TYPE_CHECKING:
    import submitit

# Minutes; submitit's own 5 would not train a trunk.
DEFAULTS = {"job_name": "ablations", "time": 240}
# How often a job is submitted before it is given up.
TRIES = 3
LOOK_AGAIN_S = 1.0


def slurm_executor(options: Options) -> "submitit.Executor":
    """What submits jobs to this machine's cluster.

    Raises:
        ValueError: without submitit, without a cluster, and for what it cannot be asked.
    """
    parameters = parameters_of(options.slurm)
    try:
        import submitit
    except ImportError:
        raise ValueError("--executor slurm needs submitit: pip install -e '.[cluster]'") from None
    try:
        executor = submitit.SlurmExecutor(folder=options.out / "slurm")
    except RuntimeError as error:
        raise ValueError(f"--executor slurm: {error}") from None
    executor.update_parameters(**DEFAULTS | parameters)
    return executor


def parameters_of(words: tuple[str, ...]) -> dict[str, Any]:
    """`partition=gpu time=120` as keyword arguments; whole numbers are numbers.

    Raises:
        ValueError: for a time that is no number of minutes: sbatch knows others, submitit counts with it.
    """
    pairs = [word.partition("=")[::2] for word in words]
    parameters = {key: int(value) if value.isdecimal() else value for key, value in pairs}
    if not isinstance(parameters.get("time", 0), int):
        raise ValueError(f"--slurm time={parameters['time']}: must be a whole number of minutes")
    return parameters


def run_jobs(executor: "submitit.Executor", part: str, commands: list[list[str]]) -> None:
    """Submits one job per command and waits for all. One that dies, killed or ended by its time, is submitted again:
    the command goes on from its last checkpoint.

    Raises:
        CannotGoOn: naming each job that died `TRIES` times, once the others have ended.
        foundation.stopping.Interrupted: after a stop signal; jobs that were under way are cancelled.
    """
    from submitit.core.utils import CommandFunction, FailedJobError, FailedSubmissionError

    def submit(number: int) -> "submitit.Job[str]":
        try:
            return executor.submit(CommandFunction(commands[number], cwd=ROOT))
        except (FailedJobError, FailedSubmissionError) as error:
            raise CannotGoOn(f"{part}: the cluster takes no job: {error}") from error

    jobs: dict[int, submitit.Job[str]] = {}
    submitted, lost, count = [1] * len(commands), [], len(commands)
    try:
        for number in range(count):
            jobs[number] = submit(number)
        names = ", ".join(job.job_id for job in jobs.values())
        print(f"{part}: {count} job{'s' * (count > 1)} submitted: {names}", flush=True)
        while jobs:
            for number, job in list(jobs.items()):
                if not job.done():
                    continue
                del jobs[number]
                if job.exception() is None:
                    continue
                name = f"{part}: job {number + 1} of {count} ({job.job_id})"
                if submitted[number] == TRIES:
                    lost.append(f"{name} died {TRIES} times, see {job.paths.stderr}")
                    continue
                jobs[number] = submit(number)
                submitted[number] += 1
                print(f"{name} died, submitted again: {jobs[number].job_id}", flush=True)
            time.sleep(LOOK_AGAIN_S if jobs else 0)
    except BaseException:
        for job in jobs.values():
            job.cancel(check=False)
        raise
    if lost:
        raise CannotGoOn(f"{'; '.join(lost)}; the same command continues")

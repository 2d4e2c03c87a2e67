"""The runs of the recall study: which there are, where they lie, and how they come to be finished.

    <out>/recall/runs/<label>_<hash>.json   a finished run, named by everything that it depends on, code included
    <out>/recall/<hash>/                    tables and figure of one study

Runs take very different times, so every process goes through all of them and takes what nobody else has claimed.
"""

import foundation.starting  # noqa: F401

# isort: split

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ablations.agreement.shares import CLAIMS, claimed
from ablations.comparison.compare import SHARES_FILE
from ablations.comparison.shares import share_out
from ablations.recall.options import RecallOptions
from ablations.recall.training import RecallResult, RecallRun, train_run
from foundation.command import run_command
from foundation.environment import version
from foundation.files import fingerprint, read_json, write_json
from foundation.serialize import from_dict, load_json, save_json, to_dict
from foundation.source import code_of

RUNS = "runs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A run and the file of its result."""

    run: RecallRun
    file: Path

    @property
    def finished(self) -> bool:
        """Whether it has its result."""
        return self.file.exists()

    @property
    def result(self) -> RecallResult:
        """Of a finished run.

        Raises:
            ValueError: for a file that was changed; names it.
        """
        return load_json(RecallResult, self.file)


def tasks_of(options: RecallOptions) -> list[Task]:
    """All runs, finished or not: seed by seed, so that a study that is cut off has seen every plan and rate."""
    form = options.chosen
    code = {**code_of(("ablations.recall.training",)), "torch": version("torch")}
    tasks = []
    for seed in range(options.seeds):
        for width in options.tried_widths:
            for rate in options.tried_rates:
                for plan in options.plans:
                    run = RecallRun(
                        plan=plan,
                        width=width,
                        rate=rate,
                        seed=seed,
                        model=options.model(plan, width),
                        optimizer=form.optimizer,
                        train=form.train,
                        test=form.test,
                        steps=options.steps or form.steps,
                        batch_size=options.batch_size or form.batch_size,
                        solved=options.solved,
                        test_rows=form.test_rows,
                    )
                    digest = fingerprint({"run": to_dict(run), "code": code})[:12]
                    name = f"{run.label.replace(' ', '_')}_{digest}.json"
                    tasks.append(Task(run=run, file=options.out / "recall" / RUNS / name))
    return tasks


def folder_of(options: RecallOptions, tasks: Sequence[Task]) -> Path:
    """Of the study's tables, named by its runs."""
    return options.out / "recall" / fingerprint([task.file.name for task in tasks])[:12]


def run_study(options: RecallOptions, tasks: Sequence[Task]) -> None:
    """Runs whatever is not finished.

    Raises:
        foundation.stopping.Interrupted: after a stop signal; the same call continues with what is not finished.
    """
    root = options.out / "recall"
    for folder in (root / RUNS, root / CLAIMS):
        folder.mkdir(parents=True, exist_ok=True)
    waiting = [task for task in tasks if not task.finished]
    count = min(options.jobs or (1 if torch.cuda.is_available() else torch.get_num_threads()), len(waiting))
    if count > 1:
        file = folder_of(options, tasks) / SHARES_FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, to_dict(options))
        share_out(file, "recall", count, module=__name__)
        file.unlink()
    # One after the other, and what processes that were killed have left.
    run_claimed(root / CLAIMS, waiting)


def run_claimed(claims: Path, tasks: Sequence[Task]) -> None:
    """Those of the tasks that are neither finished nor another process's."""
    for place, task in enumerate(tasks):
        with claimed(claims / task.file.name) as mine:
            # Claimed first: it may have been finished until then.
            if not mine or task.finished:
                continue
            result = train_run(task.run)
            save_json(task.file, result)
            print(
                f"{place + 1:>4}/{len(tasks)} {task.run.label}: accuracy {result.accuracy:.3f} after"
                f" {result.steps} steps, {result.seconds:.1f} s" + (", diverged" if result.diverged else ""),
                flush=True,
            )


def run_share(file: Path) -> None:
    """What a process of `run_study` does."""
    options = from_dict(RecallOptions, read_json(file))
    waiting = [task for task in tasks_of(options) if not task.finished]
    run_claimed(options.out / "recall" / CLAIMS, waiting)


def main(arguments: Sequence[str] | None = None) -> None:
    """A process of `run_study`."""
    run_command(
        lambda given: sys.argv[1:] if given is None else given,
        lambda given: run_share(Path(given[0])),
        arguments,
        continues=True,
    )


if __name__ == "__main__":
    main()

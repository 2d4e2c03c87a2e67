"""The runs of the study side by side, in processes of their own.

Runs of different arms take very different times, so none is dealt out beforehand: every process goes through all of
them and takes what nobody else has claimed. A claim goes with its process.
"""

import foundation.starting  # noqa: F401

# isort: split

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ablations.agreement.options import AgreementOptions
from ablations.agreement.study import BRANCHES, WHOLE, Runner, Study, Task, prepare_study, tasks_of
from ablations.comparison.compare import SHARES_FILE
from ablations.comparison.shares import jobs_of, share_out
from foundation.command import run_command
from foundation.files import read_json, try_lock, write_json
from foundation.serialize import from_dict, to_dict

CLAIMS = "claims"


def run_study(study: Study) -> None:
    """Runs whatever of the study is not finished.

    Raises:
        foundation.stopping.Interrupted: after a stop signal, with everything saved; the same call continues.
    """
    count = jobs_of(study.options.comparison(study.options.staging))
    (study.folder / CLAIMS).mkdir(parents=True, exist_ok=True)
    file = study.folder / SHARES_FILE
    for part in (WHOLE, BRANCHES):
        waiting = [task for task in tasks_of(study, part) if not task.finished]
        if count > 1 and len(waiting) > 1:
            write_json(file, {"options": to_dict(study.options), "folder": str(study.folder)})
            done = share_out(file, part, count, module=__name__)
            file.unlink()
            if done:
                continue
        # One after the other, and what processes that were killed have left.
        run_claimed(study, study.folder, waiting)


def run_claimed(study: Study, folder: Path, tasks: Sequence[Task]) -> None:
    """Those of the tasks that are neither finished nor another process's."""
    runner = Runner(study)
    with contextlib.ExitStack() as failed:
        for task in tasks:
            with contextlib.ExitStack() as claim:
                # Claimed first: it may have been finished until then.
                if not claim.enter_context(claimed(folder / CLAIMS / task.folder.name)) or task.finished:
                    continue
                if not runner.run(task):
                    # Kept, so that no other process tries the same again.
                    failed.push(claim.pop_all())


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process has a claim, for as long as the block lasts."""
    with open(path, "w") as file:
        yield try_lock(file.fileno(), path)


def run_share(file: Path, part: str) -> None:
    """What a process of `run_study` does."""
    described = read_json(file)
    study = prepare_study(from_dict(AgreementOptions, described["options"]))
    run_claimed(study, Path(described["folder"]), tasks_of(study, part))


def main(arguments: Sequence[str] | None = None) -> None:
    """A process of `run_study`."""
    run_command(
        lambda given: sys.argv[1:] if given is None else given,
        lambda given: run_share(Path(given[0]), given[1]),
        arguments,
        continues=True,
    )


if __name__ == "__main__":
    main()

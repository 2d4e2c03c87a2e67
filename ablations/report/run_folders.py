"""What lies in a folder of runs, and what of it can go: `python -m ablations runs` and `prune`.

A run is worth its weights, its numbers and its text. Checkpoints are there to continue from, stored activations to
train further branches from: behind the last branch both only take room, and both come back by the command that made
them.
"""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import tyro

from ablations.comparison.records import COMPARISON_FILE, Comparison, read_records, run_of
from ablations.report.table import table_rows
from corpus.prepare import MANIFEST as CORPUS_MANIFEST
from foundation.serialize import load_json
from lm.pretrained import load_pretrained
from staged_training import checkpoint
from staged_training.code import changed_since
from staged_training.progress import METRICS
from staged_training.record import CONFIG, ENVIRONMENT, RESULT, RunMismatchError, locked, named, read_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFolder:
    """One line of the list.

    Attributes:
        what: "trunk", "branch", "run", "comparison" or "corpus".
        changed: when it was last written to, seconds since 1970.
        n_bytes: of all files below.
        verdict: what came out, or how far it is.
        bits_per_byte: of the run, of a comparison's baseline; None where there is no such number yet.
    """

    folder: Path
    what: str
    changed: float
    n_bytes: int
    verdict: str
    bits_per_byte: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weighed:
    """A folder of checkpoints or activations: whether anything needs it, and why; where something does, what would free
    it."""

    folder: Path
    run: Path
    n_bytes: int
    needed: bool
    why: str


def prune_command(root: tyro.conf.Positional[Path] = Path("runs"), yes: bool = False) -> None:
    """Free what nothing needs any more: checkpoints of finished runs, and stored activations where no branch is
    unfinished. A finished trunk keeps its last checkpoint, from which further branches start.

    Args:
        root: folder that is searched, with all folders below it.
        yes: remove it; otherwise it is only listed.
    """
    n_freed, n_bytes = 0, 0
    for item in weighed(root):
        what, why = "kept" if item.needed else "would free", item.why
        if not item.needed and yes:
            refused = remove(item)
            what, why = ("freed", why) if refused is None else ("kept", refused)
        if what != "kept":
            n_freed, n_bytes = n_freed + 1, n_bytes + item.n_bytes
        print(f"{what:<10} {mebibytes(item.n_bytes)}  {item.folder}  ({why})")
    print(f"{n_freed} folders, {mebibytes(n_bytes).strip()}" + ("" if yes or not n_freed else "; --yes removes them"))


def run_folders(root: Path) -> list[RunFolder]:
    """Everything below `root` that a command of this project has left."""
    runs = [
        _listed(folder, {"trunks": "trunk", "branches": "branch"}.get(folder.parent.name, "run"), *run_verdict(folder))
        for folder in training_runs(root)
    ]
    comparisons = [
        _listed(path.parent, "comparison", *comparison_verdict(path.parent))
        for path in sorted(root.rglob(COMPARISON_FILE))
    ]
    texts = [
        _listed(path.parent, "corpus", "prepared text") for path in sorted(root.glob(f"**/corpus/*/{CORPUS_MANIFEST}"))
    ]
    return [*comparisons, *runs, *texts]


def training_runs(root: Path) -> list[Path]:
    """Folders of trunks, branches and other trainings."""
    return sorted(path.parent for path in root.rglob(ENVIRONMENT) if (path.parent / CONFIG).is_file())


def run_verdict(folder: Path) -> tuple[str, float | None]:
    """What a run has to say for itself in a few words, and its bits per byte."""
    if not (folder / RESULT).is_file():
        newest = max((folder / "checkpoints").glob("step_*"), default=None)
        return (
            "unfinished, " + ("no checkpoint" if newest is None else f"checkpoint at step {int(newest.name[5:])}"),
            None,
        )
    try:
        record = read_run(folder)
    except ValueError as error:
        return f"damaged: {error}", None
    bits_per_byte = record.result.get("bits_per_byte")
    changed = changed_since(record.config)
    by_other_code = f", by other code: {named(changed)} changed since" if changed else ""
    return f"finished{by_other_code}", bits_per_byte


def comparison_verdict(folder: Path) -> tuple[str, float | None]:
    """Every method with its verdict, or why there is none yet, and the baseline's bits per byte."""
    try:
        records = read_records(folder)
        left_out = [f"{len(records.damaged)} damaged runs left out"] if records.damaged else []
        rows = table_rows(records)
        verdicts = ", ".join([*(f"{row.method} {row.verdict}" for row in rows), *left_out])
        return verdicts, rows[0].bits_per_byte.mean
    except (OSError, ValueError) as error:
        return str(error).removeprefix(f"{folder}: "), None


def weighed(root: Path) -> list[Weighed]:
    """All checkpoints and activations below `root`."""
    return [
        Weighed(folder=folder, run=run, n_bytes=size_of(folder), needed=needed, why=why)
        for run in training_runs(root)
        for folder, needed, why in _weigh(run)
        if folder.is_dir()
    ]


def _weigh(run: Path) -> Iterator[tuple[Path, bool, str]]:
    """Folder, whether something needs it, and why."""
    checkpoints, activations = run / "checkpoints", run / "activations"
    if not (run / RESULT).is_file():
        why = f"the run is unfinished and goes on from here; its command frees it, or removing {run}"
        yield checkpoints, True, why
        yield activations, True, why
        return
    if run.parent.name == "branches":
        yield checkpoints, False, "the branch is finished, model/ holds its weights"
        return
    # By name, newest first: `step_00000009` before `step_00000012`.
    for place, path in enumerate(sorted(checkpoints.glob("step_*"), key=_step, reverse=True)):
        if place:
            yield path, False, "older than the last checkpoint of a finished run"
        else:
            yield path, True, f"the last checkpoint, from which further branches start; removing {run} frees it"
    if waiting := unfinished_branches(run):
        others = f" and {len(waiting) - 1} more" if len(waiting) > 1 else ""
        why = f"{waiting[0]}{others} may still train on it; finishing the comparison frees it, or removing what waits"
        yield activations, True, why
    else:
        yield activations, False, "no branch of this trunk is unfinished; another comparison computes them again"


def unfinished_branches(trunk: Path) -> list[Path]:
    """Branches that may start from this trunk, are planned or begun, and are not finished. Branches do not name their
    trunk, so any in the folder that holds both counts; a planned one is named by its comparison."""
    root = trunk.parent.parent
    waiting = [path.parent for path in root.glob(f"branches/*/{CONFIG}") if not (path.parent / RESULT).is_file()]
    for path in root.glob(f"comparisons/*/{COMPARISON_FILE}"):
        planned = [run_of(path.parent, reference) for reference in load_json(Comparison, path).branches]
        if any(not (branch / RESULT).is_file() for branch in planned):
            waiting.append(path.parent)
    return waiting


def remove(item: Weighed) -> str | None:
    """Removes a folder, or says why it stays."""
    try:
        with locked(item.run):
            # Only with its last checkpoint whole: otherwise the older one is what training goes on from.
            if item.folder.parent.name == "checkpoints":
                checkpoint.verify(max(item.folder.parent.glob("step_*"), key=_step))
            # The checkpoint may be all that is left of a model that was damaged.
            if item.folder.name == "checkpoints":
                load_pretrained(item.run / "model")
            shutil.rmtree(item.folder)
    except (RunMismatchError, ValueError) as error:
        return str(error)
    return None


def size_of(folder: Path) -> int:
    """Bytes of all files below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def mebibytes(n_bytes: int) -> str:
    """A size for a column of sizes."""
    return f"{n_bytes / 2**20:>9.1f} MiB"


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _listed(folder: Path, what: str, verdict: str, bits_per_byte: float | None = None) -> RunFolder:
    marks = [
        path.stat().st_mtime
        for name in (RESULT, METRICS, COMPARISON_FILE, CORPUS_MANIFEST, CONFIG)
        if (path := folder / name).is_file()
    ]
    return RunFolder(
        folder=folder,
        what=what,
        changed=max(marks),
        n_bytes=size_of(folder),
        verdict=verdict,
        bits_per_byte=bits_per_byte,
    )

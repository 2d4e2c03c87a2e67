"""Checkpoints: one folder per step with tensors (safetensors), state (JSON) and a manifest of checksums.

Nothing in this file unpickles anything, so such a checkpoint runs no code of whoever wrote it. The tensors of several
processes lie in torch's format instead, whose index is a pickle: `staged_training.shards` opens those.

A folder appears under its final name only when every byte of it is on the disk, so a run killed at any moment has its
previous checkpoint or the new one. safetensors and torch load a file with a flipped byte without complaint, hence a
SHA-256 of every file; the manifest carries its own.

No state of a random generator is kept: every draw of a training is a function of seed, step and place.
"""

import contextlib
import dataclasses
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from foundation.files import (
    CorruptFileError,
    DiskFullError,
    check_digests,
    digests,
    fsync_path,
    read_json,
    read_sealed,
    require_space,
    write_json,
    write_sealed,
)
from staged_training.record import json_differences

KEPT = 2
MANIFEST, STATE, WEIGHTS, OPTIMIZER = "manifest.json", "state.json", "weights.safetensors", "optimizer.safetensors"
FILES = (STATE, WEIGHTS, OPTIMIZER)
# The folder that holds the tensors where several processes wrote them, see `staged_training.shards`.
SHARDS = "shards"
_NAME = re.compile(r"step_(\d{8,})")

log = logging.getLogger(__name__)


class CheckpointMismatchError(ValueError):
    """A checkpoint belongs to another model or another run."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        step: updates done when it was written.
        weights, optimizer: tensors by name; empty where only `newest` has looked.
        state: the JSON given to `save`.
        skipped: newer checkpoints that were passed over, each with the reason.
    """

    path: Path
    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    skipped: tuple[str, ...] = ()


Problem = Callable[[Checkpoint], str | None]


def no_problem(found: Checkpoint) -> str | None:
    """What is whole can be used."""
    return None


def save(
    folder: Path, step: int, *, weights: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any]
) -> Path:
    """Writes `folder/step_XXXXXXXX` atomically, and drops all but the newest two. No random state is part of it: every
    draw is a function of seed and step.

    Raises:
        DiskFullError: before or while writing; earlier checkpoints are untouched and nothing half-written is left.
    """
    tensors = {WEIGHTS: weights, OPTIMIZER: optimizer}
    temporary = begin(
        folder, step, n_bytes=sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
    )
    with writing(temporary):
        write_json(temporary / STATE, {"step": step, **state})
        for name, group in tensors.items():
            save_file({key: tensor.detach().contiguous() for key, tensor in group.items()}, temporary / name)
            fsync_path(temporary / name)
        return seal(temporary, step, FILES)


def begin(folder: Path, step: int, *, n_bytes: int) -> Path:
    """An empty folder under a temporary name, for a checkpoint of `n_bytes`; `seal` gives it its final one. Leftovers
    of killed runs go.

    Raises:
        DiskFullError: when there is no room.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".step_*.tmp"):
        shutil.rmtree(leftover)
    require_space(folder, n_bytes, f"checkpoint {_name(step)}")
    temporary = folder / f".{_name(step)}.tmp"
    with writing(temporary):
        temporary.mkdir()
    return temporary


@contextlib.contextmanager
def writing(temporary: Path) -> Iterator[None]:
    """Turns what goes wrong with the disk into a DiskFullError, and leaves nothing half-written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        name, folder = temporary.stem.removeprefix("."), temporary.parent
        raise DiskFullError(
            f"checkpoint {name} could not be written to {folder}: {error}; earlier checkpoints are untouched"
        ) from error


def seal(temporary: Path, step: int, files: Iterable[str]) -> Path:
    """Writes the manifest of `files`, which are on the disk, renames the folder, and drops all checkpoints but the
    newest two."""
    folder, target = temporary.parent, temporary.parent / _name(step)
    write_sealed(temporary / MANIFEST, {"step": step, "files": digests(temporary, files)})
    fsync_path(temporary)
    if target.exists():
        # Only a checkpoint that failed verification is ever written again.
        shutil.rmtree(target)
    temporary.rename(target)
    fsync_path(folder)
    drop_others(folder, step)
    return target


def drop_others(folder: Path, step: int) -> None:
    """Leaves the newest two checkpoints of a run that is at `step`. A later one was passed over as corrupt when the run
    was resumed; an older one may be half removed, by a process that was killed in the middle."""
    newest_first = _steps(folder)
    later = [path for other, path in newest_first if other > step]
    for old in later + [path for other, path in newest_first if other <= step][KEPT:]:
        shutil.rmtree(old)


def load_latest(folder: Path, problem: Problem = no_problem) -> Checkpoint | None:
    """The newest checkpoint whose every byte is as written, or None where there is none; see `newest`."""
    found = newest(folder, problem)
    return None if found is None else with_tensors(found)


def with_tensors(found: Checkpoint) -> Checkpoint:
    """A checkpoint that `newest` has found, with its tensors, whole, however many processes wrote them."""
    if (found.path / SHARDS).is_dir():
        # A second of imports that only such checkpoints need.
        from staged_training.shards import whole_tensors

        weights, optimizer = whole_tensors(found.path / SHARDS)
    else:
        weights, optimizer = load_file(found.path / WEIGHTS), load_file(found.path / OPTIMIZER)
    return dataclasses.replace(found, weights=weights, optimizer=optimizer)


def newest(folder: Path, problem: Problem = no_problem) -> Checkpoint | None:
    """The newest checkpoint whose every byte is as written, without its tensors, or None where there is none.

    A corrupt one is named in a warning and in `skipped`, and the one before it is used.

    Args:
        problem: says why a checkpoint that is whole cannot be continued from, or None. Where that holds for all that
            are whole, the answer is None.

    Raises:
        CorruptFileError: when there are checkpoints and all are corrupt: starting over silently would lose the run.
    """
    skipped, n_corrupt = [], 0
    steps = _steps(folder)
    for step, path in steps:
        try:
            verify(path)
            found = Checkpoint(path, step, {}, {}, read_state(path), tuple(skipped))
            if (reason := problem(found)) is None:
                return found
            reason = f"{path}: {reason}"
        except CorruptFileError as error:
            reason, n_corrupt = str(error), n_corrupt + 1
        skipped.append(reason)
        log.warning("checkpoint skipped: %s", reason)
    if steps and n_corrupt == len(steps):
        raise CorruptFileError(f"no usable checkpoint in {folder}: {'; '.join(skipped)}")
    return None


def verify(path: Path) -> None:
    """Compares every file of a checkpoint with the manifest.

    Raises:
        CorruptFileError: naming the checkpoint, the file and what is wrong with it.
    """
    try:
        manifest = read_sealed(path / MANIFEST)
        if path.name != _name(manifest["step"]):
            raise CorruptFileError(f"{MANIFEST} is that of step {manifest['step']}")
        check_digests(path, manifest["files"])
    except CorruptFileError as error:
        raise CorruptFileError(f"{path}: {error}") from None


def refuse_other_identity(saved: Checkpoint, identity: dict[str, Any]) -> None:
    """Raises CheckpointMismatchError, naming each key, when a checkpoint was written by a run that is not `identity`.

    Schedules are part of it: a fork that carries a step count into another schedule trains at a wrong learning rate and
    says nothing.
    """
    if problems := json_differences(saved.state["identity"], identity):
        raise CheckpointMismatchError(f"{saved.path} belongs to another run: {'; '.join(problems[:8])}")


def read_state(path: Path) -> dict[str, Any]:
    """The JSON state of a verified checkpoint."""
    return read_json(path / STATE)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, detached."""
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def restore_model(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Copies `weights` into the model, all of them or none.

    Raises:
        CheckpointMismatchError: naming what is missing, unknown or of another shape or dtype.
    """
    # All problems before the first copy: a model that was half restored would train without a word.
    own = model_tensors(model)
    problems = [f"{name} is missing" for name in own if name not in weights]
    problems += [f"{name} is unknown to this model" for name in weights if name not in own]
    for name, tensor in own.items():
        stored = weights.get(name, tensor)
        if stored.shape != tensor.shape or stored.dtype != tensor.dtype:
            problems.append(
                f"{name} is {list(stored.shape)} {stored.dtype} instead of {list(tensor.shape)} {tensor.dtype}"
            )
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointMismatchError(f"{source} does not fit this model: {shown}")
    for name, tensor in own.items():
        tensor.copy_(weights[name])


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoint folders, newest first."""
    found = [(int(match[1]), path) for path in folder.glob("step_*") if (match := _NAME.fullmatch(path.name))]
    return sorted(found, reverse=True)

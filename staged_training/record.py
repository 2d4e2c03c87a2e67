"""The run folder: what was asked, where it ran, what it cost, what came out. Everything that is shown later is computed
from it.

`config.json` (resolved), `environment.json`, `metrics.jsonl`, `checkpoints/`, `sections.csv` (the loss of each section
of the validation text, see `corpus.sections`), `ledger.json`, `result.json`;
`result.json` is written last and says that the run is finished. `seal.json` then holds a checksum of each of these
files: a number that was changed afterwards is noticed by whoever reads the record.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from foundation.environment import environment
from foundation.files import (
    SEAL,
    CorruptFileError,
    check_seal,
    json_text,
    read_json,
    remove_leftovers,
    try_lock,
    write_into_seal,
    write_json,
)
from staged_training.code import apart_from_code, code_changes
from staged_training.progress import DIAGNOSTICS, METRICS, TIMING

CONFIG, ENVIRONMENT, LEDGER, RESULT = "config.json", "environment.json", "ledger.json", "result.json"
SECTIONS = "sections.csv"
# Seconds between looks at a lock that somebody else holds.
LOOK_AGAIN_S = 0.2


log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SectionLoss:
    """A line of `sections.csv`: the document that a section of the validation text lies in, its UTF-8 bytes, and its
    summed loss in nats."""

    document: int
    n_bytes: int
    nats: float


class RunMismatchError(ValueError):
    """A run folder holds a run of another configuration, or another process is running it."""


@dataclasses.dataclass(frozen=True)
class Ledger:
    """What a run has cost.

    Attributes:
        costs: by kind of work ("trunk", "caching", "branches", "evaluation") its "flops", counted from the
            configuration, and its measured "seconds"; where it is made of parts, their names, "parts".
    """

    costs: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def add(self, kind: str, *, flops: float, seconds: float, part: str | None = None) -> None:
        """Adds to what a kind of work has cost so far, or to what a part of it has."""
        cost = self.costs.setdefault(kind, {"flops": 0.0, "seconds": 0.0})
        cost["flops"] += flops
        cost["seconds"] += seconds
        if part is not None:
            cost["parts"] = sorted({*cost.get("parts", ()), part})

    def holds(self, kind: str, part: str) -> bool:
        """Whether the cost of a part is among these."""
        return part in self.costs.get(kind, {}).get("parts", ())

    def save(self, folder: Path) -> None:
        """Replaces the ledger of a run folder."""
        write_json(folder / LEDGER, self.costs)

    @classmethod
    def load(cls, folder: Path) -> "Ledger":
        """The ledger of a finished run."""
        return cls(read_json(folder / LEDGER))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A finished run, trunk or branch, as its folder holds it.

    Attributes:
        config: its identity, see `run.Run`.
        result: what `trained_run.summarise`, or whoever took its place, had to say.
    """

    folder: Path
    config: dict[str, Any]
    result: dict[str, Any]
    ledger: Ledger


def open_run(folder: Path, config: dict[str, Any], data_hash: str) -> RunRecord | None:
    """Makes the folder of a run, or finds the run in it.

    Returns:
        the record if this very run is finished; None if it is to be run or continued.

    Raises:
        RunMismatchError: when the folder holds a run of another configuration, naming each key that differs, or of
            other code, naming each file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CONFIG
    if path.exists():
        stored = read_json(path)
        if stored != (asked := json.loads(json.dumps(config))) and apart_from_code(stored) == apart_from_code(asked):
            raise RunMismatchError(
                f"{folder} was trained by other code: {named(code_changes(stored, asked))} changed."
                " --accept-old-code takes it as it is; to train again choose another folder, or remove this one"
            )
        if differing := json_differences(stored, asked):
            raise RunMismatchError(
                f"{folder} holds another run: {'; '.join(differing[:8])}. Choose another folder, or remove this one"
            )
    else:
        write_json(path, config)
    if (folder / RESULT).exists():
        return read_run(folder)
    # Also where the run continues: a bit that changes with the machine must not look like one of the method.
    here = environment(data_hash=data_hash)
    if (folder / ENVIRONMENT).exists() and (changed := json_differences(read_json(folder / ENVIRONMENT), here)):
        log.warning("%s continues in another environment, so its last bits may differ: %s", folder, "; ".join(changed))
    write_json(folder / ENVIRONMENT, here)
    return None


def of_other_code(folder: Path, config: dict[str, Any]) -> list[Path]:
    """Runs that only their code tells from the one that `folder` would hold: there, or beside it where its name ends in
    a hash. Finished ones first, then those of the nearest code, then the newest."""
    found, asked = {}, json.loads(json.dumps(config))
    hashed = re.fullmatch(r"(.*_|)[0-9a-f]{8,}", folder.name)
    for path in folder.parent.glob(f"{hashed[1]}*/{CONFIG}" if hashed else f"{folder.name}/{CONFIG}"):
        with contextlib.suppress(CorruptFileError):
            stored = read_json(path)
            if stored != asked and apart_from_code(stored) == apart_from_code(asked):
                unfinished = not (path.parent / RESULT).exists()
                found[path.parent] = unfinished, len(code_changes(stored, asked)), -path.stat().st_mtime
    return sorted(found, key=lambda run: found[run])


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Keeps a second process out of a run folder, and removes what killed writes left in it. The lock goes with its
    process, however that ends.

    Args:
        wait: for another process to leave, instead of refusing.

    Raises:
        RunMismatchError: when another process is running it.
    """
    with open(folder / ".lock", "w") as file:
        while not try_lock(file.fileno(), folder):
            if wait:
                time.sleep(LOOK_AGAIN_S)
                continue
            raise RunMismatchError(f"{folder} is being run by another process; wait for it or stop it")
        remove_leftovers(folder)
        yield


def read_run(folder: Path) -> RunRecord:
    """The record of a finished run.

    Raises:
        ValueError: when the folder holds no finished run.
        CorruptFileError: when a file of it is not as it was written; names it.
    """
    if not (folder / RESULT).exists():
        raise ValueError(f"{folder} holds no finished run: {RESULT} is missing")
    check_run(folder)
    config, result = (read_json(folder / name) for name in (CONFIG, RESULT))
    return RunRecord(folder=folder, config=config, result=result, ledger=Ledger.load(folder))


def check_run(folder: Path) -> None:
    """Compares the files of a finished run with its seal.

    Raises:
        CorruptFileError: naming the file, and how to get the run back.
    """
    try:
        check_seal(folder)
    except CorruptFileError as error:
        raise CorruptFileError(
            f"{error}. Its numbers cannot be trusted: put the file back, or remove the folder and run the same command"
            " again"
        ) from None


def finish_run(folder: Path, result: dict[str, Any], ledger: Ledger) -> RunRecord:
    """Stores ledger and result, the result last, because it marks the run as finished, and seals the folder."""
    written = [
        name for name in (CONFIG, ENVIRONMENT, METRICS, DIAGNOSTICS, TIMING, SECTIONS) if (folder / name).exists()
    ]
    texts = {LEDGER: json_text(ledger.costs), RESULT: json_text(result)}
    write_into_seal(folder, texts, seal_too=written, anew=True)
    return read_run(folder)


def reopen_run(folder: Path) -> None:
    """A finished run is unfinished again: the same command runs what is missing of it."""
    with locked(folder):
        (folder / RESULT).unlink()


def set_aside(folder: Path, place: Path) -> Path:
    """Moves a run's folder below `place`, where nothing looks for runs to use.

    Returns:
        Where it lies now.
    """
    place.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        names = itertools.chain([folder.name], (f"{folder.name}_{number}" for number in itertools.count(2)))
        return folder.rename(next(place / name for name in names if not (place / name).exists()))


def kept_costs(folder: Path) -> Ledger:
    """The costs that a run which was reopened keeps: what branches have stored beside it was not lost."""
    costs = Ledger.load(folder).costs if (folder / LEDGER).exists() else {}
    return Ledger({kind: cost for kind, cost in costs.items() if kind == "caching"})


def add_cost(folder: Path, kind: str, *, flops: float, seconds: float, part: str) -> Ledger:
    """Adds to the costs of a finished run, inside its lock; returns all of them. See `Ledger.add`."""
    ledger = Ledger.load(folder)
    ledger.add(kind, flops=flops, seconds=seconds, part=part)
    # A folder from before there were seals stays without: nobody knows whether its other files are as written.
    if (folder / SEAL).exists():
        write_into_seal(folder, {LEDGER: json_text(ledger.costs)})
    else:
        ledger.save(folder)
    return ledger


def json_differences(stored: Any, asked: Any) -> list[str]:
    """Where a value that was read from JSON differs from one that is asked for, as "place: stored 12, asked 8"."""
    # Through JSON, so that a tuple that is asked for equals the list that it was stored as.
    return _differences(stored, json.loads(json.dumps(asked)), "")


def named(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _differences(stored: Any, asked: Any, place: str) -> list[str]:
    if isinstance(stored, dict) and isinstance(asked, dict):
        return [
            line
            for key in sorted(stored | asked)
            for line in _differences(stored.get(key), asked.get(key), f"{place}.{key}" if place else key)
        ]
    return [] if stored == asked else [f"{place}: stored {json.dumps(stored)}, asked {json.dumps(asked)}"]

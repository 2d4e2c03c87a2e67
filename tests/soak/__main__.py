"""`python -m tests.soak`: attacks on everything that must not break, for as long as they are given, and a table of what
came of them.

    kills     processes killed at any change of a file, in half-written files, at any moment
    flips     bytes changed and files cut
    disk      a disk that runs full at any moment
    ops       operations at random shapes and layouts against their definitions
    commands  random command lines

A case is a function of its attack and its seed. What fails is kept in a file and can be repeated: `--replay flips:17`.
Exit code 1 where anything failed.
"""

import os

# Ahead of all that imports torch or Triton: kernels are interpreted, and no thread is there when processes are forked.
os.environ["TRITON_INTERPRET"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import dataclasses
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import tyro

from foundation.command import CannotGoOn, refuse_unwritable, run_command
from foundation.numbers import check_numbers
from foundation.stopping import Interrupted
from foundation.tables import write_rows, write_table
from tests.soak import commands, disk, flips, kills, ops
from tests.soak.world import Outcome, World

Attack = Literal["kills", "flips", "disk", "ops", "commands"]
CASES: dict[str, Callable[[World, int], Outcome]] = {
    "kills": kills.case,
    "flips": flips.case,
    "disk": disk.case,
    "ops": ops.case,
    "commands": commands.case,
}
# Of the time.
SHARES = {"kills": 0.7, "flips": 0.1, "disk": 0.05, "ops": 0.05, "commands": 0.1}
# The short form: so many cases of each, the same every time.
SHORT = {"kills": 2, "flips": 3, "disk": 1, "ops": 4, "commands": 5}
# Cases of different seeds of the command share none of their draws.
CASES_PER_SEED = 10**6
COLUMNS = ("attack", "subject", "cases", "count", "outcomes", "faults")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoakConfig:
    """Attacks this checkout.

    Attributes:
        minutes: how long; cases that have begun are ended.
        short: a fixed small number of cases instead, about a minute.
        seed: of the first case of each attack.
        only: these attacks; all by default.
        replay: one case again, as ATTACK:SEED.
        csv: write the table into this file as well.
        failing: the cases that failed are added to this file, one per line.
    """

    minutes: float = 60.0
    short: bool = False
    seed: int = 0
    only: tuple[Attack, ...] = ()
    replay: str | None = None
    csv: Path | None = None
    failing: Path = Path("runs/soak/failing_seeds.csv")

    def __post_init__(self) -> None:
        check_numbers(self, minutes=0, seed=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failed:
    """A line of the file of failing cases."""

    attack: str
    seed: int
    subject: str
    problem: str


class Record:
    """What came of all cases so far."""

    def __init__(self, csv: Path | None, failing: Path) -> None:
        self.csv, self.failing = csv, failing
        self.outcomes: list[tuple[str, Outcome]] = []
        self.failed: list[Failed] = []

    def add(self, attack: str, seed: int, outcome: Outcome) -> None:
        """Takes a case in; what must not be lost is written at once."""
        self.outcomes.append((attack, outcome))
        if outcome.problem:
            failed = Failed(attack=attack, seed=seed, subject=outcome.subject, problem=outcome.problem)
            print(f"FAULT {attack}:{seed} {outcome.subject}: {outcome.problem}", flush=True)
            self.failed.append(failed)
            write_rows(self.failing, Failed, self.failed)
        if self.csv:
            write_table(self.csv, COLUMNS, self.rows())

    def rows(self) -> list[tuple]:
        """One per attack and subject, and one per attack."""
        rows = []
        for attack in CASES:
            mine = [outcome for name, outcome in self.outcomes if name == attack]
            for subject in sorted({outcome.subject for outcome in mine}):
                rows.append(_row(attack, subject, [outcome for outcome in mine if outcome.subject == subject]))
            if mine:
                rows.append(_row(attack, "all", mine))
        return rows

    def text(self) -> str:
        """The rows for people."""
        table = [COLUMNS, *self.rows()]
        widths = [max(len(str(row[column])) for row in table) for column in range(len(COLUMNS))]
        return "\n".join(
            "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table
        )


def _row(attack: str, subject: str, outcomes: list[Outcome]) -> tuple:
    how: Counter[str] = Counter()
    for outcome in outcomes:
        how[outcome.how if not outcome.problem else "FAULT"] += 1
    said = ", ".join(f"{name} {number}" for name, number in how.most_common())
    faults = sum(bool(outcome.problem) for outcome in outcomes)
    return attack, subject, len(outcomes), sum(outcome.count for outcome in outcomes), said, faults


def soak(config: SoakConfig) -> None:
    """Runs the cases, prints the table.

    Raises:
        ValueError: for a case to replay that is none, and files that cannot be written.
        CannotGoOn: when anything failed.
    """
    refuse_unwritable("--csv", config.csv)
    refuse_unwritable("--failing", config.failing)
    record = Record(config.csv, config.failing)
    with tempfile.TemporaryDirectory(prefix="soak_") as folder:
        if config.replay is not None:
            attack, _, seed = config.replay.partition(":")
            if attack not in CASES or not seed.isdigit():
                raise ValueError(f"--replay {config.replay}: must be ATTACK:SEED, attacks are {', '.join(CASES)}")
            record.add(attack, int(seed), CASES[attack](World(Path(folder)), int(seed)))
        else:
            try:
                run_cases(config, World(Path(folder)), record)
            except Interrupted as stopped:
                print(f"{stopped}; what there was until then:", file=sys.stderr)
    print(record.text())
    if record.failed:
        raise CannotGoOn(f"{len(record.failed)} cases failed; python -m tests.soak --replay ATTACK:SEED repeats one")


def run_cases(config: SoakConfig, world: World, record: Record) -> None:
    """Next is always the attack that is furthest behind its share: of the time, or of the cases of the short form."""
    chosen = config.only or tuple(CASES)
    spent, number, began = dict.fromkeys(chosen, 0.0), dict.fromkeys(chosen, 0), time.monotonic()
    while True:
        if config.short:
            waiting = [attack for attack in chosen if number[attack] < SHORT[attack]]
        else:
            waiting = [attack for attack in chosen if time.monotonic() - began < 60 * config.minutes]
        if not waiting:
            return
        attack = min(waiting, key=lambda name: spent[name] / SHARES[name])
        seed = config.seed * CASES_PER_SEED + number[attack]
        case_began = time.monotonic()
        record.add(attack, seed, CASES[attack](world, seed))
        spent[attack] += time.monotonic() - case_began
        number[attack] += 1


def main(arguments: list[str] | None = None) -> None:
    run_command(lambda given: tyro.cli(SoakConfig, prog="python -m tests.soak", args=given), soak, arguments)


if __name__ == "__main__":
    main()

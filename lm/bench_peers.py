"""`python -m lm bench --peers`: our whole model against transformers' of the same sizes, one process each, in turn.

A machine that is shared speeds up and slows down by a third within minutes, so a ratio is taken within a round, where
both sides follow each other directly, and its spread over the rounds is printed beside it.

Legend: B batch, T tokens.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from foundation.command import CannotGoOn, refuse_unwritable
from foundation.environment import ROOT, device_name, short_commit, version
from foundation.numbers import check_numbers
from foundation.tables import write_table
from foundation.timing import wall_seconds
from lm.config import DTYPES
from lm.peer_sides import CASES, SIDES, VOCABULARY, Side

# Sequences, tokens. Decoding is timed after so many.
TRAINING = (4, 1024)
PREFILL_LENGTHS = (2048, 8192)
DECODE_BATCHES = (1, 8)
DECODE_LENGTHS = (1024, 8192, 16384)
DECODE_STEPS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeersConfig:
    """What to time against transformers.

    Attributes:
        cases: which pairs of models; all by default.
        dtypes: of both sides.
        parts: of training, prefill, decode.
        rounds: turns of both sides per row, after one that does not count.
        seconds: of a row. Where its first turn leaves no time for all rounds there are fewer, and where it leaves none
            for another turn it counts itself.
        threads: CPU threads of both sides.
        longest: leave out rows of a longer context, for a short run.
        csv: also write every round there.
    """

    cases: tuple[str, ...] = tuple(CASES)
    dtypes: tuple[str, ...] = DTYPES
    parts: tuple[str, ...] = ("training", "prefill", "decode")
    rounds: int = 3
    seconds: float = 300.0
    threads: int = 2
    longest: int = max(DECODE_LENGTHS)
    csv: Path | None = None

    def __post_init__(self) -> None:
        check_numbers(self, rounds=1, seconds=0, threads=1, longest=1)
        for name, given, legal in (
            ("cases", self.cases, CASES),
            ("dtypes", self.dtypes, DTYPES),
            ("parts", self.parts, ("training", "prefill", "decode")),
        ):
            if wrong := [value for value in given if value not in legal]:
                raise ValueError(f"PeersConfig.{name}: {wrong[0]!r} is not one of {', '.join(map(repr, legal))}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One thing to time: `batch` sequences of `length` tokens."""

    name: str
    batch: int
    length: int

    @property
    def tokens(self) -> int:
        """Per timed call."""
        return self.batch * (1 if self.name == "decode" else self.length)


def bench_peers(config: PeersConfig) -> list[dict[str, str]]:
    """Times all rows and prints them as they come; returns them."""
    refuse_unwritable("--csv", config.csv)
    if version("transformers") is None:
        raise CannotGoOn("transformers is not installed: pip install -e '.[hub]'")
    print(
        f"commit {short_commit()}, {device_name()}, torch {torch.__version__}, transformers {version('transformers')},"
        f" {config.threads} threads, {config.rounds} rounds"
    )
    print(
        f"{'model':18} {'dtype':9} {'part':9} {'batch':>5} {'tokens':>6} {'ours':>9} {'theirs':>9}  ratio (of rounds)"
    )
    rows = []
    for dtype in config.dtypes:
        for case in config.cases:
            workers = {side: Worker(side, case, dtype, config.threads) for side in SIDES}
            print(f"{case}, {dtype}: " + "; ".join(f"{side} by {worker.kernels}" for side, worker in workers.items()))
            for part in _parts(config):
                rows.append(_row(case, dtype, part, workers, config))
                print(_line(rows[-1]), flush=True)
                # Row by row: all of them take an hour, and what is stopped keeps what it has measured.
                if config.csv:
                    write_table(config.csv, list(rows[0]), [list(row.values()) for row in rows])
            for worker in workers.values():
                worker.close()
    return rows


def _parts(config: PeersConfig) -> list[Part]:
    parts = [Part(name="training", batch=TRAINING[0], length=TRAINING[1])]
    parts += [Part(name="prefill", batch=1, length=length) for length in PREFILL_LENGTHS]
    parts += [Part(name="decode", batch=batch, length=length) for length in DECODE_LENGTHS for batch in DECODE_BATCHES]
    return [part for part in parts if part.name in config.parts and part.length <= config.longest]


def _row(case: str, dtype: str, part: Part, workers: "dict[str, Worker]", config: PeersConfig) -> dict[str, str]:
    def turn() -> dict[str, float]:
        return {side: part.tokens / worker.seconds(part) for side, worker in workers.items()}

    began = time.perf_counter()
    first = turn()
    # A worker's first turn also fills its caches, so it is taken for one only where there is no time for another.
    fitting = int(config.seconds / (time.perf_counter() - began)) - 1
    turns = [turn() for _ in range(min(config.rounds, fitting))] or [first]
    speeds = {side: [each[side] for each in turns] for side in workers}
    ratios = sorted(ours / theirs for ours, theirs in zip(speeds["ours"], speeds["transformers"]))
    return {
        "model": case,
        "dtype": dtype,
        "part": part.name,
        "batch": str(part.batch),
        "length": str(part.length),
        "rounds": str(len(turns)),
        **{f"{side}_tokens_per_second": f"{statistics.median(values):.1f}" for side, values in speeds.items()},
        "ratio": f"{statistics.median(ratios):.2f}",
        "lowest_ratio": f"{ratios[0]:.2f}",
        "highest_ratio": f"{ratios[-1]:.2f}",
    }


def _line(row: dict[str, str]) -> str:
    return (
        f"{row['model']:18} {row['dtype']:9} {row['part']:9} {row['batch']:>5} {row['length']:>6}"
        f" {row['ours_tokens_per_second']:>9} {row['transformers_tokens_per_second']:>9}"
        f"  {row['ratio']}x ({row['lowest_ratio']} to {row['highest_ratio']})"
    )


class Worker:
    """A process that holds one side's model and times what it is asked for; between turns it waits without spinning.

    Attributes:
        kernels: what computes the model there.
    """

    def __init__(self, side: str, case: str, dtype: str, threads: int) -> None:
        # Passive waiting: a side whose turn it is not must leave the cores alone.
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        self.name = f"{side}, {case}, {dtype}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lm.bench_peers", side, case, dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        self.kernels = self._answer("starting")

    def seconds(self, part: Part) -> float:
        """Of one call."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(dataclasses.asdict(part)) + "\n")
        self.process.stdin.flush()
        return float(self._answer(f"timing {part}"))

    def _answer(self, doing: str) -> str:
        assert self.process.stdout is not None
        answer = self.process.stdout.readline().strip()
        if not answer:
            raise CannotGoOn(f"{self.name}: ended with exit code {self.process.wait()} while {doing}")
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def time_part(side: Side, part: Part) -> float:
    """Seconds of one call: the median of `DECODE_STEPS` tokens, or one training step or prefill."""
    tokens_BT = torch.randint(VOCABULARY, (part.batch, part.length + 1), generator=torch.Generator().manual_seed(0))
    if part.name == "training":
        return wall_seconds(lambda: side.training(tokens_BT[:, :-1], tokens_BT[:, 1:]))
    if part.name == "prefill":
        return wall_seconds(lambda: side.prefill(tokens_BT[:, :-1]))
    step: Any = side.decoder(part.batch, part.length, DECODE_STEPS + 2)
    return statistics.median([wall_seconds(step) for _ in range(DECODE_STEPS + 2)][2:])


def _serve(side: str, case: str, dtype: str) -> None:
    """The worker's end: what computes its model, then for every line of input, a part, its seconds."""
    answers = os.fdopen(os.dup(1), "w")
    # What libraries print must not be taken for an answer.
    os.dup2(2, 1)
    model = SIDES[side](CASES[case], dtype)
    print(model.kernels(), file=answers, flush=True)
    for line in sys.stdin:
        print(time_part(model, Part(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:])

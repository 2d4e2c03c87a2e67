"""`python -m ablations scaling ladder`: runs of our own, their largest predicted before they are trained.

    <out>/trunks/<hash>/     the runs
    <out>/scaling/<hash>/    points.csv (for `fit` and `compare`), predicted.csv, compared.csv

A prediction counts only where it was written before its run: `predicted.csv` is written once, and never while a
held-out run is finished.
"""

import dataclasses
import shutil
from collections.abc import Sequence

from ablations.scaling.forms import Law, find_law
from ablations.scaling.ladder_intervals import PredictedRow, predictions
from ablations.scaling.ladder_options import LadderOptions
from ablations.scaling.ladder_plan import Ladder, Rung, cost_text, prepare_ladder
from foundation.command import leave_options
from foundation.tables import read_rows, write_rows
from staged_training.record import read_run

POINTS_FILE, PREDICTED_FILE, COMPARED_FILE = "points.csv", "predicted.csv", "compared.csv"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PointRow:
    """A finished run; the columns are those that `fit` and `compare` read by default. `loss` is bits per byte of the
    validation text, `scale` see `Rung`."""

    run: str
    method: str
    held_out: int
    total_params: float
    active_params: float
    tokens: int
    experts: int
    granularity: float
    density: float
    flops: float
    seconds: float
    scale: float
    loss: float
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparedRow:
    """A law's prediction beside what came out; `inside` is whether that lies in the 90 % interval."""

    law: str
    run: str
    predicted: float
    low_90: float
    high_90: float
    loss: float
    error_percent: float
    inside: int


def compared(predicted: PredictedRow, run: PointRow) -> ComparedRow:
    """A prediction beside what came out."""
    return ComparedRow(
        law=predicted.law,
        run=run.run,
        predicted=predicted.predicted,
        low_90=predicted.low_90,
        high_90=predicted.high_90,
        loss=run.loss,
        error_percent=100 * (predicted.predicted / run.loss - 1),
        inside=int(predicted.low_90 <= run.loss <= predicted.high_90),
    )


def ladder_command(options: LadderOptions) -> Ladder:
    """Prints the cost, then does what the phase asks for.

    Raises:
        ValueError: for options, text or methods that do not fit, for a prediction that comes too late, and for largest
            runs without a prediction.
        foundation.stopping.Interrupted: after a stop signal, with everything saved; the same call continues.
    """
    law = find_law(options.law)
    ladder = prepare_ladder(options)
    waiting = [rung for rung in ladder.rungs if not rung.finished]
    held = {"all": (False, True), "small": (False,), "largest": (True,)}.get(options.phase, ())
    print(cost_text(ladder, [rung for rung in waiting if rung.held_out in held]), flush=True)
    if options.dry_run:
        return ladder
    leave_options(ladder.folder)
    if options.phase in ("all", "small"):
        train(ladder, [rung for rung in ladder.rungs if not rung.held_out])
    if options.phase in ("all", "predict") and options.held_out:
        predict_largest(ladder, law)
    if options.phase in ("all", "largest"):
        if options.held_out and not (ladder.folder / PREDICTED_FILE).exists():
            raise ValueError(f"{ladder.folder}: no {PREDICTED_FILE}; predict the largest runs first: --phase predict")
        train(ladder, [rung for rung in ladder.rungs if rung.held_out])
        compare_largest(ladder)
    print(f"\nladder: {ladder.folder}")
    return ladder


def train(ladder: Ladder, rungs: Sequence[Rung]) -> None:
    """Trains what is not finished, the cheapest first, then writes the points so far."""
    for rung in rungs:
        if rung.finished:
            continue
        execution = ladder.execution(rung)
        # Where old code is accepted, the execution's plan is that of its run.
        run = dataclasses.replace(execution.plan.trunk_run(rung.folder), label=rung.name)
        if execution.open(run) is None:
            execution.train_trunk(run)
        # Nothing goes on from there.
        shutil.rmtree(run.checkpoints, ignore_errors=True)
    write_points(ladder)


def write_points(ladder: Ladder) -> list[PointRow]:
    """Every finished run."""
    rows = []
    for rung in ladder.rungs:
        if rung.finished:
            record = read_run(rung.folder)
            cost = record.ledger.costs["trunk"]
            rows.append(
                PointRow(
                    run=rung.name,
                    method=rung.method,
                    held_out=int(rung.held_out),
                    total_params=rung.total_params,
                    active_params=rung.active_params,
                    tokens=rung.tokens,
                    experts=rung.experts,
                    granularity=rung.granularity,
                    density=rung.density,
                    flops=cost["flops"],
                    seconds=cost["seconds"],
                    scale=rung.scale,
                    loss=record.result["bits_per_byte"],
                    seed=rung.seed,
                )
            )
    write_rows(ladder.folder / POINTS_FILE, PointRow, rows)
    return rows


def predict_largest(ladder: Ladder, law: Law) -> list[PredictedRow]:
    """Fits the law to each method's runs and writes what it says of its held-out ones, once.

    Raises:
        ValueError: where runs to fit are missing, a held-out one is finished, or there are too few for the law.
    """
    path = ladder.folder / PREDICTED_FILE
    if path.exists():
        print(f"predicted before, in {path}")
        return read_rows(path, PredictedRow)
    missing = [rung.name for rung in ladder.rungs if not rung.held_out and not rung.finished]
    if missing:
        raise ValueError(f"{len(missing)} runs are not finished, {missing[0]} first; train them: --phase small")
    if late := [rung.name for rung in ladder.rungs if rung.held_out and rung.finished]:
        raise ValueError(f"{late[0]} is trained already: what is said of it now would be no prediction")
    rows, points = [], write_points(ladder)
    for method in dict.fromkeys(rung.method for rung in ladder.rungs):
        own = [row for row in points if row.method == method]
        held = [rung for rung in ladder.rungs if rung.held_out and rung.method == method]
        rows += predictions(own, held, law, ladder.options.resamples)
    write_rows(path, PredictedRow, rows)
    for row in rows:
        print(f"{row.run}: {row.predicted:.4f} ({row.low_90:.4f} to {row.high_90:.4f}) bits per byte predicted")
    print("intervals of 90 % are as wide as the ladder's own larger runs, predicted from smaller ones, were missed by")
    print(f"written before these runs: commit {path}, then --phase largest", flush=True)
    return rows


def compare_largest(ladder: Ladder) -> list[ComparedRow]:
    """Writes and prints every prediction beside what came out."""
    predicted = {row.run: row for row in read_rows(ladder.folder / PREDICTED_FILE, PredictedRow)}
    points = write_points(ladder)
    rows = [compared(predicted[point.run], point) for point in points if point.run in predicted]
    write_rows(ladder.folder / COMPARED_FILE, ComparedRow, rows)
    for row in rows:
        print(
            f"{row.run}: {row.loss:.4f}, predicted {row.predicted:.4f} ({row.low_90:.4f} to {row.high_90:.4f}),"
            f" {row.error_percent:+.2f} %, {'inside' if row.inside else 'outside'}"
        )
    return rows

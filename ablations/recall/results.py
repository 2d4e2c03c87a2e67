"""What the runs of the recall study say: rows of every run, every segment of its test, every plan and width."""

import dataclasses
import statistics
from collections.abc import Sequence

from ablations.comparison.statistics import t_interval
from ablations.recall.options import RecallOptions
from ablations.recall.study import Task
from attention.cache import cache_bytes

# Bytes of a number that a state keeps: the study computes in fp32.
ELEMENT = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRow:
    """One run: a plan at one width, one rate and one seed. The state is that of one text as long as the longest of the
    test; `loss` nats per question of training, at the end."""

    plan: str
    width: int
    rate: float
    seed: int
    state_bytes: int
    state_elements: int
    accuracy: float
    loss: float
    steps: int
    diverged: int
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentRow:
    """One segment of a run's test."""

    plan: str
    width: int
    rate: float
    seed: int
    length: int
    pairs: int
    accuracy: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateRow:
    """A plan at one width: mean, lowest and highest accuracy over the seeds at the rate with the best mean.

    Attributes:
        half_width: of the mean's 95 % interval over the seeds (Student's t); None of one seed. The rate is chosen on
            the same seeds, so that the mean is a little too high.
        rates: how many were tried.
        edge: whether the best rate is the lowest or the highest that was tried, so that one beyond it may be better.
    """

    plan: str
    width: int
    state_bytes: int
    state_elements: int
    rate: float
    accuracy: float
    lowest: float
    highest: float
    half_width: float | None
    seeds: int
    rates: int
    edge: int


def run_rows(options: RecallOptions, tasks: Sequence[Task]) -> list[RunRow]:
    """Every finished run."""
    rows = []
    for task in tasks:
        if not task.finished:
            continue
        run, result = task.run, task.result
        n_bytes = sum(cache_bytes(run.model.attentions, run.model.plan, options.longest, element_size=ELEMENT))
        rows.append(
            RunRow(
                plan=run.plan,
                width=run.width,
                rate=run.rate,
                seed=run.seed,
                state_bytes=n_bytes,
                state_elements=n_bytes // ELEMENT,
                accuracy=result.accuracy,
                loss=result.loss,
                steps=result.steps,
                diverged=int(result.diverged),
                seconds=result.seconds,
            )
        )
    return rows


def segment_rows(tasks: Sequence[Task]) -> list[SegmentRow]:
    """Every segment of every finished run."""
    return [
        SegmentRow(
            plan=task.run.plan,
            width=task.run.width,
            rate=task.run.rate,
            seed=task.run.seed,
            length=segment.length,
            pairs=segment.pairs,
            accuracy=accuracy,
        )
        for task in tasks
        if task.finished
        for segment, accuracy in zip(task.run.test, task.result.accuracies)
    ]


def state_rows(rows: Sequence[RunRow]) -> list[StateRow]:
    """A row per plan and width, by plan and then by size."""
    found = []
    for plan in dict.fromkeys(row.plan for row in rows):
        for width in sorted({row.width for row in rows if row.plan == plan}):
            own = [row for row in rows if row.plan == plan and row.width == width]
            by_rate = by_rate_of(own)
            best = max(by_rate, key=lambda rate: statistics.fmean(by_rate[rate]))
            found.append(
                StateRow(
                    plan=plan,
                    width=width,
                    state_bytes=own[0].state_bytes,
                    state_elements=own[0].state_elements,
                    rate=best,
                    accuracy=statistics.fmean(by_rate[best]),
                    lowest=min(by_rate[best]),
                    highest=max(by_rate[best]),
                    half_width=t_interval(by_rate[best]).half_width,
                    seeds=len(by_rate[best]),
                    rates=len(by_rate),
                    edge=int(best in (min(by_rate), max(by_rate))),
                )
            )
    return found


def by_rate_of(rows: Sequence[RunRow]) -> dict[float, list[float]]:
    """By rate, of all seeds."""
    by_rate: dict[float, list[float]] = {}
    for row in sorted(rows, key=lambda row: (row.rate, row.seed)):
        by_rate.setdefault(row.rate, []).append(row.accuracy)
    return by_rate

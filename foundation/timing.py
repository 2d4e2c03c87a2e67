"""How long something takes: the one stopwatch of benchmarks and estimates.

Times are wall-clock seconds unless a name says otherwise; on a GPU the host waits for the device before it looks.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Run = Callable[[], Any]

# Cycles that the device sleeps before a timed region, so that the host is ahead of it with launches.
HEAD_START = 1_000_000


def wall_seconds(run: Run, device: str = "cpu") -> float:
    """One call, as a person waits for it: launches and host work count."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def device_seconds(run: Run, device: str = "cpu") -> float:
    """One call, as the device is busy with it: on a GPU by events, launches behind a head start being free."""
    if device != "cuda":
        return wall_seconds(run)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(HEAD_START)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def median_seconds(
    run: Run, *, repeats: int, warm_up: int = 2, device: str = "cpu", clock: Callable[[Run, str], float] = wall_seconds
) -> float:
    """Median over `repeats` calls, after `warm_up` calls that do not count (caches, allocator, compilation)."""
    return statistics.median([clock(run, device) for _ in range(warm_up + repeats)][warm_up:])


def in_turns(
    runs: Mapping[str, Run],
    *,
    repeats: int,
    warm_up: int = 1,
    device: str = "cpu",
    before_turn: Callable[[int], None] = lambda turn: None,
) -> dict[str, list[float]]:
    """Wall-clock seconds of each, taken in turns so that a disturbance of the machine hits all alike.

    Args:
        warm_up: first turns that do not count.
        before_turn: called, untimed, with the number of each turn.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warm_up + repeats):
        before_turn(turn)
        for name, run in runs.items():
            seconds = wall_seconds(run, device)
            if turn >= warm_up:
                times[name].append(seconds)
    return times

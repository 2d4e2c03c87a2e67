"""Which of several ways to the experts is the fastest on this machine: measured once per class of shapes, and kept.

Ways round differently, so whoever asks again must get the same answer: the first process to measure a class leaves a
file in the user's cache, and all others read it, whatever their number of threads. A way that is no clear winner is not
taken.

Legend: T tokens, D model width, E experts, F expert width, F2 = 2F.
"""

import functools
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from foundation.environment import cpu_name
from foundation.files import fingerprint
from foundation.source import user_cache
from foundation.timing import in_turns
from routing.assignments import Assignments
from triton_kernels.native.library import SOURCES

Compute = Callable[[Tensor, Tensor, Tensor, Assignments], Tensor]
# Fewer are computed as usual: what could be won is less than what asking takes.
LEAST_FLOPS = 2e8
# Of one timed call: a few milliseconds, ten for large experts, of which there must be several: a way that gives each of
# them to one thread would be timed as if it had no other.
TIMED_FLOPS = 1e9
LEAST_EXPERTS, MOST_EXPERTS, ROUNDS = 4, 8, 3
# Another way is taken where it is so much faster in every round.
MARGIN = 1.15


class ShapeClass(NamedTuple):
    """What a choice depends on, beside the machine; rows per expert to the nearest power of two."""

    dtype: str
    weight_dtype: str
    n_experts: int
    d_model: int
    d_expert: int
    rows_per_expert: int
    training: bool


def class_of(x_TD: Tensor, w_down_EFD: Tensor, n_rows: int) -> ShapeClass | None:
    """That of a call with so many rows; None for one that is too small to be worth it."""
    E, F, D = w_down_EFD.shape
    if 6.0 * n_rows * D * F < LEAST_FLOPS:
        return None
    dtypes = (str(dtype).removeprefix("torch.") for dtype in (x_TD.dtype, w_down_EFD.dtype))
    rows = 1 << max(0, round(n_rows / E) - 1).bit_length()
    return ShapeClass(*dtypes, E, D, F, rows, torch.is_grad_enabled())


@functools.cache
def fastest(shape: ShapeClass, usual: str, ways: tuple[tuple[str, Compute], ...]) -> tuple[str, str]:
    """The name of the way to take, and why, in words.

    Args:
        usual: the one that is taken where none is clearly faster.
        ways: by name, all that can run, `usual` among them.
    """
    # And how it is measured.
    machine = [cpu_name(), torch.__version__, *(source.read_text() for source in (*SOURCES, Path(__file__)))]
    file = user_cache() / f"experts-{fingerprint([machine, shape, usual, sorted(name for name, _ in ways)])[:16]}.json"
    found = _read(file)
    if found is None:
        timed = _timed(shape, dict(ways))
        # Seconds as the usual way's best, times the worst ratio of the rounds: a neighbour on the machine slows both.
        base = min(timed[usual])
        found = {
            name: base * max(own / of_usual for own, of_usual in zip(seconds, timed[usual]))
            for name, seconds in timed.items()
        }
        found = _written(file, found)
    return _chosen(found, usual)


def _chosen(seconds: Mapping[str, float], usual: str) -> tuple[str, str]:
    best = min(seconds, key=lambda name: seconds[name])
    if best != usual and seconds[best] * MARGIN > seconds[usual]:
        best = usual
    times = ", ".join(f"{name} {1e3 * taken:.1f} ms" for name, taken in sorted(seconds.items(), key=lambda x: x[1]))
    return best, f"measured on this machine: {times}"


def _timed(shape: ShapeClass, ways: Mapping[str, Compute]) -> dict[str, list[float]]:
    """Seconds of every round, of a smaller problem of the class: fewer experts, of as many rows."""
    D, F, passes = shape.d_model, shape.d_expert, 3 if shape.training else 1
    most = int(TIMED_FLOPS / (6 * D * F * passes))
    E = min(LEAST_EXPERTS, shape.n_experts)
    rows = max(1, min(shape.rows_per_expert, most // E))
    E = max(E, min(MOST_EXPERTS, shape.n_experts, most // rows))
    generator = torch.Generator().manual_seed(0)
    dtype, weight_dtype = getattr(torch, shape.dtype), getattr(torch, shape.weight_dtype)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    x_TD, dy_TD = draw(rows, D).to(dtype), draw(rows, D).to(dtype)
    weights = [draw(E, D, 2 * F).to(weight_dtype), draw(E, F, D).to(weight_dtype)]
    every = torch.arange(E).repeat(rows, 1)
    share_TE = torch.full((rows, E), 1 / E)
    leaves = [x.requires_grad_(shape.training) for x in (x_TD, *weights, share_TE)]

    def run(compute: Compute) -> None:
        with torch.set_grad_enabled(shape.training):
            assignments = Assignments.from_slots(every, share_TE, n_experts=E)
            y_TD = compute(x_TD, weights[0], weights[1], assignments)
            if shape.training:
                torch.autograd.grad(y_TD, leaves, dy_TD)

    return in_turns({name: functools.partial(run, way) for name, way in ways.items()}, repeats=ROUNDS)


def _read(file: Path) -> dict[str, float] | None:
    try:
        return {str(name): float(seconds) for name, seconds in json.loads(file.read_text()).items()}
    except (OSError, ValueError, AttributeError):
        return None


def _written(file: Path, seconds: dict[str, float]) -> dict[str, float]:
    """What the file holds afterwards: another process may have been first. Where nothing can be written, each process
    has its own."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent) as own:
            own.write(json.dumps(seconds))
            own.flush()
            os.link(own.name, file)
    except FileExistsError:
        pass
    except OSError:
        return seconds
    return _read(file) or seconds

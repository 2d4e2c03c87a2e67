"""`python -m triton_kernels bench`: time each op beside its peers and beside what the machine can do at best.

On a GPU the Triton kernels are timed, on a CPU the torch references. Ours and the peers take turns within one run, on
inputs that rotate so that no cache keeps them; the median counts. Beside an op over tokens and heads stands "dense
matmul": one product of the layer's rows by a dense weight with as many FLOPs. An op whose check against its fp64
reference fails on this machine gets no time, and a peer that disagrees gets no ratio.
"""

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from foundation.files import write_bytes
from foundation.tables import write_rows
from foundation.timing import device_seconds, median_seconds
from triton_kernels.tools.agreement import Call, Reference, leaves_of, output_gradient, outputs_of, results
from triton_kernels.tools.operations import Cost, Operation, Shape, dtype_name, shape_label

# Direction -> a function without arguments that runs it.
Passes = dict[str, Callable[[], Any]]

CEILING, DENSE = "ceiling", "dense matmul"
PREFIXES = (
    (1e12, "T"),
    (1e9, "G"),
    (1e6, "M"),
    (1e3, "k"),
    (1, ""),
    (1e-3, "m"),
    (1e-6, "µ"),
    (1e-9, "n"),
    (1e-12, "p"),
)
# Rows and columns of the matrices, elements of the copy.
CEILING_SIZES = {"cpu": (1024, 2**25), "cuda": (8192, 2**29)}
# Inputs of one op that take turns, turns that do not count (each input has one), and what one source may take for the
# turns that do.
ROTATION, WARM_UP, SOURCE_SECONDS = 3, 3, 2.0
# A turn of a slow source takes longer than this, so that at most three of them count: recurrences token by token, on a
# CPU.
SLOW_MS = 1e3 * SOURCE_SECONDS / 3
# A peer is only a measure of speed: it may round more than we may.
PEER_TOLERANCE = 4.0


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One line: ms is a median; ns_per_head_token = ms over B x T x H where the shape has them; roofline = least time
    that FLOPs and bytes allow at the measured ceilings, over ms; ratio = ms over ours. The ceilings are lines too, so
    that a roofline can be drawn from the table alone."""

    op: str
    source: str
    dtype: str
    shape: str = ""
    direction: str = ""
    ms: float = 0.0
    ns_per_head_token: float = 0.0
    tflops: float = 0.0
    gbytes_per_s: float = 0.0
    roofline: float = 1.0
    ratio: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What this machine does at best, measured: FLOP/s of a large matmul, bytes/s of a large copy."""

    flops: float
    bandwidth: float

    def rows(self, dtype: torch.dtype) -> list[Timing]:
        row = partial(Timing, op=CEILING, dtype=dtype_name(dtype))
        return [row(source="matmul", tflops=1e-12 * self.flops), row(source="copy", gbytes_per_s=1e-9 * self.bandwidth)]


def measure_ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    """Measured, and printed with what they were measured on."""
    size, elements = CEILING_SIZES[device]
    generator = torch.Generator(device).manual_seed(0)
    a, b = torch.randn(2, size, size, device=device, generator=generator).to(dtype)
    x = torch.randn(elements, device=device, dtype=torch.bfloat16, generator=generator)
    y = torch.empty_like(x)
    matmul_ms, copy_ms = (
        1e3 * median_seconds(run, repeats=10, device=device, clock=device_seconds)
        for run in (lambda: a @ b, lambda: y.copy_(x))
    )
    flops, bandwidth = 2e3 * size**3 / matmul_ms, 2e3 * x.nbytes / copy_ms
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    speeds = f"matmul {flops * 1e-12:.2f} TFLOP/s, copy {bandwidth * 1e-9:.1f} GB/s"
    print(f"{name}, torch {torch.__version__}, {dtype_name(dtype)}: {speeds}", flush=True)
    return Ceilings(flops=flops, bandwidth=bandwidth)


def elapsed_ms(run: Callable[[], Any], device: str) -> float:
    return 1e3 * device_seconds(run, device)


def passes(call: Call, inputs: dict[str, Any], gradient: Tensor) -> Passes:
    """forward, forward and backward of the first output, and the backward alone, whose graph is made at its first
    turn."""

    def first_output() -> Tensor:
        return outputs_of(call, inputs)[0]

    graph = cache(first_output)
    gradients = partial(
        torch.autograd.grad, inputs=list(leaves_of(inputs).values()), grad_outputs=gradient, allow_unused=True
    )
    return {
        "forward": torch.no_grad()(first_output),
        "forward+backward": lambda: gradients(first_output()),
        "backward": lambda: gradients(graph(), retain_graph=True),
    }


def dense_matmul(shape: Shape, flops: float, dtype: torch.dtype, device: str) -> Callable[[], Tensor]:
    """Every token's H x K channels times a weight of as many columns as `flops` pays for."""
    rows, width = shape["B"] * shape["T"], shape["H"] * shape["K"]
    generator, columns = torch.Generator(device).manual_seed(0), max(1, round(flops / (2 * rows * width)))
    x = torch.randn(rows, width, device=device, generator=generator).to(dtype)
    w = torch.randn(width, columns, device=device, generator=generator).to(dtype)
    return lambda: x @ w


def agreeing_peers(operation: Operation, label: str, reference: Reference, device: str) -> dict[str, Call]:
    """The peers that run here and compute the same; prints why another has no row."""
    found: dict[str, Call] = {}
    for name, call in (operation.cpu_peers if device == "cpu" else operation.peers).items():
        try:
            agreement = reference.judge(results(call, reference.inputs))
            if agreement.worst > PEER_TOLERANCE:
                raise ArithmeticError(
                    f"{agreement.worst:.1f} of the budget off the fp64 reference in {agreement.where}"
                )
            found[name] = call
        except Exception as error:  # Whatever stops another library must not stop this table.
            print(
                f"{operation.name} {label}: no row for {name}, {type(error).__name__}:"
                f" {(str(error).splitlines() or [''])[0]}"
            )
    return found


def counting(times_ms: list[float]) -> list[float]:
    """The turns of one source that count: all but the first of a slow one, all but WARM_UP of another."""
    return times_ms[1 if min(times_ms, default=0.0) > SLOW_MS else WARM_UP :]


def take_turns(runs: dict[str, Sequence[Callable[[], Any]]], device: str, repeats: int) -> dict[str, float]:
    """Median ms of each source over at most `repeats` turns that count, and no more once they took SOURCE_SECONDS."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    waiting = list(runs)
    while waiting:
        for name in waiting:
            times[name].append(elapsed_ms(runs[name][len(times[name]) % len(runs[name])], device))
        counted = {name: counting(times[name]) for name in waiting}
        waiting = [
            name for name, ms in counted.items() if not ms or (len(ms) < repeats and sum(ms) < 1e3 * SOURCE_SECONDS)
        ]
    return {name: median(counting(ms)) for name, ms in times.items()}


def time_operation(
    operation: Operation,
    shape: Shape,
    dtype: torch.dtype,
    device: str,
    ceilings: Ceilings,
    *,
    peers: bool,
    repeats: int,
) -> list[Timing]:
    """Rows of ours, of every peer that runs here and agrees, and of a dense matmul."""
    label = shape_label(shape)
    ours = partial(operation.call, backend="torch" if device == "cpu" else "triton")
    rotation = [operation.inputs(dtype, device, **shape) for _ in range(ROTATION)]
    reference = Reference(operation, rotation[0])
    agreement = reference.check(ours)
    if not agreement.ok:
        print(
            f"{operation.name} {label}: no time, the check failed ({agreement.where}, {agreement.worst:.2f} of its"
            " budget)"
        )
        return []
    gradient = output_gradient(reference.rounded["output 0"])
    calls = {"ours": ours} | (agreeing_peers(operation, label, reference, device) if peers else {})
    del reference
    sources = {name: [passes(call, inputs, gradient) for inputs in rotation] for name, call in calls.items()}
    forward, backward = operation.cost(dtype.itemsize, **shape)
    costs = {"forward": forward}
    if backward is not None:
        costs["forward+backward"] = Cost(flops=forward.flops + backward.flops, bytes=forward.bytes + backward.bytes)
        costs["backward"] = backward
    head_tokens = shape["B"] * shape["T"] * shape["H"] if {"B", "T", "H"} <= shape.keys() else float("inf")
    rows, medians = [], {}
    for direction, cost in costs.items():
        if direction == "backward":
            # A slow peer has none: its forward would have to run again for it.
            sources = {name: turns for name, turns in sources.items() if name == "ours" or medians[name] <= SLOW_MS}
        runs: dict[str, Sequence[Callable[[], Any]]] = {
            name: [each[direction] for each in turns] for name, turns in sources.items()
        }
        if peers and {"B", "T", "H", "K"} <= shape.keys():
            runs[DENSE] = [dense_matmul(shape, cost.flops, dtype, device)]
        medians = take_turns(runs, device, repeats)
        least_ms = 1e3 * max(cost.flops / ceilings.flops, cost.bytes / ceilings.bandwidth)
        for name, ms in medians.items():
            numbers = {
                "ms": ms,
                "ns_per_head_token": 1e6 * ms / head_tokens,
                "tflops": 1e-9 * cost.flops / ms,
                "gbytes_per_s": 1e-6 * cost.bytes / ms,
                "roofline": least_ms / ms,
                "ratio": ms / medians["ours"],
            }
            rounded = {column: float(f"{number:.4g}") for column, number in numbers.items()}
            row = Timing(
                op=operation.name, source=name, dtype=dtype_name(dtype), shape=label, direction=direction, **rounded
            )
            print(line(row), flush=True)
            rows.append(row)
    return rows


HEADING = (
    f"{'op':34} {'dtype':9} {'shape':30} {'direction':17} {'source':16} {'time':>9} {'head, token':>11} {'FLOP/s':>8}"
    f" {'bytes/s':>8} {'roofline':>8} {'of ours':>8}"
)


def line(row: Timing) -> str:
    """A row under `HEADING`, every number with the unit that fits it; a dash where there is no such number."""
    per_head = scaled(1e-9 * row.ns_per_head_token, "s")
    return (
        f"{row.op:34} {row.dtype:9} {row.shape:30} {row.direction:17} {row.source:16} {scaled(1e-3 * row.ms, 's'):>9}"
        f" {per_head:>11} {scaled(1e12 * row.tflops, ''):>8} {scaled(1e9 * row.gbytes_per_s, ''):>8}"
        f" {row.roofline:>8.1%} {row.ratio:>7.2f}x"
    )


def scaled(number: float, unit: str) -> str:
    """Three digits and a prefix: 0.0123 s as 12.3 ms; a dash for zero, which nothing here can take."""
    for factor, prefix in PREFIXES:
        if number >= 0.9995 * factor:
            return f"{number / factor:.3g} {prefix}{unit}"
    return "-"


def run_bench(
    operations: list[Operation],
    device: str,
    dtypes: Sequence[torch.dtype],
    *,
    csv: Path | None = None,
    until: float = float("inf"),
    **options: Any,
) -> list[Timing]:
    """Every op at its timed shapes, each op's first before any op's second; `options` are those of `time_operation`.
    After each, `csv` holds the rows so far; past `until` (seconds of the monotonic clock) none is begun."""
    rows: list[Timing] = []
    for dtype in dtypes:
        ceilings = measure_ceilings(device, dtype)
        rows += ceilings.rows(dtype)
        print(HEADING)
        shapes_of_ops = [
            operation.bench_shapes if device == "cuda" else operation.cpu_shapes for operation in operations
        ]
        turns = [
            turn for shapes in zip_longest(*shapes_of_ops) for turn in zip(operations, shapes) if turn[1] is not None
        ]
        for operation, shape in turns:
            try:
                if time.monotonic() > until:
                    raise TimeoutError("no time left")
                rows += time_operation(operation, shape, dtype, device, ceilings, **options)
            except (TimeoutError, torch.OutOfMemoryError) as error:
                print(f"{operation.name} {shape_label(shape)}: not timed, {error}")
            if csv is not None:
                write_rows(csv, Timing, rows)
    return rows


def plot_roofline(rows: list[Timing], path: Path) -> None:
    """Achieved FLOP/s over FLOPs per byte of every row of ours, under the measured roof of each dtype; svg, png or pdf
    by the file's name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for dtype in dict.fromkeys(row.dtype for row in rows):
        matmul, copy = (
            next(row for row in rows if (row.op, row.dtype, row.source) == (CEILING, dtype, name))
            for name in ("matmul", "copy")
        )
        intensity = [2.0**i for i in range(-4, 13)]
        axes.plot(
            intensity, [min(matmul.tflops, 1e-3 * copy.gbytes_per_s * x) for x in intensity], label=f"ceiling, {dtype}"
        )
        for direction, marker in (("forward", "o"), ("backward", "s")):
            ours = [row for row in rows if (row.source, row.dtype, row.direction) == ("ours", dtype, direction)]
            places = {f"{row.op} {row.shape}": (1e3 * row.tflops / row.gbytes_per_s, row.tflops) for row in ours}
            axes.scatter(*zip(*places.values()), marker=marker, label=f"{direction}, {dtype}")
            for label, place in places.items():
                axes.annotate(label, place, fontsize=5)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte of the least traffic", ylabel="TFLOP/s")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:] or "svg")
    write_bytes(path, drawn.getvalue())

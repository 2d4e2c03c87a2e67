"""`python -m triton_kernels bench`: time each op beside its peers and beside what the machine can do at best.

On a GPU the Triton kernels are timed with CUDA events; on a CPU the torch references are timed instead, against the registered CPU peers. Ours and
the peers take turns within one run, on inputs that rotate so that no cache keeps them. An op whose check against its fp64 reference fails on this
machine gets no time, and a peer that disagrees gets no ratio.
"""

import csv
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch

from triton_kernels.agreement import check, compare
from triton_kernels.configurations import Cost, Operation, Shape


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One line: ms is a median; roofline = least time that FLOPs and bytes allow at the measured ceilings, over ms; ratio = ms over ours."""

    op: str
    source: str
    shape: str
    direction: str
    ms: float
    tflops: float
    gbytes_per_s: float
    roofline: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What this machine does at best, measured: FLOP/s of a large matmul, bytes/s of a large copy."""

    flops: float
    bandwidth: float


def elapsed_ms(run: Callable[[], Any], device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def measure_ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    size, elements = (1024, 2**25) if device == "cpu" else (8192, 2**29)
    a, b = torch.randn(size, size, device=device).to(dtype), torch.randn(size, size, device=device).to(dtype)
    x = torch.zeros(elements, device=device, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    matmul = median([elapsed_ms(lambda: a @ b, device) for _ in range(12)][2:])
    copy = median([elapsed_ms(lambda: y.copy_(x), device) for _ in range(12)][2:])
    return Ceilings(flops=2 * size**3 / (matmul * 1e-3), bandwidth=2 * x.nbytes / (copy * 1e-3))


def passes(call: Callable[..., Any], inputs: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """forward, and forward + backward of the first output, as functions without arguments."""
    leaves = [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.requires_grad]

    def first_output() -> torch.Tensor:
        output = call(**inputs)
        return output[0] if isinstance(output, tuple) else output

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return first_output()

    gradient = torch.randn_like(forward())
    return {"forward": forward, "forward+backward": lambda: torch.autograd.grad(first_output(), leaves, gradient, allow_unused=True)}


def time_operation(
    operation: Operation, shape: Shape, dtype: torch.dtype, device: str, ceilings: Ceilings, *, peers: bool, repeats: int
) -> list[Timing]:
    """Rows of ours and of every peer that can be imported and agrees; prints why a peer or the op itself has none."""
    backend = "torch" if device == "cpu" else "triton"
    label = " ".join(f"{name}={size}" for name, size in shape.items())
    agreement = check(operation, shape, dtype, device, backend)
    if not agreement.ok:
        print(f"{operation.name} {label}: no time, the check failed ({agreement.where}, {agreement.worst:.2f} of its budget)")
        return []
    rotation = [operation.inputs(dtype, device, **shape) for _ in range(3)]
    calls: dict[str, Callable[..., Any]] = {"ours": lambda **inputs: operation.call(**inputs, backend=backend)}
    candidates = (operation.cpu_peers if device == "cpu" else operation.peers) if peers else {}
    for name, call in candidates.items():
        try:
            peer = compare(operation, call, rotation[0], first_only=True)
        except ImportError as error:
            print(f"{operation.name}: {name} cannot be imported here ({error})")
            continue
        if peer.worst > 4:
            print(f"{operation.name} {label}: {name} disagrees with the fp64 reference ({peer.where}, {peer.worst:.1f} of the budget): no ratio")
            continue
        calls[name] = call
    forward, backward = operation.cost(dtype.itemsize, **shape)
    costs = {"forward": forward}
    if backward is not None:
        costs["forward+backward"] = Cost(flops=forward.flops + backward.flops, bytes=forward.bytes + backward.bytes)
    rows = []
    for direction, cost in costs.items():
        runs = {name: [passes(call, inputs)[direction] for inputs in rotation] for name, call in calls.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(repeats + 2):
            for name, functions in runs.items():
                times[name].append(elapsed_ms(functions[turn % 3], device))
        medians = {name: median(values[2:]) for name, values in times.items()}
        least = max(cost.flops / ceilings.flops, cost.bytes / ceilings.bandwidth)
        for name, ms in medians.items():
            rows.append(
                Timing(
                    op=operation.name,
                    source=name,
                    shape=label,
                    direction=direction,
                    ms=round(ms, 4),
                    tflops=round(cost.flops / ms * 1e-9, 3),
                    gbytes_per_s=round(cost.bytes / ms * 1e-6, 1),
                    roofline=round(1e3 * least / ms, 3),
                    ratio=round(ms / medians["ours"], 2),
                )
            )
    return rows


def run_bench(operations: list[Operation], *, peers: bool, repeats: int, dtype: torch.dtype | None = None) -> list[Timing]:
    """Every op at its timed shapes on the GPU, or at its CPU shape where there is none."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    used = dtype if dtype is not None else (torch.float32 if device == "cpu" else torch.bfloat16)
    ceilings = measure_ceilings(device, used)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {used}: matmul {ceilings.flops * 1e-12:.2f} TFLOP/s, copy {ceilings.bandwidth * 1e-9:.1f} GB/s")
    rows = []
    for operation in operations:
        shapes = operation.bench_shapes if device == "cuda" else (operation.cpu_shape,) if operation.cpu_shape is not None else ()
        for shape in shapes:
            for row in time_operation(operation, shape, used, device, ceilings, peers=peers, repeats=repeats):
                print(f"{row.op:34s} {row.shape:30s} {row.direction:17s} {row.source:24s} {row.ms:10.4f} ms  {row.tflops:8.3f} TFLOP/s "
                      f"{row.gbytes_per_s:8.1f} GB/s  roofline {row.roofline:5.3f}  x{row.ratio:.2f}")  # fmt: skip
                rows.append(row)
    return rows


def write_timings(path: Path, rows: list[Timing]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Timing)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)

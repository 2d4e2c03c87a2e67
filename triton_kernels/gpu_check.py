"""`python -m triton_kernels gpu-check`: on a GPU, every option of every launch table at every checked shape and dtype against fp64, then the
benchmark of the ops that passed.

The plan of its minutes: all kernels are compiled first, by as many processes as there are cores; then correctness; then the times, each op's first
shape before any op's second. Every table is written as it grows, so that a run cut short loses no verdict.
"""

import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triton_kernels.agreement import Agreement, Call, Reference, output_gradient, results, same_bits
from triton_kernels.bench import Timing, dtype_name, plot_roofline, print_ceilings, time_operation, timed_shapes
from triton_kernels.configurations import Operation, Shape, current_architecture, forced_option, operations
from triton_kernels.rows import write_rows

# Triton's interpreter computes bf16 wrongly.
DTYPES = {"cuda": (torch.bfloat16, torch.float16, torch.float32), "cpu": (torch.float16, torch.float32)}
# What part of the time has passed when compiling ahead, and when checking, must end.
COMPILED_AT, CHECKED_AT = 0.35, 0.65


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """aspect: "option n" of every launch table's line, "torch.compile", "CUDA graph" or "no synchronisation"; worst: error over its budget."""

    op: str
    shape: str
    dtype: str
    aspect: str
    ok: bool
    worst: float
    where: str


def verdicts(operation: Operation, device: str) -> Iterator[Verdict]:
    """Every dtype, checked shape and option, then what must hold of the op as a whole."""
    call = partial(operation.call, backend="triton")
    for dtype in DTYPES[device]:
        for shape in operation.check_shapes:
            inputs = operation.inputs(dtype, device, **shape)
            reference = Reference(operation, inputs)
            number, others = 0, 1
            while others > 0:
                with forced_option(number) as forced:
                    found = verdict(operation, shape, dtype, f"option {number}", partial(reference.check, call))
                yield found
                number, others = number + 1, forced.others
    aspects = {"torch.compile": compiled} | ({"CUDA graph": captured, "no synchronisation": unsynchronised} if device == "cuda" else {})
    dtype, shape = DTYPES[device][0], operation.check_shapes[-1]
    inputs = operation.inputs(dtype, device, **shape)
    for name, aspect in aspects.items():
        yield verdict(operation, shape, dtype, name, partial(aspect, operation, call, inputs))


def verdict(operation: Operation, shape: Shape, dtype: torch.dtype, aspect: str, check: Call) -> Verdict:
    """What `check` says, or why it could not say anything."""
    try:
        agreement: Agreement = check()
    except Exception as error:  # A kernel that does not even run is a verdict about it, not the end of the others'.
        agreement = Agreement(ok=False, worst=float("inf"), where=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    label = " ".join(f"{k}={v}" for k, v in shape.items())
    return Verdict(op=operation.name, shape=label, dtype=dtype_name(dtype), aspect=aspect, **asdict(agreement))


def compiled(operation: Operation, call: Call, inputs: dict[str, Any]) -> Agreement:
    """Traced whole, forward and backward, from the fake implementations; what a code generator would make of the rest is not our matter."""
    return Reference(operation, inputs).judge(results(torch.compile(call, backend="aot_eager", fullgraph=True), inputs))


def first_gradient(call: Call, inputs: dict[str, Any]) -> Tensor:
    return output_gradient(results(call, inputs)["output 0"])


def captured(operation: Operation, call: Call, inputs: dict[str, Any]) -> Agreement:
    """Replayed from a CUDA graph, forward and backward give the bits they give without one."""
    gradient = first_gradient(call, inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        eager = results(call, inputs, gradient)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        replayed = results(call, inputs, gradient)
    for x in replayed.values():
        x.zero_()
    graph.replay()
    torch.cuda.synchronize()
    differs = same_bits(eager, replayed)
    return Agreement(ok=not differs, worst=0.0, where=differs)


def unsynchronised(operation: Operation, call: Call, inputs: dict[str, Any]) -> Agreement:
    """Neither pass makes the host wait for the device."""
    gradient = first_gradient(call, inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(call, inputs, gradient)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Agreement(ok=True, worst=0.0, where="")


def compile_one(name: str, dtype: torch.dtype, architecture: int) -> None:
    """Leave every kernel that `verdicts` will launch in Triton's cache on disk."""
    from triton_kernels.inspect_options import compile_options

    for _ in compile_options(operations()[name], architecture, (dtype,)):
        pass


def compile_ahead(selected: list[Operation], seconds: float) -> None:
    """In processes of their own, without the device, for at most `seconds`; what is not ready by then is compiled when it is launched."""
    architecture = current_architecture()
    pool = ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn"))
    tasks = [pool.submit(compile_one, operation.name, dtype, architecture) for dtype in DTYPES["cuda"] for operation in selected]
    done, waiting = wait(tasks, timeout=seconds)
    failed = [error for task in done if (error := task.exception()) is not None]
    print(f"compiled ahead: {len(done)} of {len(tasks)} tasks, {len(failed)} failed {failed[:1] or ''}", flush=True)
    for process in list(pool._processes.values()) if waiting else []:
        process.kill()
    pool.shutdown(wait=not waiting, cancel_futures=True)


def run_gpu_check(selected: list[Operation], folder: Path, *, device: str = "cuda", limit_s: float = 480.0) -> bool:
    """Writes correctness.csv, benchmark.csv and roofline.svg into `folder`; True when every check passed. ValueError without a GPU, unless `device`
    is "cpu": then the kernels are interpreted (TRITON_INTERPRET=1) and the torch references timed, which takes shapes of a few tokens."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("gpu-check needs a CUDA device and none is visible; `inspect` compiles for one without")
    start = time.monotonic()
    if device == "cuda":
        compile_ahead(selected, COMPILED_AT * limit_s)
    found: list[Verdict] = []
    passed: list[Operation] = []
    for operation in selected:
        first = len(found)
        for one in verdicts(operation, device):
            found.append(one)
            print(f"{one.op}  {one.shape}  {one.dtype}  {one.aspect}  {'ok' if one.ok else 'WRONG'}  {one.worst:.3f}  {one.where}", flush=True)
            if time.monotonic() - start > CHECKED_AT * limit_s:
                found.append(Verdict(op=operation.name, shape="", dtype="", aspect="the rest", ok=False, worst=float("inf"), where="no time left"))
                break
        write_rows(folder / "correctness.csv", Verdict, found)
        if all(one.ok for one in found[first:]):
            passed.append(operation)
    dtype = DTYPES[device][0] if device == "cuda" else torch.float32
    ceilings = print_ceilings(device, dtype)
    timings: list[Timing] = ceilings.rows(dtype)
    for turn in zip_longest(*([(operation, shape) for shape in timed_shapes(operation, device)] for operation in passed)):
        for operation, shape in filter(None, turn):
            if time.monotonic() - start > limit_s:
                print(f"{operation.name} {shape}: not timed, {limit_s:.0f} seconds are over")
                continue
            try:
                timings += time_operation(operation, shape, dtype, device, ceilings, peers=True, repeats=20)
            except torch.OutOfMemoryError as error:
                print(f"{operation.name} {shape}: not timed, {error}")
            write_rows(folder / "benchmark.csv", Timing, timings)
    try:
        plot_roofline(timings, folder / "roofline.svg")
    except ImportError as error:
        print(f"no roofline.svg: {error}")
    wrong = [one for one in found if not one.ok]
    print(f"{len(found)} verdicts, {len(wrong)} wrong; {len(timings)} timings; {time.monotonic() - start:.0f} s; {folder}")
    return not wrong

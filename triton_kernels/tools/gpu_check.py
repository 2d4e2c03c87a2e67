"""`python -m triton_kernels gpu-check`: on a GPU, every option of every launch table at every checked shape and dtype
against fp64, then the benchmark of the ops that passed.

The plan of its minutes: all kernels are compiled first, by as many processes as there are cores; then correctness; then
the times, each op's first shape before any op's second. Every table is written as it grows, so that a run cut short
loses no verdict.
"""

import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from foundation.tables import write_rows
from triton_kernels.common.launch_tables import current_architecture, every_option
from triton_kernels.tools.agreement import Agreement, Call, Reference, output_gradient, results, same_bits
from triton_kernels.tools.bench import plot_roofline, run_bench
from triton_kernels.tools.operations import Operation, dtype_name, operations, shape_label

# Triton's interpreter computes bf16 wrongly.
DTYPES = {"cuda": (torch.bfloat16, torch.float16, torch.float32), "cpu": (torch.float16, torch.float32)}
# What part of the time has passed when compiling ahead, and when checking, must end.
COMPILED_AT, CHECKED_AT = 0.35, 0.65


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """aspect: "option n" of every launch table's line, "torch.compile", "CUDA graph" or "no synchronisation"; worst:
    error over its budget."""

    op: str
    shape: str = ""
    dtype: str = ""
    aspect: str
    ok: bool
    worst: float
    where: str


def verdicts(operation: Operation, device: str) -> Iterator[Verdict]:
    """Every dtype, checked shape and option, and in one of them what must hold of the op as a whole."""
    call = partial(operation.call, backend="triton")
    aspects = {"torch.compile": compiled} | (
        {"CUDA graph": captured, "no synchronisation": unsynchronised} if device == "cuda" else {}
    )
    for dtype in DTYPES[device]:
        for shape in operation.check_shapes:
            common = {"op": operation.name, "shape": shape_label(shape), "dtype": dtype_name(dtype)}
            reference = Reference(operation, operation.inputs(dtype, device, **shape))
            for number, _ in every_option():
                yield Verdict(**common, aspect=f"option {number}", **asdict(attempt(reference.check, call)))
            if dtype == DTYPES[device][0] and shape == operation.check_shapes[-1]:
                for name, aspect in aspects.items():
                    yield Verdict(**common, aspect=name, **asdict(attempt(aspect, reference, call)))


def attempt(check: Call, *arguments: Any) -> Agreement:
    """What `check` says, or why it could not say anything: a kernel that does not even run is a verdict about it, not
    the end of the others'."""
    try:
        return check(*arguments)
    except Exception as error:
        return Agreement(
            ok=False, worst=float("inf"), where=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        )


def compiled(reference: Reference, call: Call) -> Agreement:
    """Traced whole, forward and backward, from the fake implementations; what a code generator would make of the rest
    is not our matter."""
    # The compiler keeps what it made of one op as a variant of the next, and gives up after eight.
    torch.compiler.reset()
    return reference.judge(results(torch.compile(call, backend="aot_eager", fullgraph=True), reference.inputs))


def captured(reference: Reference, call: Call) -> Agreement:
    """Replayed from a CUDA graph, forward and backward give the bits they give without one."""
    run = partial(results, call, reference.inputs, output_gradient(reference.rounded["output 0"]))
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        eager = run()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        replayed = run()
    for x in replayed.values():
        x.zero_()
    graph.replay()
    torch.cuda.synchronize()
    differs = same_bits(eager, replayed)
    return Agreement(ok=not differs, worst=0.0, where=differs)


def unsynchronised(reference: Reference, call: Call) -> Agreement:
    """Neither pass makes the host wait for the device."""
    run = partial(results, call, reference.inputs, output_gradient(reference.rounded["output 0"]))
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Agreement(ok=True, worst=0.0, where="")


def compile_one(name: str, dtype: torch.dtype, architecture: int) -> None:
    """Leave every kernel that `verdicts` will launch in Triton's cache on disk."""
    from triton_kernels.tools.inspect_table import compile_options

    for _ in compile_options(operations()[name], architecture, (dtype,)):
        pass


def compile_ahead(selected: list[Operation], seconds: float) -> None:
    """In processes of their own, without the device, for at most `seconds`; what is not ready by then is compiled when
    it is launched."""
    pool = ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn"))
    architecture = current_architecture()
    tasks = [
        pool.submit(compile_one, operation.name, dtype, architecture)
        for dtype in DTYPES["cuda"]
        for operation in selected
    ]
    done, waiting = wait(tasks, timeout=seconds)
    failed = [error for task in done if (error := task.exception()) is not None]
    print(f"compiled ahead: {len(done)} of {len(tasks)} tasks, {len(failed)} failed {failed[:1] or ''}", flush=True)
    for process in list(pool._processes.values()) if waiting else []:
        process.kill()
    pool.shutdown(wait=not waiting, cancel_futures=True)


def run_gpu_check(selected: list[Operation], folder: Path, *, device: str = "cuda", limit_s: float = 480.0) -> bool:
    """Writes correctness.csv, benchmark.csv and roofline.svg into `folder`; True when every check passed. ValueError
    without a GPU, unless `device` is "cpu": then the kernels are interpreted (TRITON_INTERPRET=1) and the torch
    references timed, which takes shapes of a few tokens."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("gpu-check needs a CUDA device and none is visible; `inspect` compiles for one without")
    start = time.monotonic()
    if device == "cuda":
        compile_ahead(selected, COMPILED_AT * limit_s)
    found: list[Verdict] = []
    for operation in selected:
        for one in verdicts(operation, device):
            found.append(one)
            print(
                f"{one.op}  {one.shape}  {one.dtype}  {one.aspect}  {'ok' if one.ok else 'WRONG'}  {one.worst:.3f} "
                f" {one.where}",
                flush=True,
            )
            if time.monotonic() - start > CHECKED_AT * limit_s:
                found.append(
                    Verdict(op=operation.name, aspect="the rest", ok=False, worst=float("inf"), where="no time left")
                )
                break
        write_rows(folder / "correctness.csv", Verdict, found)
    wrong = [one for one in found if not one.ok]
    passed = [operation for operation in selected if operation.name not in {one.op for one in wrong}]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    timings = run_bench(
        passed, device, (dtype,), peers=True, repeats=20, csv=folder / "benchmark.csv", until=start + limit_s
    )
    try:
        plot_roofline(timings, folder / "roofline.svg")
    except ImportError as error:
        print(f"no roofline.svg: {error}")
    print(
        f"{len(found)} verdicts, {len(wrong)} wrong; {len(timings)} timings; {time.monotonic() - start:.0f} s; {folder}"
    )
    return not wrong

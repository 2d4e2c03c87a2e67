"""`python -m triton_kernels gpu-check`: on a GPU, every op at every checked shape and dtype against its fp64 reference, then the benchmark of those
that passed. Correctness comes first and is written first, so that a benchmark cut short loses no verdict.
"""

import csv
import time
from pathlib import Path

import torch

from triton_kernels.agreement import check
from triton_kernels.bench import Timing, run_bench, write_timings
from triton_kernels.configurations import Operation

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def run_gpu_check(operations: list[Operation], folder: Path, *, limit_s: float = 480.0) -> bool:
    """Writes correctness.csv and benchmark.csv into `folder`; True when every check passed. ValueError without a GPU."""
    if not torch.cuda.is_available():
        raise ValueError("gpu-check needs a CUDA device and none is visible; `inspect` compiles for one without")
    start = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    passed: list[Operation] = []
    with (folder / "correctness.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("op", "shape", "dtype", "ok", "worst_over_budget", "where"))
        for operation in operations:
            good = True
            for shape in operation.check_shapes:
                for dtype in DTYPES:
                    agreement = check(operation, shape, dtype, "cuda", "triton")
                    good &= agreement.ok
                    line = (
                        operation.name,
                        " ".join(f"{k}={v}" for k, v in shape.items()),
                        str(dtype),
                        agreement.ok,
                        f"{agreement.worst:.3f}",
                        agreement.where,
                    )
                    writer.writerow(line)
                    print("  ".join(map(str, line)), flush=True)
            file.flush()
            if good:
                passed.append(operation)
    timings: list[Timing] = []
    for operation in passed:
        if time.monotonic() - start > limit_s:
            print(f"{operation.name}: not timed, {limit_s:.0f} seconds are over")
            continue
        timings += run_bench([operation], peers=True, repeats=20)
        write_timings(folder / "benchmark.csv", timings)
    return len(passed) == len(operations)

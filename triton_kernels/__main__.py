"""`python -m triton_kernels inspect | bench | gpu-check`: see each command's --help."""

import argparse
import sys
from pathlib import Path

from triton_kernels.configurations import select_operations

RECORDED = Path("notes/kernels/inspect.csv")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m triton_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="compile every op for GPUs that are not there: registers, spills, instructions, launches, bytes")
    inspect.add_argument("--arch", type=int, nargs="+", choices=(80, 90, 100), default=[90], help="compute capabilities (default: 90)")
    inspect.add_argument("--op", nargs="+", help="ops or op/variant (default: all)")
    inspect.add_argument("--peer", nargs="+", default=[], help="also inspect these libraries' versions of the op (fla)")
    inspect.add_argument("--csv", type=Path, help=f"write the rows into this file, e.g. {RECORDED}")
    inspect.add_argument("--gate", action="store_true", help=f"fail on spills, no tensor cores, or more launches or bytes than in {RECORDED}")
    bench = commands.add_parser("bench", help="time every op: Triton kernels on a GPU, torch references on a CPU")
    bench.add_argument("--op", nargs="+", help="ops or op/variant (default: all)")
    bench.add_argument("--peers", action="store_true", help="also time the other libraries that can be imported, in turns with ours")
    bench.add_argument("--repeats", type=int, default=20, help="timed turns; the median counts (default: 20)")
    bench.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU, float32 on a CPU")
    bench.add_argument("--csv", type=Path, help="write the rows into this file")
    gpu_check = commands.add_parser("gpu-check", help="correctness of every op on this GPU, then the benchmark, into one folder")
    gpu_check.add_argument("--op", nargs="+", help="ops or op/variant (default: all)")
    gpu_check.add_argument("--folder", type=Path, default=Path("runs/gpu-check"), help="where the two csv files go (default: runs/gpu-check)")
    options = parser.parse_args(arguments)
    try:
        return {"inspect": run_inspect, "bench": run_benchmark, "gpu-check": run_check}[options.command](options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


def run_benchmark(options: argparse.Namespace) -> int:
    import torch

    from triton_kernels.bench import run_bench, write_timings

    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    rows = run_bench(select_operations(options.op), peers=options.peers, repeats=options.repeats, dtype=dtype)
    if options.csv is not None:
        write_timings(options.csv, rows)
    return 0


def run_check(options: argparse.Namespace) -> int:
    from triton_kernels.gpu_check import run_gpu_check

    return 0 if run_gpu_check(select_operations(options.op), options.folder) else 1


def run_inspect(options: argparse.Namespace) -> int:
    from triton_kernels.inspect_table import format_table, gate, inspect_operation, read_csv, write_csv

    selected = select_operations(options.op)
    rows = []
    for operation in selected:
        for architecture in options.arch:
            rows += inspect_operation(operation, architecture)
            for peer in options.peer:
                if peer not in operation.peers:
                    print(f"{operation.name}: no counterpart in {peer} is registered", file=sys.stderr)
                    continue
                try:
                    rows += inspect_operation(operation, architecture, peer)
                except ImportError as error:
                    print(f"{operation.name}: {peer} cannot be imported here ({error}), so it has no rows", file=sys.stderr)
    print(format_table(rows))
    if options.csv is not None:
        write_csv(options.csv, rows)
    if not options.gate:
        return 0
    problems = gate(rows, read_csv(RECORDED), {operation.name: operation for operation in selected})
    print("\n".join(problems) if problems else f"gate: {len(rows)} rows, nothing wrong")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

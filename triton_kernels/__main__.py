"""`python -m triton_kernels inspect | bench | gpu-check`: see each command's --help."""

import foundation.starting  # noqa: F401

# isort: split

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from foundation.command import refuse_unwritable, run_command
from foundation.numbers import argument
from foundation.tables import read_rows
from triton_kernels.tools.operations import Operation, select_operations

RECORDED, SPILLS = Path("notes/kernels/inspect.csv"), Path("notes/kernels/spills.csv")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m triton_kernels", description=__doc__)
    commands = parser.add_subparsers(required=True)

    inspect = commands.add_parser(
        "inspect", help="compile every op for GPUs that are not there: registers, spills, instructions, launches, bytes"
    )
    inspect.add_argument(
        "--arch", type=int, nargs="+", choices=(80, 90, 100), default=[90], help="compute capabilities (default: 90)"
    )
    inspect.add_argument("--peer", nargs="+", default=[], help="also inspect these libraries' versions of the op (fla)")
    inspect.add_argument("--csv", type=Path, help=f"write the rows into this file, e.g. {RECORDED}")
    inspect.add_argument(
        "--gate",
        action="store_true",
        help=f"fail on spills, no tensor cores, or more launches or bytes than in {RECORDED}",
    )
    inspect.add_argument(
        "--all-options",
        action="store_true",
        help=f"also compile every option of every launch table; --gate knows {SPILLS.name}",
    )

    bench = commands.add_parser("bench", help="time every op: Triton kernels on a GPU, torch references on a CPU")
    bench.add_argument(
        "--peers", action="store_true", help="also time the other libraries that can be imported, in turns with ours"
    )
    bench.add_argument(
        "--repeats", type=argument(int, 1), default=20, help="timed turns; the median counts (default: 20)"
    )
    dtypes = ("float32", "bfloat16", "float16")
    bench.add_argument(
        "--dtype", nargs="+", choices=dtypes, default=[], help="default: bfloat16; on a CPU float32 as well"
    )
    bench.add_argument("--csv", type=Path, help="write the rows into this file, after each op and shape")
    bench.add_argument("--plot", type=Path, help="draw the roofline into this file (svg, png, pdf); needs matplotlib")

    gpu_check = commands.add_parser(
        "gpu-check", help="correctness of every op on this GPU, then the benchmark, into one folder"
    )
    folder = Path(os.environ.get("OUT", "runs/gpu-check"))
    gpu_check.add_argument(
        "--folder", type=Path, default=folder, help="where the tables go (default: $OUT, or runs/gpu-check)"
    )
    gpu_check.add_argument(
        "--minutes", type=argument(float, 0), default=8.0, help="nothing new is begun after so many (default: 8)"
    )

    for command, run in ((inspect, run_inspect), (bench, run_benchmark), (gpu_check, run_check)):
        command.add_argument("--op", nargs="+", help="ops or op/variant (default: all)")
        command.set_defaults(run=run)
    return parser.parse_args(arguments)


def run_selected(options: argparse.Namespace) -> None:
    """Runs a command; a table that is not as it must be is exit code 1."""
    selected = select_operations(options.op)
    for option in ("csv", "plot"):
        refuse_unwritable(f"--{option}", getattr(options, option, None))
    refuse_unwritable("--folder", getattr(options, "folder", None), folder=True)
    if status := options.run(selected, options):
        sys.exit(status)


def main(arguments: Sequence[str] | None = None) -> None:
    run_command(parse, run_selected, arguments)


def run_benchmark(selected: list[Operation], options: argparse.Namespace) -> int:
    import torch

    from triton_kernels.tools.bench import plot_roofline, run_bench

    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = options.dtype or (["bfloat16"] if device == "cuda" else ["float32", "bfloat16"])
    dtypes = [getattr(torch, name) for name in names]
    rows = run_bench(selected, device, dtypes, peers=options.peers, repeats=options.repeats, csv=options.csv)
    if options.plot is not None:
        plot_roofline(rows, options.plot)
    return 0


def run_check(selected: list[Operation], options: argparse.Namespace) -> int:
    from triton_kernels.tools.gpu_check import run_gpu_check

    return 0 if run_gpu_check(selected, options.folder, limit_s=60 * options.minutes) else 1


def run_inspect(selected: list[Operation], options: argparse.Namespace) -> int:
    from triton_kernels.tools.inspect_table import (
        Row,
        Spill,
        find_spills,
        format_table,
        gate,
        inspect_operation,
        new_spills,
        record,
    )

    # Read before anything is written: --csv may name the very table that --gate compares with.
    recorded, known_spills = read_rows(RECORDED, Row), read_rows(SPILLS, Spill)
    rows: list[Row] = []
    for operation in selected:
        for architecture in options.arch:
            rows += inspect_operation(operation, architecture)
            for peer in options.peer:
                try:
                    rows += inspect_operation(operation, architecture, peer)
                # Whatever stops another library, or its not being registered, must not stop this table.
                except Exception as error:
                    print(f"{operation.name}: no rows for {peer}, {type(error).__name__}: {error}", file=sys.stderr)
    spills = (
        [spill for architecture in options.arch for spill in find_spills(selected, architecture)]
        if options.all_options
        else []
    )
    problems: list[str] = []
    if options.gate:
        problems = gate(rows, recorded, {operation.name: operation for operation in selected})
        problems += new_spills(spills, known_spills)
    # What the gate refuses must not become the record that the next gate compares with.
    if options.csv is not None and not (problems and options.csv.resolve() == RECORDED.resolve()):
        record(options.csv, Row, rows, {row.subject for row in rows})
        if options.all_options:
            record(options.csv.with_name(SPILLS.name), Spill, spills, {row.subject for row in rows})
    # Behind the tables: whatever happens to what is printed, they are there.
    print(format_table(rows))
    if options.gate:
        print("\n".join(problems) if problems else f"gate: {len(rows)} rows, nothing wrong")
    return 1 if problems else 0


if __name__ == "__main__":
    main()

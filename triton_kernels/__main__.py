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
    options = parser.parse_args(arguments)
    try:
        return run_inspect(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


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

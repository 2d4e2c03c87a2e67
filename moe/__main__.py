"""`python -m moe bench`: how far the expert layer is from dense products of the same FLOPs on this machine, and what
fewer experts save."""

import foundation.starting  # noqa: F401

# isort: split

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from foundation.command import refuse_unwritable, run_command
from foundation.numbers import argument
from moe.backends import choose_backend
from moe.bench import Shape
from moe.bench_table import HEADER, LIBRARIES, environment, line, table, write_csv
from moe.freed_memory import keep_freed_memory
from triton_kernels.native.library import native

# What `--help` says of the sizes of `Shape`.
SIZES = {
    "tokens": "in a batch",
    "d_model": "their width",
    "n_experts": "routed experts",
    "d_expert": "hidden width of an expert",
    "k": "experts per token",
}
WAYS = ("native", "cpu", "reference", *LIBRARIES, "indexed loop")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m moe", description=__doc__)
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "bench",
        help="time forward + backward of the expert layer",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    defaults = Shape()
    for name, sentence in SIZES.items():
        default = getattr(defaults, name)
        command.add_argument(f"--{name.replace('_', '-')}", type=argument(int, 1), default=default, help=sentence)
    command.add_argument(
        "--dtype",
        nargs="+",
        default=["float32", "bfloat16"],
        choices=["float32", "bfloat16"],
        help="of the activations; one table each",
    )
    command.add_argument(
        "--weight-dtype",
        default="float32",
        choices=["float32", "bfloat16"],
        help="of the stored weights under bf16 activations",
    )
    command.add_argument(
        "--load",
        nargs="+",
        type=argument(float, 1),
        default=[1.0, 4.5],
        help="rows of the busiest expert over the mean",
    )
    command.add_argument(
        "--threads", type=argument(int, 1), default=None, help="CPU threads; torch's choice by default"
    )
    command.add_argument("--repeats", type=argument(int, 1), default=3, help="timed turns, whose median counts")
    command.add_argument(
        "--ways", nargs="+", default=None, choices=WAYS, help="code to compute the experts by; all that can run"
    )
    command.add_argument(
        "--csv", type=Path, default=None, help="also write the table, with what it depends on, to this file"
    )
    command.add_argument(
        "--return-memory",
        action="store_true",
        help="let the C library return freed memory after each step, its default",
    )
    return parser.parse_args(arguments)


def bench(options: argparse.Namespace) -> None:
    """Times every way and prints its row; the csv is written as it grows."""
    refuse_unwritable("--csv", options.csv)
    if options.threads:
        torch.set_num_threads(options.threads)
    kept = not options.return_memory and keep_freed_memory()
    shape = Shape(
        tokens=options.tokens,
        d_model=options.d_model,
        n_experts=options.n_experts,
        d_expert=options.d_expert,
        k=options.k,
    )
    print(
        "backend chosen by auto: {} ({})".format(
            *choose_backend(torch.empty(0), torch.empty(1, shape.d_expert, shape.d_model))
        )
    )
    ways = options.ways or [way for way in WAYS if way != "native" or native().library is not None]
    columns = environment(kept, options.weight_dtype, options.repeats)
    print(
        f"{shape}, forward + backward, medians of {options.repeats}; "
        + ", ".join(f"{name} {value}" for name, value in columns.items())
    )
    print(HEADER)
    rows = []
    for row in table(
        shape,
        dtypes=options.dtype,
        weight_dtype=options.weight_dtype,
        loads=options.load,
        ways=ways,
        repeats=options.repeats,
    ):
        rows.append(row)
        if options.csv:
            write_csv(options.csv, rows, columns)
        print(line(row), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    run_command(parse, bench, arguments)


if __name__ == "__main__":
    main()

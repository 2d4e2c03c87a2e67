"""Every option of every launch table, compiled: `inspect` shows the ones that its shapes choose, this finds the spills of all the others too."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch

from triton_kernels.configurations import Operation, Option, forced_option
from triton_kernels.inspect_binary import report_binary
from triton_kernels.inspect_recorder import Launch
from triton_kernels.inspect_table import record_passes
from triton_kernels.rows import read_rows, write_rows


@dataclass(frozen=True, kw_only=True)
class Spill:
    """A kernel that does not fit into its registers: bytes of stack per thread, local loads and stores in its code."""

    op: str
    arch: int
    dtype: str
    shape: str
    option: int
    kernel: str
    stack: int
    local: int


def compile_options(
    operation: Operation, architecture: int, dtypes: Sequence[torch.dtype], seen: set[Option] | None = None, *, compiles: bool = True
) -> Iterator[tuple[dict[str, str | int], Launch]]:
    """Compile the op at its checked shapes with every option of its launch tables; yields the launches and what they are of. With `seen`, only where
    an option is used that it does not hold yet, and those are added to it; without `compiles`, that is all that is done."""
    call = partial(operation.call, backend="triton")
    for dtype in dtypes:
        for shape in operation.check_shapes:
            inputs = operation.inputs(dtype, "cpu", **shape)
            backward = operation.cost(dtype.itemsize, **shape)[1] is not None
            label = " ".join(f"{name}={size}" for name, size in shape.items())
            number, others = 0, 1
            while others > 0:
                with forced_option(number) as forced:
                    record_passes(call, inputs, architecture, backward=backward, compiles=False)
                    wanted = compiles and (seen is None or forced.used - seen)
                    passes = record_passes(call, inputs, architecture, backward=backward) if wanted else {}
                where = {"op": operation.name, "arch": architecture, "dtype": str(dtype).removeprefix("torch."), "shape": label, "option": number}
                for launch in chain(*passes.values()):
                    if launch.binary is not None:
                        yield where | {"kernel": launch.name}, launch
                if seen is not None:
                    seen |= forced.used
                number, others = number + 1, forced.others


def find_spills(operations: list[Operation], architecture: int) -> list[Spill]:
    """Those of all options of the tables that the checked shapes of `operations` reach, each compiled once in bf16 and, where fp32 has its own, in
    fp32."""
    seen: set[Option] = set()
    found: dict[str, Spill] = {}
    for operation in operations:
        for where, launch in compile_options(operation, architecture, (torch.bfloat16, torch.float32), seen):
            report = report_binary(launch.binary)
            if report["stack"] or report["spills"]:
                found.setdefault(launch.binary.hash, Spill(**where, stack=report["stack"], local=report["spills"]))  # pyright: ignore[reportArgumentType]
    print(f"sm_{architecture}: {len(seen)} options of launch tables compiled, {len(found)} kernels spill")
    return list(found.values())


def new_spills(found: list[Spill], recorded: list[Spill]) -> list[str]:
    """Spills that are not on record, or are worse than recorded."""
    known: dict[tuple, int] = {}
    for spill in recorded:
        key = (spill.op, spill.arch, spill.dtype, spill.kernel)
        known[key] = max(known.get(key, 0), spill.stack)
    return [f"spills, not on record: {spill}" for spill in found if spill.stack > known.get((spill.op, spill.arch, spill.dtype, spill.kernel), 0)]


def record_spills(path: Path, found: list[Spill], operations: list[Operation], architectures: list[int]) -> None:
    """What is on record of other ops and architectures is kept."""
    names = {operation.name for operation in operations}
    kept = [spill for spill in read_spills(path) if spill.op not in names or spill.arch not in architectures]
    write_rows(path, Spill, sorted([*kept, *found], key=lambda spill: (spill.op, spill.arch)))


def read_spills(path: Path) -> list[Spill]:
    return read_rows(path, Spill) if path.exists() else []

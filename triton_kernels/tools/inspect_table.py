"""`python -m triton_kernels inspect`: every op compiled for a GPU that is not there, as a table; every option of its
launch tables, for spills; and the gate that CI holds both to.

A row is one launch, or ("total") one pass of an op: its launches, its torch operators, its bytes, and their ratio to
the floor of `Operation.cost`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import torch

from foundation.files import fingerprint
from foundation.source import code_of
from foundation.tables import read_rows, write_rows
from triton_kernels.common.launch_tables import Option, every_option
from triton_kernels.tools.inspect_recorder import Launch, record_passes, report_binary
from triton_kernels.tools.operations import CATALOGUES, Operation, catalogue_module, dtype_name, shape_label

TOTAL = "total"
# The tensor-core instruction of an architecture and its column.
TENSOR_CORES = {80: "hmma", 90: "hgmma", 100: "utcmma"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table. In a total, launches and operators are counts, and the binary's columns are empty.

    Attributes:
        code: of our operations, what `kernel_code` says of the code that the row was made from.
    """

    op: str
    source: str
    arch: int
    direction: str
    kernel: str
    launches: int = 1
    operators: int = 0
    programs: int = 0
    warps: int = 0
    registers: int = 0
    stack: int = 0
    shared: int = 0
    blocks: int = 0
    hgmma: int = 0
    hmma: int = 0
    utcmma: int = 0
    ldgsts: int = 0
    utmaldg: int = 0
    ldg128: int = 0
    mufu: int = 0
    spills: int = 0
    bytes: int = 0
    floor_ratio: float = 0.0
    code: str = ""

    @property
    def subject(self) -> tuple[str, str, int]:
        """What is inspected, and recorded, as a whole."""
        return self.op, self.source, self.arch


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

    @property
    def subject(self) -> tuple[str, str, int]:
        return self.op, "ours", self.arch


def inspect_operation(operation: Operation, architecture: int, source: str = "ours") -> list[Row]:
    """Rows of forward and backward of one op at its inspected shape in bf16; `source` names a peer of the operation to
    inspect instead of ours."""
    if source != "ours" and source not in operation.peers:
        raise ValueError(f"no counterpart of {operation.name} in {source} is registered")
    call = partial(operation.call, backend="triton") if source == "ours" else operation.peers[source]
    inputs = operation.inputs(torch.bfloat16, "cpu", **operation.inspect_shape)
    passes = record_passes(call, inputs, architecture, may_wait=source != "ours")
    rows: list[Row] = []
    for (direction, launches), floor in zip(passes.items(), operation.cost(2, **operation.inspect_shape)):
        assert floor is not None, f"{operation.name} has a backward that its cost does not know"
        code = kernel_code(operation.name) if source == "ours" else ""
        row: Any = partial(Row, op=operation.name, source=source, arch=architecture, direction=direction, code=code)
        kernels = [launch for launch in launches if launch.binary is not None]
        for launch in kernels:
            traffic = {"bytes": launch.n_bytes, "floor_ratio": round(launch.n_bytes / floor.bytes, 3)}
            rows.append(row(kernel=launch.name, programs=prod(launch.grid), **report_binary(launch.binary), **traffic))
        n_bytes = sum(launch.n_bytes for launch in launches)
        traffic = {"bytes": n_bytes, "floor_ratio": round(n_bytes / floor.bytes, 3)}
        rows.append(row(kernel=TOTAL, launches=len(kernels), operators=len(launches) - len(kernels), **traffic))
    return rows


@cache
def kernel_code(name: str) -> str:
    """A fingerprint of everything that decides what an operation compiles to, but for Triton itself: kernels,
    launchers and launch tables, and the shapes it is inspected at."""
    (catalogue,) = (
        module for module in map(catalogue_module, CATALOGUES) if name in {o.name for o in module.OPERATIONS}
    )
    compiled = {
        file: code
        for file, code in code_of((catalogue.__name__,)).items()
        if file.startswith("triton_kernels/common/")
        or file.endswith(("_kernels.py", "_launch.py", "launch_tables.py", "tiles.py"))
        or "/catalogue/" in file
    }
    return fingerprint(compiled)[:12]


def compile_options(
    operation: Operation,
    architecture: int,
    dtypes: Sequence[torch.dtype],
    seen: set[tuple[torch.dtype, Option]] | None = None,
) -> Iterator[tuple[dict[str, Any], Launch]]:
    """Compile the op at its checked shapes with every option of its launch tables; yields the launches and what they
    are of. With `seen`, only where an option is used that it does not hold yet for the dtype, or none at all; those are
    added to it."""
    call = partial(operation.call, backend="triton")
    for dtype in dtypes:
        for shape in operation.check_shapes:
            inputs = operation.inputs(dtype, "cpu", **shape)
            for number, used in every_option():
                record_passes(call, inputs, architecture, compiles=False)
                options = {(dtype, option) for option in used}
                if seen is not None and options and options <= seen:
                    continue
                passes = record_passes(call, inputs, architecture)
                where = {
                    "op": operation.name,
                    "arch": architecture,
                    "dtype": dtype_name(dtype),
                    "shape": shape_label(shape),
                    "option": number,
                }
                yield from ((where, launch) for launch in chain(*passes.values()) if launch.binary is not None)
                if seen is not None:
                    seen |= options


def find_spills(operations: list[Operation], architecture: int) -> list[Spill]:
    """Those of all options of the tables that the checked shapes of `operations` reach, each compiled in bf16 and in
    fp32; kernels without a table are compiled at every checked shape."""
    seen: set[tuple[torch.dtype, Option]] = set()
    found: dict[str, Spill] = {}
    for operation in operations:
        for where, launch in compile_options(operation, architecture, (torch.bfloat16, torch.float32), seen):
            report = report_binary(launch.binary)
            if report["stack"] or report["spills"]:
                found.setdefault(
                    launch.binary.hash,
                    Spill(**where, kernel=launch.name, stack=report["stack"], local=report["spills"]),
                )
    print(
        f"sm_{architecture}: {len(seen)} options of launch tables compiled, each dtype counted, {len(found)} kernels"
        " spill"
    )
    return list(found.values())


def record(path: Path, kind: type, rows: Sequence[Any], inspected: set[tuple[str, str, int]]) -> None:
    """Put `rows` (of class `kind`) in place of all rows of the inspected subjects; sorted, so that a diff shows what
    changed."""
    kept = [row for row in read_rows(path, kind) if row.subject not in inspected]
    write_rows(path, kind, sorted([*kept, *rows], key=lambda row: row.subject))


def format_table(rows: list[Row]) -> str:
    """Text columns, blank where a total has nothing to say."""
    names = [f.name for f in fields(Row) if f.name != "code"]
    lines = [names]
    for row in rows:
        lines.append(
            [
                "" if row.kernel == TOTAL and value == 0 and name != "operators" else str(value)
                for name, value in asdict(row).items()
                if name in names
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(cell.ljust(n) if i < 5 else cell.rjust(n) for i, (cell, n) in enumerate(zip(line, widths)))
        for line in lines
    )


def gate(rows: list[Row], recorded: list[Row], operations: Mapping[str, Operation]) -> list[str]:
    """What is wrong with our rows: spills, products without the architecture's tensor cores, more launches, operators
    or bytes than recorded."""
    totals = {(*row.subject, row.direction): row for row in recorded if row.kernel == TOTAL}
    problems = []
    for row in rows:
        wrong: list[str] = []
        if row.source != "ours":
            continue
        if row.kernel != TOTAL:
            if row.stack or row.spills:
                wrong.append(f"spills ({row.stack} bytes of stack, {row.spills} local loads and stores)")
            instruction = TENSOR_CORES[row.arch]
            if getattr(row, instruction) == 0 and row.kernel not in operations[row.op].without_products:
                wrong.append(f"no {instruction.upper()}, the product runs elsewhere")
        elif (known := totals.get((*row.subject, row.direction))) is None:
            wrong.append("not recorded yet; run inspect with --csv")
        else:
            counts = ((name, getattr(row, name), getattr(known, name)) for name in ("launches", "operators", "bytes"))
            wrong += [f"{name} {count}, recorded {before}" for name, count, before in counts if count > before]
        problems += [f"{row.op} {row.direction} sm_{row.arch} {row.kernel}: {problem}" for problem in wrong]
    return problems


def new_spills(found: list[Spill], recorded: list[Spill]) -> list[str]:
    """Spills that are not on record, or are worse than recorded."""

    def worst_known(spill: Spill) -> int:
        same = (
            known
            for known in recorded
            if (known.op, known.arch, known.dtype, known.kernel) == (spill.op, spill.arch, spill.dtype, spill.kernel)
        )
        return max((known.stack for known in same), default=0)

    return [f"spills, not on record: {spill}" for spill in found if spill.stack > worst_known(spill)]

"""`python -m triton_kernels inspect`: every op compiled for a GPU that is not there, as a table; and the gate that CI holds it to.

A row is one launch, or ("total") one pass of an op: its launches, its torch operators, its bytes, and their ratio to the floor of `Operation.cost`.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from triton_kernels.configurations import Operation
from triton_kernels.inspect_binary import report_binary
from triton_kernels.inspect_recorder import Launch, recording
from triton_kernels.rows import read_rows, write_rows

TOTAL = "total"
# The tensor-core instruction of an architecture and its column.
TENSOR_CORES = {80: "hmma", 90: "hgmma", 100: "utcmma"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table. In a total, launches and operators are counts, and the binary's columns hold the worst of its launches."""

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

    @property
    def key(self) -> tuple[str, str, int, str, str]:
        return self.op, self.source, self.arch, self.direction, self.kernel


def inspect_operation(operation: Operation, architecture: int, source: str = "ours") -> list[Row]:
    """Rows of forward and backward of one op at its inspected shape in bf16; `source` names a peer of the operation to inspect instead of ours."""
    call = partial(operation.call, backend="triton") if source == "ours" else operation.peers[source]
    inputs = operation.inputs(torch.bfloat16, "cpu", **operation.inspect_shape)
    forward, backward = operation.cost(2, **operation.inspect_shape)
    passes = record_passes(call, inputs, architecture, backward=backward is not None)
    rows: list[Row] = []
    for direction, launches in passes.items():
        floor = forward if direction == "forward" or backward is None else backward
        common: dict[str, Any] = {"op": operation.name, "source": source, "arch": architecture, "direction": direction}
        kernels = [launch for launch in launches if launch.binary is not None]
        for launch in kernels:
            ratio = round(launch.n_bytes / floor.bytes, 3)
            report: dict[str, Any] = report_binary(launch.binary)
            rows.append(Row(**common, **report, kernel=launch.name, programs=prod(launch.grid), bytes=launch.n_bytes, floor_ratio=ratio))
        n_bytes, n_operators = sum(launch.n_bytes for launch in launches), len(launches) - len(kernels)
        ratio = round(n_bytes / floor.bytes, 3)
        rows.append(Row(**common, kernel=TOTAL, launches=len(kernels), operators=n_operators, bytes=n_bytes, floor_ratio=ratio))
    return rows


def record_passes(
    call: Callable[..., Any], inputs: dict[str, Any], architecture: int, *, backward: bool, compiles: bool = True
) -> dict[str, list[Launch]]:
    """Launches of the forward, and of the backward of the first output."""
    with recording(architecture, compiles=compiles) as launches:
        result = call(**inputs)
        first = result[0] if isinstance(result, tuple) else result
        passes = {"forward": list(launches)}
        launches.clear()
        if backward:
            leaves = [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.requires_grad]
            torch.autograd.grad(first, leaves, torch.empty_like(first), allow_unused=True)
            passes["backward"] = list(launches)
    return passes


def format_table(rows: list[Row]) -> str:
    """Text columns, blank where a total has nothing to say."""
    names = [f.name for f in fields(Row)]
    lines = [names]
    for row in rows:
        values = asdict(row)
        lines.append(["" if row.kernel == TOTAL and values[name] == 0 and name != "operators" else str(values[name]) for name in names])
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    return "\n".join(
        "  ".join(cell.ljust(width) if i < 5 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))) for line in lines
    )


def write_csv(path: Path, rows: list[Row]) -> None:
    """Rows of other ops and architectures already in the file are kept, those inspected now replaced; sorted, so that a diff shows what changed."""
    inspected = {(row.op, row.source, row.arch) for row in rows}
    kept = [row for row in read_csv(path) if (row.op, row.source, row.arch) not in inspected] if path.exists() else []
    write_rows(path, Row, sorted([*kept, *rows], key=lambda row: (row.op, row.source, row.arch, row.direction != "forward")))


def read_csv(path: Path) -> list[Row]:
    return read_rows(path, Row)


def gate(rows: list[Row], recorded: list[Row], operations: dict[str, Operation]) -> list[str]:
    """What is wrong with our rows: spills, products without the architecture's tensor cores, more launches, operators or bytes than recorded."""
    totals = {row.key: row for row in recorded if row.kernel == TOTAL}
    problems = []
    for row in rows:
        where = f"{row.op} {row.direction} sm_{row.arch} {row.kernel}"
        if row.source != "ours":
            continue
        if row.kernel == TOTAL:
            known = totals.get(row.key)
            if known is None:
                problems.append(f"{where}: not recorded yet; run inspect with --csv")
                continue
            for name in ("launches", "operators", "bytes"):
                if getattr(row, name) > getattr(known, name):
                    problems.append(f"{where}: {name} {getattr(row, name)}, recorded {getattr(known, name)}")
            continue
        if row.stack or row.spills:
            problems.append(f"{where}: spills ({row.stack} bytes of stack, {row.spills} local loads and stores)")
        instruction = TENSOR_CORES[row.arch]
        if getattr(row, instruction) == 0 and row.kernel not in operations[row.op].without_products:
            problems.append(f"{where}: no {instruction.upper()}, the product runs elsewhere")
    return problems

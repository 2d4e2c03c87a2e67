"""What every tool of this folder (inspect, bench, gpu-check) knows about the ops, as data; and how they write tables.

A file `triton_kernels/<op>_configurations.py` registers its op by exposing OPERATIONS: tuple[Operation, ...], one entry
per variant worth a row; `operations()` finds the files by their names. Its `launch_table`s hold the options of its
kernels. It must not import a module that holds `@triton.jit` functions, so that the tools can be listed where Triton is
not installed.

Letters: B batch, T tokens, H heads, K key width, V value width.
"""

import csv
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from triton_kernels.checks import axes_of

Shape = Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The least work of one pass: every input read once, every output written once, no recomputation."""

    flops: float
    bytes: float


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One op (or one variant of it) as the tools call it.

    name: "op" or "op/variant"; `--op op` selects both. call(**inputs, backend=...) runs it, inputs(dtype, device,
    **shape) draws its keyword arguments, with requires_grad set on every tensor that has a gradient. cost(element_size,
    **shape) is (forward, backward); backward None where the op has none. The gradient flows in through the first output
    only, as in training.
    """

    name: str
    call: Callable[..., Any]
    inputs: Callable[..., dict[str, Any]]
    cost: Callable[..., tuple[Cost, Cost | None]]
    # The shape of the offline table, the odd ones that gpu-check compares (together they reach every line of the op's
    # launch tables), and the ones that are timed on a GPU and on a CPU.
    inspect_shape: Shape
    check_shapes: tuple[Shape, ...]
    bench_shapes: tuple[Shape, ...] = ()
    cpu_shapes: tuple[Shape, ...] = ()
    # name -> a function of the same inputs that returns the same first output through another library (`peers.py`).
    peers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    cpu_peers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    # Names of kernels in which no product is the work: they need no tensor cores.
    without_products: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """One option of a launch table: block sizes of the kernel (constexpr names -> values), warps and pipeline
    stages."""

    blocks: Mapping[str, int]
    num_warps: int
    num_stages: int


@dataclass(frozen=True, kw_only=True, eq=False)
class LaunchTable:
    """(architecture, width) -> at most four options, best guess first. No sequence length appears in a key, and nothing
    is tuned at run time.

    A lookup takes the newest listed architecture that is not newer than the device, and the smallest listed width that
    holds the op's.
    """

    lines: Mapping[tuple[int, int], tuple[LaunchOptions, ...]]

    def __post_init__(self) -> None:
        assert all(1 <= len(options) <= 4 for options in self.lines.values()), (
            "a line of a launch table has one to four options"
        )

    def line(self, width: int, architecture: int) -> tuple[int, int]:
        """The key of the line that serves head widths up to `width`; ValueError when none does."""
        chosen = max((a for a, _ in self.lines if a <= architecture), default=min(a for a, _ in self.lines))
        widths = [listed for a, listed in self.lines if a == chosen]
        if width > max(widths):
            raise ValueError(f"head width {width} is wider than the kernels' widest, {max(widths)}")
        return chosen, min(listed for listed in widths if listed >= width)

    def options(self, width: int, architecture: int | None = None) -> tuple[LaunchOptions, ...]:
        """The options for head widths up to `width`; one of them while `every_option` says which."""
        key = self.line(width, current_architecture() if architecture is None else architecture)
        if _forced is None:
            return self.lines[key]
        wanted, used = _forced
        number = min(wanted, len(self.lines[key]) - 1)
        used.add((self, key, number))
        return (self.lines[key][number],)


# One per kind of call: 2-byte elements first, then fp32, then whatever else the op's launcher tells apart.
Tables = tuple[LaunchTable, ...]

# A table, the key of one of its lines, the number of an option in it.
Option = tuple[LaunchTable, tuple[int, int], int]

# Every table there is.
_tables: list[LaunchTable] = []


def launch_table(blocks: str, widths: Sequence[int], **lines: Sequence[Any]) -> LaunchTable:
    """A table as data: for each architecture (sm_90=[...]) and each of `widths` one option, or a list of them; an
    option is a value for each name in `blocks`, then warps, then stages."""

    def option(values: tuple[int, ...]) -> LaunchOptions:
        return LaunchOptions(
            blocks=dict(zip(blocks.split(), values[:-2], strict=True)), num_warps=values[-2], num_stages=values[-1]
        )

    keyed = {
        (int(name.removeprefix("sm_")), width): options
        for name, line in lines.items()
        for width, options in zip(widths, line, strict=True)
    }
    _tables.append(
        LaunchTable(
            lines={
                key: tuple(map(option, found if isinstance(found, list) else [found])) for key, found in keyed.items()
            }
        )
    )
    return _tables[-1]


def all_options(architecture: int) -> set[Option]:
    """Every option of every table that a device of this architecture may be launched with."""
    operations()
    lines = [(table, key) for table in _tables for key in table.lines if key[0] == table.line(1, architecture)[0]]
    return {(table, key, number) for table, key in lines for number in range(len(table.lines[key]))}


# The number of the option in force, and what was looked up meanwhile. A plain global, no context variable: autograd
# looks tables up from threads of its own.
_forced: tuple[int, set[Option]] | None = None


def every_option() -> Iterator[tuple[int, set[Option]]]:
    """In turn for 0, 1, ...: every lookup gives the option of that number of its line alone (the last one of a shorter
    line) and is noted in the set, until each line looked up has had all of its options."""
    global _forced
    number, others, previous = 0, True, _forced
    while others:
        _forced = number, used = number, set()
        try:
            yield number, used
        finally:
            _forced = previous
        number += 1
        others = any(number < len(table.lines[key]) for table, key, _ in used)


def current_architecture() -> int:
    """80, 90, 100: the compute capability kernels are being compiled for; that of the oldest supported device under the
    interpreter."""
    from triton import knobs
    from triton.runtime import driver

    return 80 if knobs.runtime.interpret else int(driver.active.get_current_target().arch)  # pyright: ignore[reportAttributeAccessIssue]


def random_inputs(seed: int, dtype: torch.dtype, device: str, sizes: Shape, *names: str) -> dict[str, torch.Tensor]:
    """Standard normal leaf tensors whose axes are the letters their names end in (q_BTHK), drawn on the CPU in fp32 so
    that every device and dtype sees the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: [sizes[axis] for axis in axes_of(name)] for name in names}
    return {
        name: torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
        for name, shape in shapes.items()
    }


@cache
def operations() -> dict[str, Operation]:
    """Every registered operation by name."""
    found: dict[str, Operation] = {}
    for path in sorted(Path(__file__).parent.glob("*_configurations.py")):
        for operation in importlib.import_module(f"triton_kernels.{path.stem}").OPERATIONS:
            assert operation.name not in found, operation.name
            found[operation.name] = operation
    return found


def select_operations(names: list[str] | None) -> list[Operation]:
    """The operations named by `--op` (an op's name selects all its variants), or all of them."""
    chosen = {
        full: operation
        for full, operation in operations().items()
        if not names or full in names or full.split("/")[0] in names
    }
    for name in names or ():
        if not any(name in (full, full.split("/")[0]) for full in chosen):
            raise ValueError(f"--op {name} is unknown, legal are: {', '.join(operations())}")
    return list(chosen.values())


def shape_label(shape: Shape) -> str:
    return " ".join(f"{name}={size}" for name, size in shape.items())


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def write_rows(path: Path, kind: type, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(kind)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read_rows(path: Path, kind: type) -> list[Any]:
    """The inverse for fields of type str, int and float; no rows where there is no file."""
    types: dict[str, Any] = {f.name: f.type for f in fields(kind)}
    lines = csv.DictReader(path.read_text().splitlines()) if path.exists() else ()
    return [kind(**{name: types[name](value) for name, value in line.items()}) for line in lines]

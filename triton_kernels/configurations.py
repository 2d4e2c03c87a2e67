"""What every tool of this folder (inspect, bench, gpu-check) knows about the ops, as data.

How an op registers itself: a file `triton_kernels/<op>_configurations.py` that exposes

    OPERATIONS: tuple[Operation, ...]

one entry per variant worth a row. Nothing else is edited: `operations()` finds the files by their names. Kernels take their launch options from a
`launch_table` in the same file, through `LaunchTable.options(width)`; other libraries' versions of an op are in `peers.py`. Such a file must not
import a module that holds `@triton.jit` functions, so that the tools can be listed where Triton is not installed.

Letters: B batch, T tokens, H heads, K key width, V value width.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

Shape = Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The least work of one pass: every input read once, every output written once, no recomputation."""

    flops: float
    bytes: float


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One op (or one variant of it) as the tools call it.

    name: "op" or "op/variant"; `--op op` selects both. call(**inputs, backend=...) runs it, inputs(dtype, device, **shape) draws its keyword
    arguments, with requires_grad set on every tensor that has a gradient. cost(element_size, **shape) is (forward, backward); backward None where
    the op has none. The gradient flows in through the first output only, as in training.
    """

    name: str
    call: Callable[..., Any]
    inputs: Callable[..., dict[str, Any]]
    cost: Callable[..., tuple[Cost, Cost | None]]
    # The shape of the offline table, the odd ones that gpu-check compares (together they reach every line of the op's launch tables), and the ones
    # that are timed on a GPU and on a CPU.
    inspect_shape: Shape
    check_shapes: tuple[Shape, ...]
    bench_shapes: tuple[Shape, ...] = ()
    cpu_shape: Shape | None = None
    # name -> a function of the same inputs that returns the same first output through another library; it imports that library itself.
    peers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    cpu_peers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    # Names of kernels in which no product is the work: they need no tensor cores.
    without_products: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """One option of a launch table: block sizes of the kernel (constexpr names -> values), warps and pipeline stages."""

    blocks: Mapping[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class LaunchTable:
    """(architecture, width) -> at most four options, best guess first. No sequence length appears in a key, and nothing is tuned at run time.

    A lookup takes the newest listed architecture that is not newer than the device, and the smallest listed width that holds the op's.
    """

    lines: Mapping[tuple[int, int], tuple[LaunchOptions, ...]]

    def __post_init__(self) -> None:
        assert all(1 <= len(options) <= 4 for options in self.lines.values())

    def line(self, width: int, architecture: int) -> tuple[int, int]:
        """The key of the line that serves head widths up to `width`; ValueError when none does."""
        known = sorted({listed for listed, _ in self.lines})
        chosen = max((listed for listed in known if listed <= architecture), default=known[0])
        widths = sorted(listed for a, listed in self.lines if a == chosen)
        if width > widths[-1]:
            raise ValueError(f"head width {width} is wider than the kernels' widest, {widths[-1]}")
        return chosen, min(listed for listed in widths if listed >= width)

    def options(self, width: int, architecture: int | None = None) -> tuple[LaunchOptions, ...]:
        """The options for head widths up to `width`; one of them while `forced_option` says which."""
        key = self.line(width, current_architecture() if architecture is None else architecture)
        if _forced is None:
            return self.lines[key]
        number = min(_forced.number, len(self.lines[key]) - 1)
        _forced.used.add((self, key, number))
        return (self.lines[key][number],)


def launch_table(blocks: str, widths: Any, **lines: Sequence[Any]) -> LaunchTable:
    """A table as data: for each architecture (sm_90=[...]) and each of `widths` one option, or a list of them; an option is a value for each name in
    `blocks`, then warps, then stages."""
    names = blocks.split()
    if isinstance(widths, dict):  # The older form, on its way out.
        return LaunchTable(
            lines={
                key: tuple(LaunchOptions(blocks=dict(zip(names, o[:-2])), num_warps=o[-2], num_stages=o[-1]) for o in options)
                for key, options in widths.items()
            }
        )

    def option(values: tuple[int, ...]) -> LaunchOptions:
        return LaunchOptions(blocks=dict(zip(names, values[:-2], strict=True)), num_warps=values[-2], num_stages=values[-1])

    return LaunchTable(
        lines={
            (int(architecture.removeprefix("sm_")), width): tuple(map(option, options if isinstance(options, list) else [options]))
            for architecture, line in lines.items()
            for width, options in zip(widths, line, strict=True)
        }
    )


# One per kind of call: 2-byte elements first, then fp32, then whatever else the op's launcher tells apart.
Tables = tuple[LaunchTable, ...]

# A table, the key of one of its lines, the number of an option in it.
Option = tuple[LaunchTable, tuple[int, int], int]


@dataclass(frozen=True, kw_only=True)
class ForcedOption:
    """While in force, every lookup gives option `number` of its line alone (the last of a shorter line); `used` collects what was looked up."""

    number: int
    used: set[Option] = field(default_factory=set)

    @property
    def others(self) -> int:
        """How many more numbers there are to force before each option of the lines used has had its turn."""
        return max((len(table.lines[key]) for table, key, _ in self.used), default=1) - 1 - self.number


# A plain global, not a context variable: autograd looks tables up from threads of its own.
_forced: ForcedOption | None = None


@contextmanager
def forced_option(number: int) -> Iterator[ForcedOption]:
    global _forced
    previous, _forced = _forced, ForcedOption(number=number)
    try:
        yield _forced
    finally:
        _forced = previous


@cache
def launch_tables() -> dict[str, LaunchTable]:
    """Every launch table by "<op>.<NAME>", with its place where NAME is a tuple of tables; one that goes by several names has the first."""
    found: dict[LaunchTable, str] = {}
    for module in configuration_modules():
        for name, value in vars(module).items():
            members = {f"[{i}]": x for i, x in enumerate(value)} if isinstance(value, tuple) else {"": value}
            for place, table in members.items():
                if isinstance(table, LaunchTable):
                    found.setdefault(table, f"{module.__name__.split('.')[-1].removesuffix('_configurations')}.{name}{place}")
    return {name: table for table, name in found.items()}


def options_of(table: LaunchTable, architecture: int) -> set[Option]:
    """Every option that an op may be launched with on a device of this architecture."""
    listed, _ = table.line(1, architecture)
    return {(table, key, number) for key, line in table.lines.items() if key[0] == listed for number in range(len(line))}


def current_architecture() -> int:
    """80, 90, 100: the compute capability kernels are being compiled for; that of the oldest supported device under the interpreter."""
    from triton import knobs
    from triton.runtime import driver

    return 80 if knobs.runtime.interpret else int(driver.active.get_current_target().arch)  # pyright: ignore[reportAttributeAccessIssue]


def random_inputs(seed: int, dtype: torch.dtype, device: str, sizes: Any, *names: str) -> dict[str, torch.Tensor]:
    """Standard normal leaf tensors whose axes are the letters their names end in (q_BTHK), drawn on the CPU in fp32 so that every device and dtype
    sees the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    # Without names, the older form, on its way out: sizes are shapes by name.
    shapes = {name: [sizes[axis] for axis in name.rsplit("_", 1)[-1]] for name in names} if names else sizes
    return {name: torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for name, shape in shapes.items()}


def configuration_modules() -> list[ModuleType]:
    return [importlib.import_module(f"triton_kernels.{path.stem}") for path in sorted(Path(__file__).parent.glob("*_configurations.py"))]


@cache
def operations() -> dict[str, Operation]:
    """Every registered operation by name."""
    found: dict[str, Operation] = {}
    for module in configuration_modules():
        for operation in module.OPERATIONS:
            assert operation.name not in found, operation.name
            found[operation.name] = operation
    return found


def select_operations(names: list[str] | None) -> list[Operation]:
    """The operations named by `--op` (an op's name selects all its variants), or all of them."""
    known = operations()
    if not names:
        return list(known.values())
    for name in names:
        if not any(name in (full, full.split("/")[0]) for full in known):
            raise ValueError(f"--op {name} is unknown, legal are: {', '.join(known)}")
    return [operation for full, operation in known.items() if full in names or full.split("/")[0] in names]

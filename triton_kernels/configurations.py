"""What every tool of this folder (inspect, bench, gpu-check) knows about the ops, as data.

How an op registers itself: a file `triton_kernels/<op>_configurations.py` that exposes

    OPERATIONS: tuple[Operation, ...]

one entry per variant worth a row. Nothing else is edited: `operations()` finds the files by their names. Kernels take their launch options from a
`LaunchTable` in the same file, through `LaunchTable.options(width)`. Such a file must not import a module that holds `@triton.jit` functions, so
that the tools can be listed where Triton is not installed.

Letters: B batch, T tokens, H heads, K key width, V value width.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
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
    # The shape of the offline table, the odd ones that gpu-check compares, and the ones that are timed on a GPU and on a CPU.
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
    """One line of a launch table: block sizes of the kernel (constexpr names -> values), warps and pipeline stages."""

    blocks: Mapping[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True, kw_only=True)
class LaunchTable:
    """(architecture, width) -> at most four options, best guess first. No sequence length appears in a key, and nothing is tuned at run time.

    A lookup takes the newest listed architecture that is not newer than the device, and the smallest listed width that holds the op's.
    """

    lines: Mapping[tuple[int, int], tuple[LaunchOptions, ...]]

    def __post_init__(self) -> None:
        assert all(1 <= len(options) <= 4 for options in self.lines.values())

    def options(self, width: int, architecture: int | None = None) -> tuple[LaunchOptions, ...]:
        """The options for head widths up to `width`; ValueError when no listed width holds it."""
        device = current_architecture() if architecture is None else architecture
        known = sorted({listed for listed, _ in self.lines})
        chosen = max((listed for listed in known if listed <= device), default=known[0])
        widths = sorted(listed for a, listed in self.lines if a == chosen)
        if width > widths[-1]:
            raise ValueError(f"head width {width} is wider than the kernels' widest, {widths[-1]}")
        return self.lines[chosen, min(listed for listed in widths if listed >= width)]


def current_architecture() -> int:
    """80, 90, 100: the compute capability kernels are being compiled for; that of the oldest supported device under the interpreter."""
    from triton import knobs
    from triton.runtime import driver

    return 80 if knobs.runtime.interpret else int(driver.active.get_current_target().arch)  # pyright: ignore[reportAttributeAccessIssue]


def random_inputs(generator_seed: int, dtype: torch.dtype, device: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Standard normal leaf tensors of the given shapes, drawn on the CPU in fp32 so that every device and dtype sees the same numbers."""
    generator = torch.Generator().manual_seed(generator_seed)
    return {name: torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for name, shape in shapes.items()}


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
    known = operations()
    if not names:
        return list(known.values())
    for name in names:
        if not any(name in (full, full.split("/")[0]) for full in known):
            raise ValueError(f"--op {name} is unknown, legal are: {', '.join(known)}")
    return [operation for full, operation in known.items() if full in names or full.split("/")[0] in names]

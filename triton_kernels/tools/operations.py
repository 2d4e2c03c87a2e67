"""What every tool of this folder (inspect, bench, gpu-check) knows about the ops, as data.

Each file of `catalogue/` exposes OPERATIONS: tuple[Operation, ...], one entry per variant of an op worth a row. It must
not import a module that holds `@triton.jit` functions, so that the tools can be listed where Triton is not installed.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import torch

from triton_kernels.common.checks import axes_of
from triton_kernels.common.launch_tables import Option, all_tables

# In the order in which the tools show them.
CATALOGUES = ("softmax", "mixed", "experts", "layer", "linear")
# The families whose kernels have launch tables.
FAMILIES = ("softmax", "mixed", "experts", "linear")

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


def all_options(architecture: int) -> set[Option]:
    """Every option of every table that a device of this architecture may be launched with."""
    for family in FAMILIES:
        importlib.import_module(f"triton_kernels.{family}.launch_tables")
    lines = [(table, key) for table in all_tables() for key in table.lines if key[0] == table.line(1, architecture)[0]]
    return {(table, key, number) for table, key in lines for number in range(len(table.lines[key]))}


def random_inputs(seed: int, dtype: torch.dtype, device: str, sizes: Shape, *names: str) -> dict[str, torch.Tensor]:
    """Standard normal leaf tensors whose axes are the letters their names end in (q_BTHK), drawn on the CPU in fp32 so
    that every device and dtype sees the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: [sizes[axis] for axis in axes_of(name)] for name in names}
    return {
        name: torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def packed_offsets(T: int, sequences: int, device: str) -> torch.Tensor:
    """Offsets of so many sequences in T tokens, the first one empty."""
    return torch.tensor([0, *(T * n // (sequences - 1) for n in range(sequences))]).to(device)


def catalogue_module(name: str) -> ModuleType:
    """The file of `catalogue/` by that name."""
    return importlib.import_module(f"triton_kernels.tools.catalogue.{name}")


@cache
def operations() -> dict[str, Operation]:
    """Every registered operation by name."""
    found: dict[str, Operation] = {}
    for name in CATALOGUES:
        for operation in catalogue_module(name).OPERATIONS:
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

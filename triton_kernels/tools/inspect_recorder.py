"""Record what an op would launch on a GPU that is not there, and report what the compiler made of each kernel.

A driver that claims an architecture but owns no device takes Triton's place for one, and `JITFunction.run` becomes its
own warm-up path: every kernel of the op, forward and backward, is compiled for that architecture and nothing is
launched. Tensors live on the CPU and hold whatever `torch.empty` left in them, so an op whose launches depend on its
numbers cannot be recorded (and would have to wait for the device anyway). Torch's own operators do run, and are
recorded too: on a GPU each is a launch that reads and writes memory. One that hands a value to the host is refused by
name, because there the host would wait for the device, unless it is a peer's.
"""

import importlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from triton_kernels.common import checks
from triton_kernels.tools.agreement import leaves_of, outputs_of

# Name, multiprocessors and the largest shared memory of one block, in bytes: 1 KiB less than a multiprocessor has.
DEVICES = {
    80: ("NVIDIA A100", 108, 163 * 1024),
    90: ("NVIDIA H200", 132, 227 * 1024),
    100: ("NVIDIA B200", 148, 227 * 1024),
}

# SASS opcodes by what they tell. Hopper's tensor cores are HGMMA, Blackwell's UTC*MMA; HMMA is Ampere's, and the slow
# way on the later ones.
OPCODES = {
    "hgmma": r"HGMMA",
    "hmma": r"HMMA",
    "utcmma": r"UTC\w*MMA",
    "ldgsts": r"LDGSTS",
    "utmaldg": r"UTMALDG",
    "ldg128": r"LDG\.[\w.]*128",
    "mufu": r"MUFU",
    "spills": r"(?:LDL|STL)\b",
}

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# Operators that move no bytes, besides views.
FREE_OPERATORS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "is_same_size")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One kernel launch, or one torch operator (binary None). n_bytes: each distinct tensor it was given, once."""

    name: str
    n_bytes: int
    grid: tuple[int, ...] = ()
    binary: Any = None


def offline_driver(architecture: int) -> SimpleNamespace:
    """The part of a Triton driver that compiling needs. The architecture doubles as the device number, so that caches
    never mix two of them."""
    _, processors, shared = DEVICES[architecture]
    properties = {"multiprocessor_count": processors, "max_shared_mem": shared, "warpSize": 32, "max_num_regs": 65536}
    return SimpleNamespace(
        utils=SimpleNamespace(get_device_properties=lambda device: properties),
        get_current_device=lambda: architecture,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", architecture, 32),
        get_active_torch_device=lambda: torch.device("cpu"),
    )


class OperatorRecorder(TorchDispatchMode):
    """Notes every torch operator that would be a launch, those inside our registered ops included; unless `may_wait`,
    refuses those that wait."""

    def __init__(self, launches: list[Launch], may_wait: bool):
        super().__init__()
        self.launches = launches
        self.may_wait = may_wait

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if not self.may_wait and reads_values(func, args):
            refuse(func._schema.name)
        definition = OPDEFS.get(func._schema.name)
        if definition is not None:
            # A registered op is opaque to a dispatch mode: run its body under the mode instead, so that its own
            # operators are seen.
            with self, torch.no_grad():
                return definition._init_fn(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        is_view = len(returns) > 0 and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not is_view and func._schema.name.split("::")[1] not in FREE_OPERATORS:
            self.launches.append(
                Launch(name=func._schema.name, n_bytes=distinct_bytes(tree_leaves((args, kwargs, result))))
            )
        return result


def reads_values(func: Any, args: tuple) -> bool:
    """Whether what the operator returns, or the shape of it, depends on values in a way that the host must know: item,
    nonzero, a boolean index."""
    if func._schema.name.startswith("aten::index"):
        return any(isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(args[1]))
    return any(tag in func.tags for tag in (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape))


def refuse(name: str, *_: Any, **__: Any) -> None:
    raise RuntimeError(f"{name} reads values of a tensor: on a GPU the host would wait for them")


def distinct_bytes(values: list[Any]) -> int:
    """Bytes of the tensors among them, one that comes twice counted once, and an axis of stride 0 (an expanded tensor)
    as one element."""
    sizes: dict[int, int] = {}
    for x in values:
        if isinstance(x, torch.Tensor):
            touched = x.element_size()
            for size, stride in zip(x.shape, x.stride()):
                touched *= size if stride != 0 else min(size, 1)
            sizes[x.data_ptr()] = max(sizes.get(x.data_ptr(), 0), touched)
    return sum(sizes.values())


@contextmanager
def recording(architecture: int, *, compiles: bool = True, may_wait: bool = False) -> Iterator[list[Launch]]:
    """Within the block, Triton compiles for `architecture` (or, without `compiles`, does not even that) and launches
    nothing; yields the list the launches go to, in their order. RuntimeError where the host would wait for the device,
    unless it `may_wait`."""
    # Imported beforehand: what a launcher makes once for the whole process (the counters of flash_decode) is no launch
    # of a call.
    for path in Path(checks.__file__).parents[1].glob("*/*_launch.py"):
        importlib.import_module(f"triton_kernels.{path.parent.name}.{path.stem}")
    launches: list[Launch] = []
    compile_and_run = JITFunction.run

    @wraps(compile_and_run)
    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        binary = compile_and_run(self, *args, grid=grid, warmup=True, **options) if compiles else None
        named = dict(zip(self.arg_names, args)) | options
        size = tuple(int(n) for n in (grid(named) if callable(grid) else grid))  # pyright: ignore[reportGeneralTypeIssues]
        n_bytes = distinct_bytes([getattr(x, "base", x) for x in tree_leaves(named)])
        launches.append(Launch(name=self.fn.__name__, grid=size, n_bytes=n_bytes, binary=binary))
        return binary

    def take_first(self: Autotuner, *args: Any, **options: Any) -> Any:
        # A peer's tuner would have to time its candidates: the first one listed stands for them all.
        return self.fn.run(*args, **options, **self.configs[0].all_kwargs())

    # What a peer asks torch about the device while it is imported and called.
    name, processors, shared = DEVICES[architecture]
    properties = SimpleNamespace(name=name, multi_processor_count=processors, shared_memory_per_block_optin=shared)
    pretended = {
        "get_device_name": lambda device=None: name,
        "get_device_capability": lambda device=None: divmod(architecture, 10),
        "get_device_properties": lambda device=None: properties,
        "device": lambda index: nullcontext(),
        "current_device": lambda: architecture,
    }
    # What would leave the device without passing through an operator; and no check may look at values, though these
    # tensors lie on the CPU.
    leaving: dict[str, Any] = {name: getattr(torch.Tensor, name) for name in ("tolist", "numpy", "cpu")}
    if not may_wait:
        leaving = {name: partial(refuse, f"Tensor.{name}") for name in leaving}
    with (
        mock.patch.multiple(torch.Tensor, **leaving),
        mock.patch.object(checks, "values_are_free", return_value=False),
        mock.patch.object(triton.runtime.driver, "_active", offline_driver(architecture)),
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(Autotuner, "run", take_first),
        mock.patch.multiple(torch.cuda, **pretended),
        OperatorRecorder(launches, may_wait),
    ):
        yield launches


def record_passes(
    call: Callable[..., Any], inputs: dict[str, Any], architecture: int, **options: bool
) -> dict[str, list[Launch]]:
    """Launches of the forward, and of the backward of the first output where it has one; `options` are those of
    `recording`."""
    with recording(architecture, **options) as launches:
        first = outputs_of(call, inputs)[0]
        n_forward, leaves = len(launches), list(leaves_of(inputs).values())
        if not (leaves and first.requires_grad):
            return {"forward": launches}
        torch.autograd.grad(first, leaves, torch.empty_like(first), allow_unused=True)
    return {"forward": launches[:n_forward], "backward": launches[n_forward:]}


def report_binary(kernel: Any) -> dict[str, int]:
    """Take apart one compiled kernel (`triton.compiler.CompiledKernel`): registers and stack (bytes) per thread, shared
    memory (bytes) and warps per block, blocks resident at once on one multiprocessor, and how often each of OPCODES
    occurs."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage, sass = (
            subprocess.run([TOOLS / tool, option, file.name], check=True, capture_output=True, text=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match is not None, usage[:200]
    registers, stack = map(int, match.groups())
    shared, warps = int(kernel.metadata.shared), int(kernel.metadata.num_warps)
    blocks = resident_blocks(registers, warps, shared, kernel.metadata.target.arch)
    counts = {name: len(re.findall(rf"\b{pattern}", sass)) for name, pattern in OPCODES.items()}
    return {"registers": registers, "stack": stack, "shared": shared, "warps": warps, "blocks": blocks} | counts


def resident_blocks(registers: int, warps: int, shared: int, architecture: int) -> int:
    """Blocks one multiprocessor holds: the least of what 64 K registers (given out by 256 per warp), 64 warps, the
    shared memory (1 KiB more per block than asked for) and 32 block slots allow."""
    registers_per_warp = -(-registers * 32 // 256) * 256
    by_registers = 65536 // (registers_per_warp * warps)
    by_shared = (DEVICES[architecture][2] + 1024) // (shared + 1024)
    return min(by_registers, 64 // warps, by_shared, 32)

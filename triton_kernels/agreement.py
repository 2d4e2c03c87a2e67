"""Does an op agree with its fp64 reference on this machine? The budget is derived from the data: an implementation may be off by twice what the torch
reference is off by in the same dtype, plus a few roundings of the largest entry.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from triton_kernels.configurations import Operation, Shape


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """worst: the largest error over its budget, over outputs and gradients; where: which of them ("output 0", "gradient of k_BTHK")."""

    ok: bool
    worst: float
    where: str


def results(call: Callable[..., Any], inputs: dict[str, Any], *, first_only: bool) -> dict[str, torch.Tensor]:
    """Floating outputs, and the gradients of every leaf through the first output."""
    output = call(**inputs)
    outputs = (output if isinstance(output, tuple) else (output,))[: 1 if first_only else None]
    named = {f"output {i}": x.detach() for i, x in enumerate(outputs) if isinstance(x, torch.Tensor)}
    leaves = {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    if leaves and outputs[0].requires_grad:
        weights = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(1)).to(outputs[0])
        grads = torch.autograd.grad(outputs[0], list(leaves.values()), weights, materialize_grads=True)
        named |= {f"gradient of {name}": grad for name, grad in zip(leaves, grads)}
    return named


def in_fp64(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in fp64, leaves again where they were leaves."""
    exact = dict(inputs)
    for name, x in inputs.items():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            exact[name] = x.detach().double().requires_grad_(x.requires_grad)
    return exact


def compare(operation: Operation, call: Callable[..., Any], inputs: dict[str, Any], *, first_only: bool = False) -> Agreement:
    """`call` on `inputs` against the op's torch reference in fp64, with the torch reference in the inputs' own dtype as the measure."""

    def reference(**tensors: Any) -> Any:
        return operation.call(**tensors, backend="torch")

    actual = results(call, inputs, first_only=first_only)
    low = results(reference, inputs, first_only=first_only)
    exact = results(reference, in_fp64(inputs), first_only=first_only)
    worst, where = 0.0, ""
    for name, right in exact.items():
        if right.numel() == 0:
            continue
        eps = torch.finfo(actual[name].dtype).eps if actual[name].dtype != torch.float32 else 2.0**-20
        budget = 2 * (low[name] - right).abs().max() + 4 * eps * right.abs().max() + 1e-6
        ratio = float((actual[name] - right).abs().max() / budget)
        # NaN compares false with everything, so it must be asked for.
        if ratio != ratio or ratio > worst:
            worst, where = (float("inf") if ratio != ratio else ratio), name
    return Agreement(ok=worst <= 1.0, worst=worst, where=where)


def check(operation: Operation, shape: Shape, dtype: torch.dtype, device: str, backend: str) -> Agreement:
    """One op at one shape; on a GPU also that two runs give the same bits."""
    inputs = operation.inputs(dtype, device, **shape)

    def call(**tensors: Any) -> Any:
        return operation.call(**tensors, backend=backend)

    agreement = compare(operation, call, inputs)
    first, second = results(call, inputs, first_only=False), results(call, inputs, first_only=False)
    for name, x in first.items():
        if not torch.equal(x, second[name]):
            return Agreement(ok=False, worst=float("inf"), where=f"{name}: two runs differ in their bits")
    return agreement

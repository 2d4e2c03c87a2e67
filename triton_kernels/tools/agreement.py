"""Does an op agree with its fp64 reference on this machine? The budget is derived from the data: an implementation may
be off by twice what the torch reference is off by in the same dtype, plus a few roundings of the largest entry.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from triton_kernels.tools.operations import Operation

Call = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """worst: the largest error over its budget, over outputs and gradients; where: which of them ("output 0", "gradient
    of k_BTHK")."""

    ok: bool
    worst: float
    where: str


def outputs_of(call: Call, inputs: dict[str, Any]) -> tuple[Any, ...]:
    output = call(**inputs)
    return output if isinstance(output, tuple) else (output,)


def leaves_of(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that have a gradient."""
    return {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad}


def output_gradient(output: Tensor) -> Tensor:
    """The same numbers on every device and in every dtype, rounded."""
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)


def results(call: Call, inputs: dict[str, Any], gradient: Tensor | None = None) -> dict[str, Tensor]:
    """Outputs, and the gradients of every leaf through the first output (`gradient` is that output's; drawn here unless
    given). Tensors without a gradient are copied beforehand, because a decode step updates its state in place."""
    outputs = outputs_of(
        call, {name: x.clone() if isinstance(x, Tensor) and not x.requires_grad else x for name, x in inputs.items()}
    )
    named = {f"output {i}": x.detach() for i, x in enumerate(outputs) if isinstance(x, Tensor)}
    leaves = leaves_of(inputs)
    if leaves and outputs[0].requires_grad:
        weights = output_gradient(outputs[0]) if gradient is None else gradient
        grads = torch.autograd.grad(outputs[0], list(leaves.values()), weights, materialize_grads=True)
        named |= {f"gradient of {name}": grad for name, grad in zip(leaves, grads)}
    return named


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> str:
    """The name of the first tensor that differs, or "" when none does."""
    return next((name for name, x in first.items() if not torch.equal(x, second[name])), "")


def is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def rounding(dtype: torch.dtype) -> float:
    """What one rounding costs, relative; in fp32 some more, for the order of a sum; nothing for whole numbers
    (indices)."""
    return 2.0**-20 if dtype == torch.float32 else torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def largest_error(found: Tensor, right: Tensor) -> Tensor:
    """In fp64, as booleans cannot be subtracted. The same infinity is no error, NaN remains one."""
    return (found.double() - right).masked_fill(found == right, 0.0).abs().max()


class Reference:
    """What an op's torch reference computes from the inputs in fp64, and in the inputs' own dtype as the measure of
    what may be lost."""

    def __init__(self, operation: Operation, inputs: dict[str, Any]):
        call = partial(operation.call, backend="torch")
        self.inputs = inputs
        self.exact = results(
            call,
            {
                name: x.detach().double().requires_grad_(x.requires_grad) if is_float(x) else x
                for name, x in inputs.items()
            },
        )
        self.rounded = results(call, inputs)
        self.input_rounding = max((rounding(x.dtype) for x in inputs.values() if is_float(x)), default=0.0)

    def judge(self, actual: dict[str, Tensor]) -> Agreement:
        """`actual`: the results of a call on the same inputs, or of a peer that returns the first output alone."""
        worst, where = 0.0, ""
        # What cancels to nothing (a softmax over one key has no gradient) is as far from it as others are rounded.
        sizes = [
            float(x.nan_to_num(0.0, 0.0, 0.0).abs().max())
            for x in self.exact.values()
            if x.is_floating_point() and x.numel()
        ]
        floor = 1e-6 * max(1.0, *sizes, 0.0)
        for name, found in actual.items():
            right = self.exact[name].double()
            if right.numel() == 0:
                continue
            # An fp32 result of 16-bit inputs comes of products whose operands are rounded to 16 bits.
            eps = max(rounding(found.dtype), self.input_rounding) if found.is_floating_point() else 0.0
            budget = (
                2 * largest_error(self.rounded[name], right)
                + 4 * eps * right.masked_fill(right.isinf(), 0.0).abs().max()
                + floor
            )
            ratio = float(largest_error(found, right) / budget)
            # NaN compares false with everything, so it must be asked for.
            if ratio != ratio or ratio > worst:
                worst, where = (float("inf") if ratio != ratio else ratio), name
        return Agreement(ok=worst <= 1.0, worst=worst, where=where)

    def check(self, call: Call) -> Agreement:
        """`judge`, and that a second run gives the same bits."""
        first = results(call, self.inputs)
        assert first.keys() == self.exact.keys()
        differs = same_bits(first, results(call, self.inputs))
        return (
            Agreement(ok=False, worst=float("inf"), where=f"{differs}: two runs differ in their bits")
            if differs
            else self.judge(first)
        )

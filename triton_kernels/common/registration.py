"""How an op becomes one node for torch.compile and CUDA graphs: one function that allocates its outputs and launches
its kernels."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from triton_kernels.common.layout import in_one_piece

# For `strided`: an op in torch, which minds every layout.
ALL = "*"


def kernel_op(name: str, *, strided: str = "", mutates_args: Iterable[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Register the function below as the operator triton_kernels::<name>.

    The function is its own fake implementation: what it allocates has the true shapes, dtypes and strides by
    construction, and it launches only where `has_work(output)` says so.

    Every tensor arrives in one piece, so that a kernel may compute offsets from shapes alone, but for those named in
    `strided`, whose strides the function minds, and those of `mutates_args`, which must be written where they lie."""

    def register(function: Callable[..., Any]) -> Any:
        parameters = tuple(inspect.signature(function).parameters)
        as_they_lie = parameters if strided == ALL else {*strided.split(), *mutates_args}
        assert {*as_they_lie} <= {*parameters}, f"{name}: {as_they_lie} are not all parameters"

        @functools.wraps(function)
        def with_layout(*values: Any, **named: Any) -> Any:
            named |= zip(parameters, values)
            for parameter, x in named.items():
                if isinstance(x, Tensor) and parameter not in as_they_lie:
                    named[parameter] = in_one_piece(x)
            return function(**named)

        op = torch.library.custom_op(f"triton_kernels::{name}", with_layout, mutates_args=mutates_args)
        op.register_fake(with_layout)
        if not mutates_args:
            # Until its own derivative is registered; those of gradients never are.
            op.register_autograd(functools.partial(no_derivative, name))
        return op

    return register


def no_derivative(name: str, *_: Any) -> None:
    """Refuses gradients of gradients, which would run into an operator without a derivative."""
    raise RuntimeError(
        f"triton_kernels::{name} has no derivative; legal is one reverse pass, without create_graph and torch.func"
    )


def has_work(output: Tensor) -> bool:
    """Whether there is anything to launch for: not for the shapes without memory that torch.compile traces with, nor
    for an empty output."""
    return not (isinstance(output, FakeTensor) or output.is_meta) and output.numel() > 0

"""How an op becomes one node for torch.compile and CUDA graphs: one function that allocates its outputs and launches
its kernels."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def kernel_op(name: str, mutates_args: Iterable[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Register the function below as the operator triton_kernels::<name>.

    The function is its own fake implementation: what it allocates has the true shapes, dtypes and strides by
    construction, and it launches only where `has_work(output)` says so."""

    def register(function: Callable[..., Any]) -> Any:
        op = torch.library.custom_op(f"triton_kernels::{name}", function, mutates_args=mutates_args)
        op.register_fake(function)
        return op

    return register


def has_work(output: Tensor) -> bool:
    """Whether there is anything to launch for: not for the shapes without memory that torch.compile traces with, nor
    for an empty output."""
    return not (isinstance(output, FakeTensor) or output.is_meta) and output.numel() > 0

"""x W^T, by the forms in C on a CPU where they take it; for many rows with gradients.

Legend: I and O the widths of a weight.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from triton_kernels.native.library import (
    call,
    is_native,
    linear,
    products_here,
    rounded,
    rounds_products,
    takes_many_rows,
    threads,
    wide,
)


def project(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T over the last axis in the dtype of x, in C where that takes them."""
    # Other widths are torch's to refuse: the native forms would read beyond the weights.
    if x.shape[-1] == weight_OI.shape[1]:
        if is_native(x, 4 * (x.numel() // x.shape[-1]), weight_OI):
            return linear(x.reshape(-1, x.shape[-1]), weight_OI).view(*x.shape[:-1], -1)
        if takes_many_rows(x, weight_OI, dtypes=products_here()):
            return _Projection.apply(x, weight_OI.float())  # pyright: ignore[reportReturnType]
    return functional.linear(x, weight_OI.to(x.dtype))


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        weight_OI = wide(weight_OI)
        ctx.save_for_backward(x, weight_OI)
        (n_out, n_in), n_rows = weight_OI.shape, x.numel() // x.shape[-1]
        y = torch.empty(*x.shape[:-1], n_out)
        call("project_rows", wide(x), weight_OI, y, n_rows, n_in, n_out, rounds_products(x.dtype), threads())
        return rounded(y, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight_OI = ctx.saved_tensors
        (n_out, n_in), n_rows = weight_OI.shape, x.numel() // x.shape[-1]
        dx, d_weight_OI = (
            torch.empty(tensor.shape) if needed else None
            for tensor, needed in zip((x, weight_OI), ctx.needs_input_grad)
        )
        call(
            "project_rows_backward",
            *(wide(dy), wide(x), weight_OI, dx, d_weight_OI),
            *(n_rows, n_in, n_out, rounds_products(x.dtype), threads()),
        )
        return None if dx is None else rounded(dx, x.dtype), d_weight_OI

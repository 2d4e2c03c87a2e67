"""RMSNorm in C on a CPU, with gradients.

Legend: D normalised width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from triton_kernels.native.library import call, rounded, threads, wide

# As in training_norm_and_loss.c.
ROWS = 256


def rms_norm_with_gradients(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis by an fp32 weight, in the dtype of x, fp32 or bf16."""
    y = _RMSNorm.apply(x, weight_D, eps)
    assert isinstance(y, Tensor)
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        weight_D = wide(weight_D)
        ctx.save_for_backward(x, weight_D)
        ctx.eps = eps
        y, D = torch.empty(x.shape), x.shape[-1]
        call("rms_norm_rows", wide(x), weight_D, y, x.numel() // D, D, eps, threads())
        return rounded(y, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight_D = ctx.saved_tensors
        D = x.shape[-1]
        n_rows = x.numel() // D
        dx, d_weight_PD = torch.empty(x.shape), torch.zeros(max(1, -(-n_rows // ROWS)), D)
        call("rms_norm_backward", wide(dy), wide(x), weight_D, dx, d_weight_PD, n_rows, D, ctx.eps, threads())
        return rounded(dx, x.dtype), d_weight_PD[0], None

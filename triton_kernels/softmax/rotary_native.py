"""Heads turned by their angles in C on a CPU, and their gradient turned back.

Legend: B batch, T tokens, H heads, K head width, P half of the rotated channels.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from triton_kernels.native.library import call, threads, wide


def rotate_native(x_BTHK: Tensor, cosine_TP: Tensor, sine_TP: Tensor) -> Tensor:
    """`rotate` of fp32 or bf16 whose channels lie side by side, computed in fp32."""
    turned_BTHK = _Rotation.apply(x_BTHK, wide(cosine_TP), wide(sine_TP))
    assert isinstance(turned_BTHK, Tensor)
    return turned_BTHK


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTHK: Tensor, cosine_TP: Tensor, sine_TP: Tensor) -> Tensor:
        ctx.save_for_backward(cosine_TP, sine_TP)
        return _turned(x_BTHK, cosine_TP, sine_TP, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _turned(dy.contiguous(), *ctx.saved_tensors, -1.0), None, None


def _turned(x_BTHK: Tensor, cosine_TP: Tensor, sine_TP: Tensor, direction: float) -> Tensor:
    y_BTHK = torch.empty(x_BTHK.shape, dtype=x_BTHK.dtype)
    strides = (ctypes.c_long * 3)(*x_BTHK.stride()[:3])
    sizes = (ctypes.c_long * 5)(*x_BTHK.shape, cosine_TP.shape[1])
    bf16 = x_BTHK.dtype == torch.bfloat16
    call("rotate_heads", x_BTHK, y_BTHK, strides, sizes, cosine_TP, sine_TP, direction, bf16, threads())
    return y_BTHK

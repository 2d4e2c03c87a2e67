"""What stands around the rule of a linear-attention layer, in C on a CPU with gradients: the short causal convolution
and the gated RMSNorm.

Legend: B batch, T tokens, D channels or normalised width, W convolution width, R = W - 1 entries of a tail, V = W + 1,
P pieces.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from triton_kernels.native.library import call, threads, wide
from triton_kernels.native.norm import ROWS

# Tokens of a piece, as in linear_layer.c.
CONV_ROWS = 128


def causal_conv1d_native(
    x_BTD: Tensor, weight_DW: Tensor, bias_D: Tensor | None, tail_BRD: Tensor, *, silu: bool
) -> Tensor:
    """y_BTD of `causal_conv1d` on checked arguments of at most 32 bits, without packed sequences."""
    tensors = (None if x is None else x.float() for x in (x_BTD, weight_DW, bias_D, tail_BRD))
    return _Convolution.apply(*tensors, silu).to(x_BTD.dtype)  # pyright: ignore[reportAttributeAccessIssue]


class _Convolution(torch.autograd.Function):
    """Keeps its inputs only; the backward computes the sums again."""

    @staticmethod
    def forward(
        ctx: Any, x_BTD: Tensor, weight_DW: Tensor, bias_D: Tensor | None, tail_BRD: Tensor, silu: bool
    ) -> Tensor:
        (B, T, D), W = x_BTD.shape, weight_DW.shape[1]
        x_BTD, tail_BRD = x_BTD if x_BTD.stride(-1) == 1 else x_BTD.contiguous(), tail_BRD.contiguous()
        bias_D = None if bias_D is None else bias_D.contiguous()
        inputs = x_BTD, tail_BRD, weight_DW.T.contiguous(), bias_D
        ctx.save_for_backward(*inputs)
        ctx.arrays = (ctypes.c_long * 2)(*x_BTD.stride()[:2]), (ctypes.c_long * 5)(B, T, D, W, int(silu))
        y_BTD = torch.empty(B, T, D)
        call("conv_forward", *inputs, *ctx.arrays, y_BTD, threads())
        return y_BTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_BTD, tail_BRD, weight_WD, bias_D = ctx.saved_tensors
        (B, T, D), W = x_BTD.shape, len(weight_WD)
        dx_BTD, d_tail_BRD = torch.empty(x_BTD.shape), torch.empty_like(tail_BRD)
        d_weight_PVD = torch.empty(B * -(-T // CONV_ROWS), W + 1, D)
        call("conv_backward", *ctx.saved_tensors, *ctx.arrays, wide(dy), dx_BTD, d_tail_BRD, d_weight_PVD, threads())
        return dx_BTD, d_weight_PVD[0, :W].T, None if bias_D is None else d_weight_PVD[0, W], d_tail_BRD, None


def gated_rms_norm_native(x: Tensor, gate: Tensor, weight_D: Tensor, *, eps: float, silu: bool) -> Tensor:
    """`gated_rms_norm` on checked arguments of at most 32 bits."""
    return _GatedNorm.apply(x.float(), gate.float(), weight_D.float(), eps, silu).to(x.dtype)  # pyright: ignore[reportAttributeAccessIssue]


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight_D: Tensor, eps: float, silu: bool) -> Tensor:
        gate, (outer, heads, inner) = _as_two_axes(gate)
        inputs = x.contiguous(), gate, weight_D.contiguous()
        ctx.save_for_backward(*inputs)
        n_rows, D = x.numel() // x.shape[-1], x.shape[-1]
        ctx.options = (ctypes.c_long * 6)(n_rows, heads, D, outer, inner, int(silu)), eps
        y = torch.empty(x.shape)
        call("gated_norm", *inputs, *ctx.options, y, threads())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x = ctx.saved_tensors[0]
        n_rows, D = x.numel() // x.shape[-1], x.shape[-1]
        dx, d_gate, d_weight_PD = torch.empty(x.shape), torch.empty(x.shape), torch.zeros(max(1, -(-n_rows // ROWS)), D)
        call("gated_norm_backward", *ctx.saved_tensors, *ctx.options, wide(dy), dx, d_gate, d_weight_PD, threads())
        return dx, d_gate, d_weight_PD[0], None, None


def _as_two_axes(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """x [..., D], made dense only where its rows do not lie at two even distances; and those: of the outer axis, how
    many rows of the inner one it spans, and theirs. A part of a projection is such a tensor."""
    D = x.shape[-1]
    sizes, strides = x.shape[:-1], x.stride()[:-1]
    even = all(strides[i] == sizes[i + 1] * strides[i + 1] for i in range(len(sizes) - 2))
    if x.dim() == 1 or x.stride(-1) != 1 or not even:
        return x.contiguous(), (D, 1, D)
    return x, (strides[-2] if len(sizes) > 1 else 0, sizes[-1], strides[-1])

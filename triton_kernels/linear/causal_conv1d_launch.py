"""causal_conv1d on its Triton kernels: one launch forward; backward one, and one sum over its programs' shares of the
weight's and the bias' gradients.

Legend: B batch, T tokens, D channels, W convolution width, P blocks of rows.
"""

from typing import Any

import torch
from torch import Tensor

from triton_kernels.common.registration import has_work, kernel_op
from triton_kernels.common.sizes import cdiv
from triton_kernels.linear.causal_conv1d_kernels import (
    Gradients,
    Inputs,
    Sizes,
    convolution_backward_kernel,
    convolution_forward_kernel,
)

# Rows and channels of a program: 16 elements per thread at 4 warps forward; the backward holds more of them at once and
# takes half as many, but no fewer than a tail has entries: W - 1 of at most 8 taps.
BLOCK_M = 16
BACKWARD_BLOCK_M = 8
BLOCK_C = 128


def launch(
    kernel: Any, inputs: Inputs, cu_seqlens: Tensor | None, *, silu: bool, block_m: int, n_tails: int, **tensors: Any
) -> None:
    """Over the blocks of rows, and the tails after them, times blocks of channels; `tensors` are what this kernel has
    besides, by its parameters' names."""
    B, T, D = inputs.x.shape
    kernel[(cdiv(B * T, block_m) + n_tails, cdiv(D, BLOCK_C))](
        inputs=inputs,
        cu_seqlens=cu_seqlens,
        sizes=Sizes(n_rows=B * T, T=T, D=D, n_sequences=0 if cu_seqlens is None else len(cu_seqlens) - 1),
        W=inputs.weight.shape[1],
        SILU=silu,
        BLOCK_M=block_m,
        BLOCK_C=BLOCK_C,
        **tensors,
    )


@kernel_op("causal_conv1d")
def forward_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, cu_seqlens: Tensor | None, silu: bool
) -> Tensor:
    """y; the arguments are those of `causal_conv1d`, already checked."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if has_work(y):
        inputs = Inputs(x=x, weight=weight, bias=bias, tail=tail)
        launch(convolution_forward_kernel, inputs, cu_seqlens, silu=silu, block_m=BLOCK_M, n_tails=0, y=y)
    return y


@kernel_op("causal_conv1d_backward")
def backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dtail, sums [W + 1, D] in fp32: the gradients of weight, transposed, and of bias)."""
    (B, T, D), W = x.shape, weight.shape[1]
    dx, dtail = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, tail))
    partial_PWD = x.new_empty(cdiv(B * T, BACKWARD_BLOCK_M), W + 1, D, dtype=torch.float32)
    if has_work(dtail):
        launch(
            convolution_backward_kernel,
            Inputs(x=x, weight=weight, bias=bias, tail=tail),
            cu_seqlens,
            silu=silu,
            block_m=BACKWARD_BLOCK_M,
            n_tails=len(tail),
            dy=dy,
            gradients=Gradients(dx=dx, dtail=dtail, partial=partial_PWD),
        )
    return dx, dtail, partial_PWD.sum(0)


def save(ctx, inputs, output) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def backward(ctx, dy: Tensor):
    dx, dtail, sums_WD = backward_op(dy, *ctx.saved_tensors, ctx.silu)
    _, weight, bias, *_ = ctx.saved_tensors
    return dx, sums_WD[:-1].T.to(weight.dtype), None if bias is None else sums_WD[-1].to(bias.dtype), dtail, None, None


forward_op.register_autograd(backward, setup_context=save)

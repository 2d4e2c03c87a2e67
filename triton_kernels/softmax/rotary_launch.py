"""rotate on its Triton kernel, as one operator that torch.compile and CUDA graphs see as one node.

Legend: B batch, T tokens, H heads, K head width, P half of the rotated channels.
"""

# The launches' constexpr parameters are plain values to the caller, which a type checker cannot know.
# pyright: reportArgumentType=false
from typing import Any

import torch
from torch import Tensor

from triton_kernels.common.registration import has_work, kernel_op
from triton_kernels.common.sizes import cdiv, padded
from triton_kernels.common.tiles import dense_channels, rows
from triton_kernels.softmax.rotary_kernels import RotaryForm, rotate_kernel

# Pairs of channels of a program of `rotate`.
ROTATED_PAIRS = 1024


@kernel_op("rotate", strided="x")
def rotate_op(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """x [B, T, H, K] turned by the tables [T, P], or turned back."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if has_work(y):
        (B, T, H, K), half = x.shape, cos.shape[1]
        cos_rows, sin_rows = (rows(table.float()[None, :, None]) for table in (cos, sin))
        block_m = max(1, ROTATED_PAIRS // padded(half))
        n_blocks = cdiv(T, block_m)
        rotate_kernel[(B * n_blocks * H,)](
            x=rows(dense_channels(x)),
            cos=cos_rows,
            sin=sin_rows,
            y=rows(y),
            T=T,
            H=H,
            n_blocks=n_blocks,
            FORM=RotaryForm(
                WIDTH=K, HALF=half, BACK=back, BLOCK_M=block_m, BLOCK_P=padded(half), BLOCK_W=padded(K - 2 * half)
            ),
        )
    return y


def _save_tables(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, cos, sin, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


def _turn_back(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return rotate_op(dy, *ctx.saved_tensors, not ctx.back), None, None, None


rotate_op.register_autograd(_turn_back, setup_context=_save_tables)

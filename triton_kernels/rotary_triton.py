"""The op that turns keys where they are written: one launch each way. flash_attention's kernels turn queries by themselves, see `rotate_tile`.

Legend: B batch, T tokens, H heads, K head width, P half of the rotated channels, M tokens of a block, W channels that do not turn.
"""

# The launch's constexpr parameters are plain values to the caller.
# pyright: reportArgumentType=false
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.flash_attention_blocks import load_block, store_block
from triton_kernels.flash_attention_triton import padded, rows
from triton_kernels.registration import has_work, kernel_op

# Pairs of channels of a program.
BLOCK_ELEMENTS = 1024


@triton.jit
def rotate_kernel(
    x, cos, sin, y, T, H, n_blocks,
    WIDTH: tl.constexpr, HALF: tl.constexpr, BACK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """y [B, T, H, K]: a program turns a block of tokens of one head, and copies the channels that do not turn."""
    program = tl.program_id(0)
    head, t, batch = program % H, program // H % n_blocks * BLOCK_M, program // H // n_blocks
    inside_M = t + tl.arange(0, BLOCK_M) < T
    first_MP = load_block(x, batch, t, head, inside_M, HALF, BLOCK_P).to(tl.float32)
    second_MP = load_block(x, batch, t, head, inside_M, HALF, BLOCK_P, column=HALF).to(tl.float32)
    cos_MP = load_block(cos, 0, t, 0, inside_M, HALF, BLOCK_P)
    sin_MP = load_block(sin, 0, t, 0, inside_M, HALF, BLOCK_P) * (-1 if BACK else 1)
    store_block(y, batch, t, head, first_MP * cos_MP - second_MP * sin_MP, inside_M, HALF)
    store_block(y, batch, t, head, second_MP * cos_MP + first_MP * sin_MP, inside_M, HALF, column=HALF)
    if 2 * HALF < WIDTH:
        rest_MW = load_block(x, batch, t, head, inside_M, WIDTH - 2 * HALF, BLOCK_W, column=2 * HALF)
        store_block(y, batch, t, head, rest_MW, inside_M, WIDTH - 2 * HALF, column=2 * HALF)


@kernel_op("rotate")
def rotate_op(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """x [B, T, H, K] turned by the tables [T, P], or turned back."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if has_work(y):
        (B, T, H, K), half = x.shape, cos.shape[1]
        x = x if x.stride(-1) == 1 else x.contiguous()
        tables = [rows(table.float().contiguous()[None, :, None]) for table in (cos, sin)]
        constants = {"WIDTH": K, "HALF": half, "BACK": back, "BLOCK_P": padded(half), "BLOCK_W": padded(K - 2 * half)}
        block_m = max(1, BLOCK_ELEMENTS // padded(half))
        n_blocks = -(-T // block_m)
        rotate_kernel[(B * n_blocks * H,)](rows(x), *tables, rows(y), T, H, n_blocks, BLOCK_M=block_m, **constants)
    return y


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, cos, sin, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return rotate_op(dy, *ctx.saved_tensors, not ctx.back), None, None, None


rotate_op.register_autograd(_backward, setup_context=_save)

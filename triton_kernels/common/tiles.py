"""Blocks of rows as the kernels of many ops read and write them. Legend: R rows and W channels of a tile."""

# pyright: reportArgumentType=false
from collections import namedtuple

import triton
import triton.language as tl
from torch import Tensor

MAX_ROW_STRIDE = 2**23
# Where a [B, T, H, width] tensor lies: its pointer and the strides of its first three axes; channels lie side by side.
Rows = namedtuple("Rows", "ptr batch row head")


def rows(x: Tensor | None) -> Rows | None:
    """A [B, T, H, width] tensor as the kernels take it."""
    return None if x is None else Rows(x, *x.stride()[:3])


def dense_channels(x: Tensor) -> Tensor:
    """Any layout whose channels lie side by side is read where it is; offsets within a block of rows are int32."""
    return x if x.stride(-1) == 1 and x.stride(1) < MAX_ROW_STRIDE else x.contiguous()


@triton.jit
def wide(x):
    """x as an int64 scalar, so that a row times a stride cannot overflow. Also for the Python integers that the
    interpreter's loops give."""
    return tl.full((), 0, tl.int64) + x


@triton.jit
def product(a, b, accumulator):
    """accumulator + a @ b; fp32 operands keep all their bits instead of becoming tf32."""
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def block_pointers(x, batch, row, head, column, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """[ROWS, BLOCK] from one row of one head on, as int32 offsets from one scalar: 64-bit tiles would take the
    registers that products need."""
    base = x.ptr + wide(batch) * x.batch + wide(row) * x.row + wide(head) * x.head + column
    return base + (tl.arange(0, ROWS)[:, None] * x.row + tl.arange(0, BLOCK)[None, :])


@triton.jit
def load_block(
    x, batch, row, head, inside_R, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHECK_ROWS: tl.constexpr = True, column=0
):
    """A tile with zeros outside `inside` and past WIDTH; a mask that can hide nothing is left out of the program
    altogether."""
    pointers_RW = block_pointers(x, batch, row, head, column, inside_R.shape[0], BLOCK)
    inside_W = tl.arange(0, BLOCK) < WIDTH
    if CHECK_ROWS and BLOCK > WIDTH:
        return tl.load(pointers_RW, mask=inside_R[:, None] & inside_W[None, :], other=0.0)
    elif CHECK_ROWS:
        return tl.load(pointers_RW, mask=inside_R[:, None], other=0.0)
    elif BLOCK > WIDTH:
        return tl.load(pointers_RW, mask=inside_W[None, :], other=0.0)
    else:
        return tl.load(pointers_RW)


@triton.jit
def store_block(x, batch, row, head, y_RW, inside_R, WIDTH: tl.constexpr, column=0):
    """Stores a tile in the dtype found there, but for what lies outside `inside` or past WIDTH."""
    pointers_RW = block_pointers(x, batch, row, head, column, y_RW.shape[0], y_RW.shape[1])
    mask_RW = inside_R[:, None] & (tl.arange(0, y_RW.shape[1]) < WIDTH)[None, :]
    tl.store(pointers_RW, y_RW.to(x.ptr.dtype.element_ty), mask=mask_RW)

"""Kernels of causal_conv1d: one launch forward; backward one, and one sum over its programs' shares of the weight's and
the bias' gradients.

Both only move memory (W multiply-adds per element), so a program takes a block of rows times a block of channels and
reads its W shifted views straight from x: the overlap stays in L1. The backward keeps nothing but x, so z is computed
again.

Legend: B batch, T tokens, D channels, W convolution width, S sequences, M rows of a block (of all B x T), C channels of
a block, P blocks of rows.
"""

# Jitted helpers that return tuples are beyond a type checker.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAttributeAccessIssue=false
from collections import namedtuple

import triton
import triton.language as tl


@triton.jit
def place_rows(block, cu_seqlens, n_rows, T, n_sequences, BLOCK_M: tl.constexpr):
    """Of a block: its rows, their sequence, its first row and the row past its end. The blocks after the last one are
    the rows before the first of a sequence each, where its tail is. A row's sequence is found by counting the offsets
    at or below it."""
    row_M = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    sequence_M = tl.zeros_like(row_M) + (block - tl.cdiv(n_rows, BLOCK_M))
    if block * BLOCK_M < n_rows:
        existing_M = tl.minimum(row_M, n_rows - 1)
        if cu_seqlens is None:
            sequence_M = existing_M // T
        else:
            sequence_M = tl.zeros_like(row_M) - 1
            for n in range(0, n_sequences):
                sequence_M += (tl.load(cu_seqlens + n) <= existing_M).to(tl.int64)
    if cu_seqlens is None:
        first_M, past_M = sequence_M * T, sequence_M * T + T
    else:
        first_M, past_M = tl.load(cu_seqlens + sequence_M), tl.load(cu_seqlens + sequence_M + 1)
    if block * BLOCK_M >= n_rows:
        row_M = first_M - BLOCK_M + tl.arange(0, BLOCK_M)
    return row_M, sequence_M, first_M, past_M


@triton.jit
def input_rows(x, tail, row_M, sequence_M, first_M, channel_C, mask_MC, D, W: tl.constexpr):
    """x at the rows, in fp32; before a sequence's first row that is an entry of its tail [S, W - 1, D]."""
    inside_M1 = (row_M >= first_M)[:, None]
    x_MC = tl.load(x + row_M[:, None] * D + channel_C[None, :], mask=mask_MC & inside_M1, other=0.0)
    offset_MC = (sequence_M * (W - 1) + row_M - first_M + W - 1)[:, None] * D + channel_C[None, :]
    return x_MC.to(tl.float32) + tl.load(tail + offset_MC, mask=mask_MC & (inside_M1 == 0), other=0.0).to(tl.float32)


@triton.jit
def convolve(inputs, row_M, sequence_M, first_M, channel_C, mask_MC, D, W: tl.constexpr):
    """z [M, C] in fp32, before the activation; inputs are (x, weight, bias, tail)."""
    x, weight, bias, tail = inputs
    z_MC = tl.zeros(mask_MC.shape, tl.float32)
    for back in tl.static_range(W):
        weight_C = tl.load(weight + channel_C * W + W - 1 - back, mask=channel_C < D, other=0.0).to(tl.float32)
        z_MC += weight_C[None, :] * input_rows(x, tail, row_M - back, sequence_M, first_M, channel_C, mask_MC, D, W)
    if bias is not None:
        z_MC += tl.load(bias + channel_C, mask=channel_C < D, other=0.0).to(tl.float32)[None, :]
    return z_MC


# What both passes read, what the backward writes, and how many rows there are in all, of a sequence, and so on.
Inputs = namedtuple("Inputs", "x weight bias tail")
Gradients = namedtuple("Gradients", "dx dtail partial")
Sizes = namedtuple("Sizes", "n_rows T D n_sequences")


@triton.jit
def convolution_forward_kernel(
    inputs,
    cu_seqlens,
    y,
    sizes,
    W: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y [B, T, D]."""
    n_rows, T, D, n_sequences = sizes
    row_M, sequence_M, first_M, past_M = place_rows(tl.program_id(0), cu_seqlens, n_rows, T, n_sequences, BLOCK_M)
    channel_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_MC = (row_M < past_M)[:, None] & (channel_C < D)[None, :]
    z_MC = convolve(inputs, row_M, sequence_M, first_M, channel_C, mask_MC, D, W)
    y_MC = z_MC * tl.sigmoid(z_MC) if SILU else z_MC
    tl.store(y + row_M[:, None] * D + channel_C[None, :], y_MC.to(y.dtype.element_ty), mask=mask_MC)


@triton.jit
def convolution_backward_kernel(
    dy,
    inputs,
    cu_seqlens,
    gradients,
    sizes,
    W: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx [B, T, D], or dtail [S, W - 1, D], from the W outputs that each input reached, and this block's share of
    dweight and dbias, partial [P, W + 1, D] in fp32."""
    x, weight, _, tail = inputs
    dx, dtail, partial = gradients
    n_rows, T, D, n_sequences = sizes
    block = tl.program_id(0)
    row_M, sequence_M, first_M, past_M = place_rows(block, cu_seqlens, n_rows, T, n_sequences, BLOCK_M)
    channel_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channels = channel_C < D
    dz_MC, dx_MC = tl.zeros([BLOCK_M, BLOCK_C], tl.float32), tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    # A loop and not W copies: unrolled, all the outputs that an input reaches would be in registers at once. Last come
    # those of the rows themselves.
    for w in range(0, W):
        output_M = row_M + W - 1 - w
        reached_MC = ((output_M >= first_M) & (output_M < past_M))[:, None] & channels[None, :]
        dz_MC = tl.load(dy + output_M[:, None] * D + channel_C[None, :], mask=reached_MC, other=0.0).to(tl.float32)
        if SILU:
            z_MC = convolve(inputs, output_M, sequence_M, first_M, channel_C, reached_MC, D, W)
            sigmoid_MC = tl.sigmoid(z_MC)
            dz_MC *= sigmoid_MC * (1 + z_MC * (1 - sigmoid_MC))
        dx_MC += dz_MC * tl.load(weight + channel_C * W + w, mask=channels, other=0.0).to(tl.float32)[None, :]
    if block * BLOCK_M >= n_rows:
        entry_M = row_M - first_M + W - 1
        offset_MC = (sequence_M * (W - 1) + entry_M)[:, None] * D + channel_C[None, :]
        tl.store(dtail + offset_MC, dx_MC.to(dtail.dtype.element_ty), mask=(entry_M >= 0)[:, None] & channels[None, :])
    else:
        mask_MC = (row_M < past_M)[:, None] & channels[None, :]
        tl.store(dx + row_M[:, None] * D + channel_C[None, :], dx_MC.to(dx.dtype.element_ty), mask=mask_MC)
        partial_C = partial + block.to(tl.int64) * (W + 1) * D + channel_C
        for back in tl.static_range(W):
            x_MC = input_rows(x, tail, row_M - back, sequence_M, first_M, channel_C, mask_MC, D, W)
            tl.store(partial_C + (W - 1 - back) * D, tl.sum(dz_MC * x_MC, 0), mask=channels)
        tl.store(partial_C + W * D, tl.sum(dz_MC, 0), mask=channels)

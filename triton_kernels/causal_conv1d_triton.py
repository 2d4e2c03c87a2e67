"""causal_conv1d on Triton: one launch forward; backward one for the inputs and partial sums, and one sum over those.

Both passes only move memory (W multiply-adds per element), so a program takes a block of tokens times a block of channels and reads its W
shifted views straight from x: the overlap stays in L1. A token's sequence is found by counting the offsets at or below it.

Legend: B batch, T tokens, D channels, W convolution width, W1 = W - 1, S sequences, M tokens of a block, C channels of a block, P token blocks.
"""

# Jitted helpers that return tuples, and constants given as Python values, are beyond a type checker.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.causal_conv1d_configurations import BACKWARD_BLOCK_M, BLOCK_C, BLOCK_M


@triton.jit
def sequence_bounds(token_M, cu_seqlens_ptr, n_sequences, batch, T, PACKED: tl.constexpr):
    """(sequence, its first token, the token past its end) of each token of batch row `batch`, as int64."""
    zero_M = tl.zeros_like(token_M).to(tl.int64)
    if PACKED:
        sequence_M = zero_M - 1
        for n in range(0, n_sequences):
            sequence_M += (tl.load(cu_seqlens_ptr + n) <= token_M).to(tl.int64)
        return sequence_M, tl.load(cu_seqlens_ptr + sequence_M), tl.load(cu_seqlens_ptr + sequence_M + 1)
    else:
        return zero_M + batch, zero_M, zero_M + T


@triton.jit
def shifted_inputs(x_ptr, tail_ptr, row_base, token_M, start_M, sequence_M, channel_C, mask_MC, D, BACK: tl.constexpr, W: tl.constexpr):
    """x of the token BACK before each token, in fp32; before a sequence's first token that is an entry of its tail [S, D, W - 1]."""
    inside_M = token_M - BACK >= start_M
    from_x_MC = tl.load(x_ptr + (row_base + token_M - BACK)[:, None] * D + channel_C[None, :], mask=mask_MC & inside_M[:, None], other=0.0)
    entry_M = token_M - BACK - start_M + W - 1
    tail_offset_MC = (sequence_M[:, None] * D + channel_C[None, :]) * (W - 1) + entry_M[:, None]
    from_tail_MC = tl.load(tail_ptr + tail_offset_MC, mask=mask_MC & (entry_M < W - 1)[:, None], other=0.0)
    return from_x_MC.to(tl.float32) + from_tail_MC.to(tl.float32)


@triton.jit
def convolve(x_ptr, tail_ptr, weight_ptr, bias_ptr, row_base, token_M, start_M, sequence_M, channel_C, mask_MC, D, W: tl.constexpr):
    """z [M, C] in fp32, before the activation."""
    channels = channel_C < D
    z_MC = tl.zeros(mask_MC.shape, tl.float32)
    for back in tl.static_range(W):
        weight_C = tl.load(weight_ptr + channel_C * W + W - 1 - back, mask=channels, other=0.0).to(tl.float32)
        z_MC += weight_C[None, :] * shifted_inputs(x_ptr, tail_ptr, row_base, token_M, start_M, sequence_M, channel_C, mask_MC, D, back, W)
    if bias_ptr is not None:
        z_MC += tl.load(bias_ptr + channel_C, mask=channels, other=0.0).to(tl.float32)[None, :]
    return z_MC


@triton.jit
def convolution_forward_kernel(
    x_ptr, tail_ptr, weight_ptr, bias_ptr, cu_seqlens_ptr, y_ptr, T, D, n_sequences, n_blocks,
    W: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y [B, T, D]."""
    block, batch = tl.program_id(0) % n_blocks, tl.program_id(0) // n_blocks
    token_M = tl.full([BLOCK_M], 0, tl.int64) + block * BLOCK_M + tl.arange(0, BLOCK_M)
    channel_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_MC = (token_M < T)[:, None] & (channel_C < D)[None, :]
    sequence_M, start_M, _ = sequence_bounds(tl.minimum(token_M, T - 1), cu_seqlens_ptr, n_sequences, batch, T, PACKED)
    row_base = tl.full((), 0, tl.int64) + batch * T
    z_MC = convolve(x_ptr, tail_ptr, weight_ptr, bias_ptr, row_base, token_M, start_M, sequence_M, channel_C, mask_MC, D, W)
    y_MC = z_MC * tl.sigmoid(z_MC) if SILU else z_MC
    tl.store(y_ptr + (row_base + token_M)[:, None] * D + channel_C[None, :], y_MC.to(y_ptr.dtype.element_ty), mask=mask_MC)


@triton.jit
def gradient_before_activation(
    dy_ptr, x_ptr, tail_ptr, weight_ptr, bias_ptr, row_base, token_M, start_M, sequence_M, channel_C, mask_MC, D, W: tl.constexpr, SILU: tl.constexpr
):
    """dz [M, C] in fp32, zero outside the mask; z is computed again."""
    dz_MC = tl.load(dy_ptr + (row_base + token_M)[:, None] * D + channel_C[None, :], mask=mask_MC, other=0.0).to(tl.float32)
    if SILU:
        z_MC = convolve(x_ptr, tail_ptr, weight_ptr, bias_ptr, row_base, token_M, start_M, sequence_M, channel_C, mask_MC, D, W)
        sigmoid_MC = tl.sigmoid(z_MC)
        dz_MC *= sigmoid_MC * (1 + z_MC * (1 - sigmoid_MC))
    return dz_MC


@triton.jit
def convolution_backward_kernel(
    dy_ptr, x_ptr, tail_ptr, weight_ptr, bias_ptr, cu_seqlens_ptr, dx_ptr, partial_ptr, T, D, n_sequences, n_blocks,
    W: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx [B, T, D] from the W outputs that each input reached, and this block's share of dweight and dbias, partial [P, W + 1, D] in fp32."""
    block, batch = tl.program_id(0) % n_blocks, tl.program_id(0) // n_blocks
    token_M = tl.full([BLOCK_M], 0, tl.int64) + block * BLOCK_M + tl.arange(0, BLOCK_M)
    channel_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channels = channel_C < D
    mask_MC = (token_M < T)[:, None] & channels[None, :]
    sequence_M, start_M, past_M = sequence_bounds(tl.minimum(token_M, T - 1), cu_seqlens_ptr, n_sequences, batch, T, PACKED)
    row_base = tl.full((), 0, tl.int64) + batch * T
    dz_MC = gradient_before_activation(
        dy_ptr, x_ptr, tail_ptr, weight_ptr, bias_ptr, row_base, token_M, start_M, sequence_M, channel_C, mask_MC, D, W, SILU
    )
    partial_C = partial_ptr + (tl.full((), 0, tl.int64) + tl.program_id(0)) * (W + 1) * D + channel_C
    for back in tl.static_range(W):
        x_MC = shifted_inputs(x_ptr, tail_ptr, row_base, token_M, start_M, sequence_M, channel_C, mask_MC, D, back, W)
        tl.store(partial_C + (W - 1 - back) * D, tl.sum(dz_MC * x_MC, 0), mask=channels)
    tl.store(partial_C + W * D, tl.sum(dz_MC, 0), mask=channels)
    dx_MC = dz_MC * tl.load(weight_ptr + channel_C * W + W - 1, mask=channels, other=0.0).to(tl.float32)[None, :]
    # A loop and not W copies: unrolled, all the outputs that an input reaches would be in registers at once.
    for ahead in range(1, W):
        reached_MC = mask_MC & (token_M + ahead < past_M)[:, None]
        dz_MC = gradient_before_activation(
            dy_ptr, x_ptr, tail_ptr, weight_ptr, bias_ptr, row_base, token_M + ahead, start_M, sequence_M, channel_C, reached_MC, D, W, SILU
        )
        dx_MC += dz_MC * tl.load(weight_ptr + channel_C * W + W - 1 - ahead, mask=channels, other=0.0).to(tl.float32)[None, :]
    tl.store(dx_ptr + (row_base + token_M)[:, None] * D + channel_C[None, :], dx_MC.to(dx_ptr.dtype.element_ty), mask=mask_MC)


@triton.jit
def convolution_tail_kernel(
    dy_ptr, x_ptr, tail_ptr, weight_ptr, bias_ptr, cu_seqlens_ptr, dtail_ptr, T, D,
    W: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dtail [S, D, W - 1]: entry w reaches the first w + 1 outputs of its sequence."""
    sequence = tl.program_id(0)
    channel_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channels = channel_C < D
    row_base = tl.full((), 0, tl.int64) + (0 if PACKED else sequence * T)
    start = tl.load(cu_seqlens_ptr + sequence) if PACKED else tl.full((), 0, tl.int64)
    past = tl.load(cu_seqlens_ptr + sequence + 1) if PACKED else tl.full((), 0, tl.int64) + T
    sequence_M = tl.full([1], 0, tl.int64) + sequence
    start_M = tl.full([1], 0, tl.int64) + start
    for entry in tl.static_range(W - 1):
        dtail_C = tl.zeros([BLOCK_C], tl.float32)
        for step in tl.static_range(entry + 1):
            reached_MC = ((start_M + step) < past)[:, None] & channels[None, :]
            dz_MC = gradient_before_activation(
                dy_ptr, x_ptr, tail_ptr, weight_ptr, bias_ptr, row_base, start_M + step, start_M, sequence_M, channel_C, reached_MC, D, W, SILU
            )
            dtail_C += tl.sum(dz_MC, 0) * tl.load(weight_ptr + channel_C * W + entry - step, mask=channels, other=0.0).to(tl.float32)
        offset_C = (sequence_M * D + channel_C) * (W - 1) + entry
        tl.store(dtail_ptr + offset_C, dtail_C.to(dtail_ptr.dtype.element_ty), mask=channels)


def causal_conv1d_triton(
    x_BTD: Tensor, weight_DW: Tensor, bias_D: Tensor | None, silu: bool, initial_tail_SDW: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(y_BTD, tail_SDW1); the arguments are those of `causal_conv1d`, already checked."""
    y_BTD = torch.ops.hybrid_attention.causal_conv1d(x_BTD, weight_DW, bias_D, initial_tail_SDW, cu_seqlens, silu)
    return y_BTD, last_inputs(x_BTD, initial_tail_SDW, cu_seqlens)


def last_inputs(x_BTD: Tensor, initial_tail_SDW: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The last W - 1 inputs of each sequence, its tail counted as earlier inputs; a few rows gathered by torch, nothing read by the host."""
    (B, T, D), W1 = x_BTD.shape, initial_tail_SDW.shape[2]
    if T == 0:
        return initial_tail_SDW.clone()
    if cu_seqlens is None and T >= W1:
        return x_BTD[:, T - W1 :].transpose(1, 2)
    offsets = torch.arange(0, B * T + 1, T, device=x_BTD.device) if cu_seqlens is None else cu_seqlens
    row_SW = offsets[1:, None] - W1 + torch.arange(W1, device=x_BTD.device)
    entry_SW = row_SW - offsets[:-1, None] + W1
    from_x_SDW = x_BTD.reshape(B * T, D)[row_SW.clamp(min=0)].transpose(1, 2)
    from_tail_SDW = initial_tail_SDW.gather(2, entry_SW.clamp(0, W1 - 1)[:, None].expand(-1, D, -1))
    return torch.where((entry_SW >= W1)[:, None], from_x_SDW, from_tail_SDW)


@torch.library.custom_op("hybrid_attention::causal_conv1d", mutates_args=())
def forward_op(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, cu_seqlens: Tensor | None, silu: bool) -> Tensor:
    B, T, D = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel() > 0:
        x, weight, tail = x.contiguous(), weight.contiguous(), tail.contiguous()
        n_blocks, sizes, constants = _launch(T, D, weight, cu_seqlens, silu, BLOCK_M)
        grid = (n_blocks * B, -(-D // BLOCK_C))
        convolution_forward_kernel[grid](x, tail, weight, bias, cu_seqlens, y, *sizes, BLOCK_M=BLOCK_M, **constants)
    return y


@forward_op.register_fake
def _(x, weight, bias, tail, cu_seqlens, silu):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("hybrid_attention::causal_conv1d_backward", mutates_args=())
def backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias (fp32 [D]), dtail)."""
    (B, T, D), W = x.shape, weight.shape[1]
    dx, dtail = torch.empty_like(x, memory_format=torch.contiguous_format), torch.zeros_like(tail, memory_format=torch.contiguous_format)
    if dx.numel() == 0:
        return dx, torch.zeros_like(weight), weight.new_zeros(D, dtype=torch.float32), dtail
    dy, x, weight, tail = dy.contiguous(), x.contiguous(), weight.contiguous(), tail.contiguous()
    n_blocks, sizes, constants = _launch(T, D, weight, cu_seqlens, silu, BACKWARD_BLOCK_M)
    partial_PWD = x.new_empty(n_blocks * B, W + 1, D, dtype=torch.float32)
    channel_blocks = -(-D // BLOCK_C)
    inputs = (dy, x, tail, weight, bias, cu_seqlens)
    convolution_backward_kernel[(n_blocks * B, channel_blocks)](*inputs, dx, partial_PWD, *sizes, BLOCK_M=BACKWARD_BLOCK_M, **constants)
    convolution_tail_kernel[(tail.shape[0], channel_blocks)](*inputs, dtail, T, D, **constants)
    sums_WD = partial_PWD.sum(0)
    return dx, sums_WD[:W].T.to(weight.dtype).contiguous(), sums_WD[W].clone(), dtail


@backward_op.register_fake
def _(dy, x, weight, bias, tail, cu_seqlens, silu):
    dx, dtail = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, tail))
    return dx, torch.empty_like(weight, memory_format=torch.contiguous_format), weight.new_empty(x.shape[2], dtype=torch.float32), dtail


def _launch(T: int, D: int, weight: Tensor, cu_seqlens: Tensor | None, silu: bool, block_m: int) -> tuple[int, tuple[int, ...], dict[str, int]]:
    """(blocks of a batch row, the integer arguments, the constants)."""
    n_blocks = -(-T // block_m)
    n_sequences = 0 if cu_seqlens is None else cu_seqlens.numel() - 1
    constants = {"W": weight.shape[1], "SILU": silu, "PACKED": cu_seqlens is not None, "BLOCK_C": BLOCK_C}
    return n_blocks, (T, D, n_sequences, n_blocks), constants


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy: Tensor):
    x, weight, bias, tail, cu_seqlens = ctx.saved_tensors
    dx, dweight, dbias, dtail = torch.ops.hybrid_attention.causal_conv1d_backward(dy, x, weight, bias, tail, cu_seqlens, ctx.silu)
    return dx, dweight, None if bias is None else dbias.to(bias.dtype), dtail, None, None


forward_op.register_autograd(_backward, setup_context=_save)

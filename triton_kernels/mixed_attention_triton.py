"""mixed_attention on Triton: softmax heads and linear heads of one layer in one forward launch, whose programs take either role.

The scan of a linear head is a chain of chunks that no second program can shorten, and there are few of them: alone they leave most processors idle
for their whole length. Beside the softmax heads' blocks of queries, which are many and independent, they cost their arithmetic only. So the scans
come first, being as long as the longest block of queries, then the blocks, the longest first. The sequence is not cut into segments here.

Legend: B batch, T tokens, S keys, H query heads, G key/value heads, J linear heads, K key width, V value width, N sequences.
"""

# The launches' constexpr parameters are plain values to the caller, and a jitted helper that returns a tuple is beyond a type checker.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# fmt: off
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels import decayed_linear_attention_kernels, flash_attention_forward
from triton_kernels.decayed_linear_attention_triton import addressable, block_of, token_strides
from triton_kernels.decayed_linear_attention_triton import backward_op as linear_backward
from triton_kernels.flash_attention_blocks import wide
from triton_kernels.flash_attention_triton import LOG2E, AttentionCall, sink_gradient
from triton_kernels.flash_attention_triton import backward_op as softmax_backward
from triton_kernels.flash_decode_configurations import SPLIT, TARGET_PROGRAMS
from triton_kernels.flash_decode_triton import reduce_kernel, split_kernel
from triton_kernels.linear_decode_triton import lightning_head, tiles
from triton_kernels.mixed_attention_configurations import DECODE_BLOCK, FORWARD

softmax_block = flash_attention_forward.forward_kernel
linear_scan = decayed_linear_attention_kernels.forward_kernel


@triton.jit
def mixed_forward_kernel(
    q, k, v, sinks, o, lse, linear_q, linear_k, linear_v, gate, linear_o, initial, final, cu_seqlens,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_s, k_stride_g, v_stride_b, v_stride_s, v_stride_g,
    linear_q_stride, linear_q_head, linear_k_stride, linear_k_head, linear_v_stride, linear_v_head, gate_stride, gate_head,
    T, S, H, J, n_sequences, n_blocks, n_head_rows, n_scans, window, scale_log2, linear_scale,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, LINEAR_K: tl.constexpr, LINEAR_V: tl.constexpr, BLOCK_IN: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_INITIAL: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):
    """o and lse of the softmax heads, o and the final state of the linear heads."""
    if tl.program_id(0) < n_scans:
        SLICES: tl.constexpr = (LINEAR_V + BLOCK - 1) // BLOCK
        linear_scan(
            linear_q, linear_k, linear_v, gate, linear_o, initial, final, final, final, cu_seqlens, wide(T), J, n_head_rows, 1, SLICES,
            linear_q_stride, linear_q_head, linear_k_stride, linear_k_head, linear_v_stride, linear_v_head, gate_stride, gate_head, linear_scale,
            LINEAR_K, LINEAR_V, BLOCK_IN, BLOCK, CHUNK, True, HAS_GATE, HAS_INITIAL, PACKED, PRECISION,
        )
    else:
        softmax_block(
            q, k, v, cu_seqlens, None, None, sinks, o, lse,
            q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_s, k_stride_g, v_stride_b, v_stride_s, v_stride_g,
            T, S, H, n_sequences, n_blocks, window, 1.0, scale_log2,
            KEY_WIDTH, VALUE_WIDTH, BLOCK_K, BLOCK_V, GROUP, 0, CAUSAL, WINDOW, BLOCK_M, BLOCK_N, n_scans,
        )


@triton.jit
def mixed_decode_kernel(
    q, k, v, lengths, partial, statistics, linear_qkv, log_decay, state, linear_o,
    k_stride_b, k_stride_s, k_stride_g, v_stride_b, v_stride_s, v_stride_g, linear_stride, S, G, J, n_splits, n_linear, scale_log2,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr, BLOCK_R: tl.constexpr,
    LINEAR_K: tl.constexpr, LINEAR_V: tl.constexpr, LINEAR_BLOCK_K: tl.constexpr, LINEAR_BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Slices of the linear heads' states, then splits of the softmax heads' caches."""
    if tl.program_id(0) < n_linear:
        lightning_head(
            tl.program_id(0), linear_qkv, log_decay, state, linear_o, linear_stride, J, LINEAR_K, LINEAR_V, LINEAR_BLOCK_K, LINEAR_BLOCK_V
        )
    else:
        split_kernel(
            q, k, v, None, None, lengths, None, partial, statistics, k_stride_b, k_stride_s, k_stride_g, v_stride_b, v_stride_s, v_stride_g,
            S, G, n_splits, 0, 0, scale_log2, KEY_WIDTH, VALUE_WIDTH, BLOCK_K, BLOCK_V, GROUP, BLOCK_R, 0, False, BLOCK_N, n_linear,
        )


@torch.library.custom_op("hybrid_attention::mixed_attention", mutates_args=())
def forward_op(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, linear_q: Tensor, linear_k: Tensor, linear_v: Tensor, log_decay: Tensor | None,
    initial: Tensor | None, cu_seqlens: Tensor | None, window: int | None, scale: float, linear_scale: float, chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(o, lse [B, H, T] in log2, linear_o, final); log_decay [B, T, J] or None; the arguments are those of `mixed_attention`, already checked."""
    outputs = forward_fake(q, k, v, sinks, linear_q, linear_k, linear_v, log_decay, initial, cu_seqlens, window, scale, linear_scale, chunk_size)
    o, lse, linear_o, final = outputs
    call = AttentionCall(q, k, v, cu_seqlens, True, window, scale)
    linear = [addressable(x) for x in (linear_q, linear_k, linear_v)]
    gate = None if log_decay is None else addressable(log_decay)
    (B, T, H), S, (J, K), V = q.shape[:3], k.shape[1], linear_q.shape[2:], linear_v.shape[3]
    n_sequences = 0 if cu_seqlens is None else cu_seqlens.numel() - 1
    n_head_rows = final.shape[0] * J
    options = FORWARD[q.dtype == torch.float32].options(max(q.shape[3], v.shape[3], K, V))[0]
    blocks = {**options.blocks, "CHUNK": min(chunk_size, options.blocks["CHUNK"])}
    # Packed sequences may need one more block each, see `locate`.
    n_blocks = T // blocks["BLOCK_M"] + n_sequences if n_sequences else -(-T // blocks["BLOCK_M"])
    n_scans = n_head_rows * -(-V // blocks["BLOCK"])
    softmax_strides = [x.stride(axis) for x in call.qkv for axis in range(3)]
    linear_strides = [stride for x in (*linear, gate) for stride in token_strides(x)]
    if n_scans + o.numel() > 0:
        mixed_forward_kernel[(n_scans + n_blocks * H * B,)](
            *call.qkv, sinks, o, lse, *linear, gate, linear_o, initial, final, cu_seqlens, *softmax_strides, *linear_strides,
            T, S, H, J, n_sequences, n_blocks, n_head_rows, n_scans, call.window, scale * LOG2E, linear_scale,
            **call.constants, LINEAR_K=K, LINEAR_V=V, BLOCK_IN=block_of(K), HAS_GATE=gate is not None, HAS_INITIAL=initial is not None,
            PACKED=cu_seqlens is not None, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            **blocks, num_warps=options.num_warps, num_stages=options.num_stages,
        )
    return outputs


@forward_op.register_fake
def forward_fake(q, k, v, sinks, linear_q, linear_k, linear_v, log_decay, initial, cu_seqlens, window, scale, linear_scale, chunk_size):
    B, T, H = q.shape[:3]
    n_states = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = q.new_empty(n_states, linear_q.shape[2], linear_q.shape[3], linear_v.shape[3], dtype=torch.float32)
    return q.new_empty(B, T, H, v.shape[3]), q.new_empty(B, H, T, dtype=torch.float32), linear_v.new_empty(linear_v.shape), final


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.window, ctx.scale, ctx.linear_scale, ctx.chunk_size = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, do: Tensor | None, _: None, dlinear_o: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    """The launches of the two ops' own backwards."""
    q, k, v, sinks, linear_q, linear_k, linear_v, log_decay, initial, cu_seqlens, o, lse, linear_o, final = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    dq, dk, dv, delta_BHT = softmax_backward(do, o, lse, q, k, v, cu_seqlens, None, None, True, ctx.window, ctx.scale)
    dsinks = None if sinks is None else sink_gradient(sinks, lse, delta_BHT)
    gate_gradient = log_decay is not None and ctx.needs_input_grad[7]
    dlinear_o = torch.zeros_like(linear_o) if dlinear_o is None else dlinear_o
    linear = (linear_q, linear_k, linear_v, log_decay, initial, final, cu_seqlens, ctx.linear_scale, ctx.chunk_size, gate_gradient)
    *dlinear, dgate, dinitial = linear_backward(dlinear_o, dfinal, *linear)
    gradients = (dq, dk, dv, dsinks, *dlinear, dgate if gate_gradient else None, dinitial if initial is not None else None)
    return (*gradients, None, None, None, None, None)


forward_op.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("hybrid_attention::mixed_decode", mutates_args=("state",))
def decode_op(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, sinks: Tensor | None, linear_qkv: Tensor, log_decay: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(o [B, H, V], linear_o [B, J, V]); the arguments are those of `mixed_decode`, already checked."""
    o, linear_o = decode_fake(q, k, v, lengths, sinks, linear_qkv, log_decay, state, scale)
    q, k, v, linear_qkv = (x if x.stride(-1) == 1 else x.contiguous() for x in (q.flatten(1), k, v, linear_qkv))
    q = q.contiguous()
    (B, S, G, K), (H, V), J = k.shape, o.shape[1:], state.shape[1]
    options = SPLIT.options(max(K, V))[0]
    linear = tiles(*state.shape[2:], DECODE_BLOCK)
    n_linear = B * J * -(-linear["V"] // linear["BLOCK_V"])
    # As in flash_decode: splits by the capacity of the cache, for the lengths are on the device. The linear heads' programs are short beside them.
    n_splits = max(1, min(-(-TARGET_PROGRAMS // (B * G)), -(-S // options.blocks["BLOCK_N"])))
    partial = q.new_empty(B, H, n_splits, V, dtype=torch.float32)
    statistics = q.new_empty(B, H, n_splits, 2, dtype=torch.float32)
    block_v = max(16, triton.next_power_of_2(V))
    mixed_decode_kernel[(n_linear + B * G * n_splits,)](
        q, k, v, lengths, partial, statistics, linear_qkv, log_decay.contiguous(), state, linear_o,
        *k.stride()[:3], *v.stride()[:3], linear_qkv.stride(0), S, G, J, n_splits, n_linear, scale * LOG2E,
        KEY_WIDTH=K, VALUE_WIDTH=V, BLOCK_K=max(16, triton.next_power_of_2(K)), BLOCK_V=block_v, GROUP=H // G,
        BLOCK_R=max(16, triton.next_power_of_2(H // G)), LINEAR_K=linear["K"], LINEAR_V=linear["V"],
        LINEAR_BLOCK_K=linear["BLOCK_K"], LINEAR_BLOCK_V=linear["BLOCK_V"],
        **options.blocks, num_warps=options.num_warps, num_stages=options.num_stages,
    )
    reduce_kernel[(B * H,)](partial, statistics, sinks, o, H, n_splits, VALUE_WIDTH=V, BLOCK_V=block_v, BLOCK_P=16, num_warps=4)
    return o, linear_o


@decode_op.register_fake
def decode_fake(q, k, v, lengths, sinks, linear_qkv, log_decay, state, scale):
    return q.new_empty(q.shape[0], q.shape[1], v.shape[3]), q.new_empty(state.shape[0], state.shape[1], state.shape[3])

"""mixed_attention on Triton: softmax heads and linear heads of one layer in one launch, forward and decode, whose
programs take either role.

The scan of a linear head is a chain of chunks that no second program can shorten, and there are few of them: alone they
leave most processors idle for their whole length. Beside the softmax heads' blocks of queries, which are many and
independent, they cost their arithmetic only. So the scans come first, being as long as the longest block of queries,
then the blocks, the longest first. The sequence is not cut into segments here.

Legend: B batch, T tokens, S keys, H query heads, G key/value heads, J linear heads, K key width, V value width, N
sequences.
"""

# The launches' constexpr parameters are plain values to the caller.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
from collections import namedtuple
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels import decayed_linear_attention_kernels, flash_attention_kernels
from triton_kernels.attention_configurations import MIXED_FORWARD
from triton_kernels.decayed_linear_attention_triton import backward_op as linear_backward
from triton_kernels.flash_attention_blocks import wide
from triton_kernels.flash_attention_triton import AttentionCall, rows, sink_gradient
from triton_kernels.flash_attention_triton import backward_op as softmax_backward
from triton_kernels.flash_decode_triton import DecodeCall, decode_kernel
from triton_kernels.linear_attention_launch import addressable, block_of, token_strides
from triton_kernels.linear_decode_triton import lightning_head, tiles
from triton_kernels.registration import has_work, kernel_op

# Value columns of a linear head's state that one program of the decode launch takes.
DECODE_BLOCK = 32
softmax_block = flash_attention_kernels.forward_kernel
linear_scan = decayed_linear_attention_kernels.forward_kernel

# Of the linear heads: tensors, their strides by token and head, and what is known beforehand.
Linear = namedtuple("Linear", "q k v gate o initial final cu_seqlens strides T J n_head_rows scale")
LinearForm = namedtuple("LinearForm", "K V BLOCK_IN HAS_GATE HAS_INITIAL PACKED")
StateForm = namedtuple("StateForm", "K V BLOCK_K BLOCK_V")


@triton.jit
def mixed_forward_kernel(
    softmax,
    sinks,
    o,
    lse,
    linear,
    n_scans,
    FORM: tl.constexpr,
    LINEAR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """o and lse of the softmax heads, o and the final state of the linear heads."""
    if tl.program_id(0) < n_scans:
        linear_scan(
            linear.q,
            linear.k,
            linear.v,
            linear.gate,
            linear.o,
            linear.initial,
            linear.final,
            linear.final,
            linear.final,
            linear.cu_seqlens,
            wide(linear.T),
            linear.J,
            linear.n_head_rows,
            1,
            (LINEAR.V + BLOCK - 1) // BLOCK,
            *linear.strides,
            linear.scale,
            LINEAR.K,
            LINEAR.V,
            LINEAR.BLOCK_IN,
            BLOCK,
            CHUNK,
            True,
            LINEAR.HAS_GATE,
            LINEAR.HAS_INITIAL,
            LINEAR.PACKED,
            PRECISION,
        )
    else:
        softmax_block(softmax, sinks, o, lse, FORM, BLOCK_M, BLOCK_N, n_scans)


@triton.jit
def mixed_decode_kernel(softmax, linear, n_linear, FORM: tl.constexpr, LINEAR: tl.constexpr, BLOCK_N: tl.constexpr):
    """Slices of the linear heads' states, then splits of the softmax heads' caches."""
    if tl.program_id(0) < n_linear:
        lightning_head(tl.program_id(0), *linear, LINEAR.K, LINEAR.V, LINEAR.BLOCK_K, LINEAR.BLOCK_V)
    else:
        decode_kernel(softmax, FORM, BLOCK_N, n_linear)


@kernel_op("mixed_attention")
def forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    linear_q: Tensor,
    linear_k: Tensor,
    linear_v: Tensor,
    log_decay: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int | None,
    scale: float,
    linear_scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(o, lse [B, H, T] in log2, linear_o, final); log_decay [B, T, J] or None; the arguments are those of
    `mixed_attention`, already checked."""
    (B, T, H), (J, K), V = q.shape[:3], linear_q.shape[2:], linear_v.shape[3]
    o, lse = q.new_empty(B, T, H, v.shape[3]), q.new_empty(B, H, T, dtype=torch.float32)
    n_states = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    linear_o, final = linear_v.new_empty(linear_v.shape), q.new_empty(n_states, J, K, V, dtype=torch.float32)
    if has_work(final) or has_work(o):
        call = AttentionCall(q, k, v, cu_seqlens, None, None, True, window, scale)
        single = q.dtype == torch.float32
        options = MIXED_FORWARD[single].options(max(q.shape[3], v.shape[3], K, V))[0]
        blocks = {**options.blocks, "CHUNK": min(chunk_size, options.blocks["CHUNK"])}
        n_blocks, softmax = call.arguments(T, blocks["BLOCK_M"])
        n_scans = n_states * J * -(-V // blocks["BLOCK"])
        tensors = [None if x is None else addressable(x) for x in (linear_q, linear_k, linear_v, log_decay)]
        strides = tuple(stride for x in tensors for stride in token_strides(x))
        linear = Linear(*tensors, linear_o, initial, final, cu_seqlens, strides, T, J, n_states * J, linear_scale)
        form = LinearForm(K, V, block_of(K), log_decay is not None, initial is not None, cu_seqlens is not None)
        mixed_forward_kernel[(n_scans + n_blocks * H * B,)](
            softmax,
            sinks,
            rows(o),
            lse,
            linear,
            n_scans,
            FORM=call.form,
            LINEAR=form,
            PRECISION="ieee" if single else "tf32",
            **blocks,
            num_warps=options.num_warps,
            num_stages=options.num_stages,
        )
    return o, lse, linear_o, final


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.window, ctx.scale, ctx.linear_scale, ctx.chunk_size = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, do: Tensor | None, _: None, dlinear_o: Tensor | None, dfinal: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The launches of the two ops' own backwards."""
    q, k, v, sinks, linear_q, linear_k, linear_v, log_decay, initial, cu_seqlens, o, lse, linear_o, final = (
        ctx.saved_tensors
    )
    do = torch.zeros_like(o) if do is None else do
    dq, dk, dv, delta = softmax_backward(do, o, lse, q, k, v, cu_seqlens, None, None, True, ctx.window, ctx.scale)
    gate_gradient = log_decay is not None and ctx.needs_input_grad[7]
    dlinear_o = torch.zeros_like(linear_o) if dlinear_o is None else dlinear_o
    linear = (
        linear_q,
        linear_k,
        linear_v,
        log_decay,
        initial,
        final,
        cu_seqlens,
        ctx.linear_scale,
        ctx.chunk_size,
        gate_gradient,
    )
    *dlinear, dgate, dinitial = linear_backward(dlinear_o, dfinal, *linear)
    linear_gradients = (*dlinear, dgate if gate_gradient else None, dinitial if initial is not None else None)
    return dq, dk, dv, sink_gradient(sinks, lse, delta), *linear_gradients, None, None, None, None, None


forward_op.register_autograd(_backward, setup_context=_save)


@kernel_op("mixed_decode", mutates_args=("state",))
def decode_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    sinks: Tensor | None,
    linear_qkv: Tensor,
    log_decay: Tensor,
    state: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(o [B, H, V], linear_o [B, J, V]); the arguments are those of `mixed_decode`, already checked."""
    o, linear_o = q.new_empty(*q.shape[:2], v.shape[3]), q.new_empty(*state.shape[:2], state.shape[3])
    if has_work(o):
        call = DecodeCall(q, k, v, lengths, scale, None, sinks, None, None, None, o)
        constants = tiles(*state.shape[2:], DECODE_BLOCK)
        form = StateForm(*(constants[name] for name in StateForm._fields))
        # The linear heads' programs are short beside the splits.
        n_linear = state.shape[0] * state.shape[1] * -(-form.V // form.BLOCK_V)
        linear_qkv = linear_qkv if linear_qkv.stride(-1) == 1 else linear_qkv.contiguous()
        linear = (linear_qkv, log_decay.contiguous(), state, linear_o, linear_qkv.stride(0), state.shape[1])
        mixed_decode_kernel[(n_linear + call.programs,)](
            call.arguments, linear, n_linear, LINEAR=form, **call.constants
        )
    return o, linear_o

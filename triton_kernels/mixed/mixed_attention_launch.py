"""mixed_attention and mixed_decode on their Triton kernels.

Legend: B batch, T tokens, S keys, H query heads, G key/value heads, J linear heads, K key width, V value width, N
sequences.
"""

# The launches' constexpr parameters are plain values to the caller, which a type checker cannot know.
# pyright: reportArgumentType=false
from typing import Any

import torch
from torch import Tensor

from triton_kernels.common.registration import has_work, kernel_op
from triton_kernels.common.sizes import cdiv, padded
from triton_kernels.common.tiles import rows
from triton_kernels.linear.decayed_linear_attention_kernels import ForwardStrides, ForwardTensors, ScanForm
from triton_kernels.linear.decayed_linear_attention_launch import backward_op as linear_backward
from triton_kernels.linear.linear_attention_launch import addressable, token_strides
from triton_kernels.linear.linear_decode_launch import lightning_tensors, tiles
from triton_kernels.mixed.launch_tables import MIXED_FORWARD
from triton_kernels.mixed.mixed_attention_kernels import (
    Linear,
    Softmax,
    mixed_decode_kernel,
    mixed_forward_kernel,
)
from triton_kernels.softmax.flash_attention_launch import AttentionCall, Visibility, sink_gradient
from triton_kernels.softmax.flash_attention_launch import backward_op as softmax_backward
from triton_kernels.softmax.flash_decode_launch import Cache, DecodeCall

# Value columns of a linear head's state that one program of the decode launch takes.
DECODE_BLOCK = 32


@kernel_op("mixed_attention", strided="q k v linear_q linear_k linear_v log_decay")
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
        call = AttentionCall(
            q, k, v, cu_seqlens=cu_seqlens, rotary=None, visibility=Visibility(causal=True, window=window, scale=scale)
        )
        single = q.dtype == torch.float32
        options = MIXED_FORWARD[single].options(max(q.shape[3], v.shape[3], K, V))[0]
        blocks = {**options.keywords, "CHUNK": min(chunk_size, options.blocks["CHUNK"])}
        n_blocks, softmax = call.arguments(T, blocks["BLOCK_M"])
        n_scans = n_states * J * cdiv(V, blocks["BLOCK"])
        tensors = [None if x is None else addressable(x) for x in (linear_q, linear_k, linear_v, log_decay)]
        mixed_forward_kernel[(n_scans + n_blocks * H * B,)](
            softmax=Softmax(call=softmax, sinks=sinks, o=rows(o), lse=lse),
            linear=Linear(
                tensors=ForwardTensors(*tensors, o=linear_o, initial=initial, final=final),
                cu_seqlens=cu_seqlens,
                strides=ForwardStrides(*(stride for x in tensors for stride in token_strides(x))),
                T=T,
                J=J,
                n_head_rows=n_states * J,
                scale=linear_scale,
            ),
            n_scans=n_scans,
            FORM=call.form,
            LINEAR=ScanForm(
                K=K,
                V=V,
                BLOCK_IN=padded(K),
                ANCHOR=1,
                HAS_GATE=log_decay is not None,
                HAS_INITIAL=initial is not None,
                PACKED=cu_seqlens is not None,
                PRECISION="ieee" if single else "tf32",
            ),
            **blocks,
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
    dq, dk, dv, delta = softmax_backward(
        do=do,
        o=o,
        lse=lse,
        q=q,
        k=k,
        v=v,
        cu_seqlens=cu_seqlens,
        cos=None,
        sin=None,
        causal=True,
        window=ctx.window,
        scale=ctx.scale,
    )
    gate_gradient = log_decay is not None and ctx.needs_input_grad[7]
    *dlinear, dgate, dinitial = linear_backward(
        do=torch.zeros_like(linear_o) if dlinear_o is None else dlinear_o,
        dfinal=dfinal,
        q=linear_q,
        k=linear_k,
        v=linear_v,
        log_decay=log_decay,
        initial=initial,
        final=final,
        cu_seqlens=cu_seqlens,
        scale=ctx.linear_scale,
        chunk_size=ctx.chunk_size,
        gate_gradient=gate_gradient,
    )
    linear_gradients = (*dlinear, dgate if gate_gradient else None, dinitial if initial is not None else None)
    return dq, dk, dv, sink_gradient(sinks, lse, delta), *linear_gradients, None, None, None, None, None


forward_op.register_autograd(_backward, setup_context=_save)


@kernel_op("mixed_decode", strided="k v linear_qkv", mutates_args=("state",))
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
        call = DecodeCall(
            q, Cache(k=k, v=v), lengths, o=o, visibility=Visibility(causal=True, window=None, scale=scale), sinks=sinks
        )
        form, _ = tiles(*state.shape[2:], DECODE_BLOCK)
        # The linear heads' programs are short beside the splits.
        n_linear = state.shape[0] * state.shape[1] * cdiv(form.V, form.BLOCK_V)
        mixed_decode_kernel[(n_linear + call.programs,)](
            softmax=call.arguments,
            linear=lightning_tensors(linear_qkv, log_decay, state, linear_o),
            n_linear=n_linear,
            LINEAR=form,
            FORM=call.form,
            **call.options.keywords,
        )
    return o, linear_o

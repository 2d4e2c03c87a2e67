"""Softmax heads (full or in a sliding window) and linear heads of one layer, side by side: both kinds of memory, in one
launch.

    o = flash_attention(q, k, v)                      exact recall of what its window or cache holds
    linear_o = decayed_linear_attention(q', k', v')   a fixed state for everything before

Heads of two kinds inside a layer: Hymba (arXiv 2411.13676), which has softmax and state-space heads read the same input
in parallel.

Legend: B batch, T tokens, S keys, H query heads, G key/value heads, J linear heads, K key width, V value width (the
linear heads have widths of their own), N sequences (B of them, or those packed by `cu_seqlens`), X = J (2 K + V)
channels.
"""

import math

from torch import Tensor

from triton_kernels.common.checks import (
    check_backend,
    check_dtype,
    check_number,
    check_placed,
    check_range,
    check_tensors,
)
from triton_kernels.linear.decayed_linear_attention import decayed_linear_attention
from triton_kernels.linear.linear_decode import check_in_place, check_linear_projection, lightning_decode
from triton_kernels.softmax.flash_attention import check_attention, check_kernels_take, flash_attention
from triton_kernels.softmax.flash_decode import check_decode, flash_decode

OP = "mixed_attention"


def mixed_attention(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    linear_q_BTJK: Tensor,
    linear_k_BTJK: Tensor,
    linear_v_BTJV: Tensor,
    log_decay: Tensor | None,
    *,
    window: int | None = None,
    scale: float | None = None,
    sinks_H: Tensor | None = None,
    linear_scale: float = 1.0,
    initial_state_NJKV: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal `flash_attention` of the softmax heads and `decayed_linear_attention` of the linear heads over the same T
    tokens.

    Args:
        q_BTHK, k_BSGK, v_BSGV, window, scale, sinks_H: those of `flash_attention`.
        linear_q_BTJK, linear_k_BTJK, linear_v_BTJV, log_decay, linear_scale, initial_state_NJKV, chunk_size: those of
            `decayed_linear_attention`. All tensors but log_decay and the state share a dtype.
        cu_seqlens: int64 [N + 1], packed sequences of both kinds of heads.
        backend: "torch", "triton", or "auto": Triton on CUDA tensors.

    Returns:
        (o_BTHV, linear_o_BTJV, final_state_NJKV in fp32); gradients flow to every tensor, through all three.

    Raises:
        ValueError: for shapes, dtypes, offsets and options that do not fit.
    """
    scale = check_attention(
        OP, q_BTHK, k_BSGK, v_BSGV, causal=True, window=window, scale=scale, sinks_H=sinks_H, cu_seqlens=cu_seqlens
    )
    B, T = q_BTHK.shape[:2]
    sizes = {"B": B, "T": T, "N": B if cu_seqlens is None else len(cu_seqlens) - 1}
    linear = {"linear_q_BTJK": linear_q_BTJK, "linear_k_BTJK": linear_k_BTJK, "linear_v_BTJV": linear_v_BTJV}
    sizes = check_tensors(OP, sizes, **linear, initial_state_NJKV=initial_state_NJKV)
    check_dtype(OP, {"q_BTHK": q_BTHK, **linear})
    check_placed(OP, q_BTHK=q_BTHK, log_decay=log_decay, initial_state_NJKV=initial_state_NJKV, **linear)
    check_number(OP, "linear_scale", linear_scale)
    if log_decay is not None:
        check_tensors(OP, sizes, **{"log_decay_J" if log_decay.dim() == 1 else "log_decay_BTJ": log_decay})
        check_range(OP, "log_decay", log_decay, -math.inf, 0)
    if check_backend(backend, q_BTHK) == "torch":
        o_BTHV = flash_attention(
            q_BTHK, k_BSGK, v_BSGV, window=window, scale=scale, sinks_H=sinks_H, cu_seqlens=cu_seqlens, backend="torch"
        )
        return o_BTHV, *decayed_linear_attention(
            *linear.values(),
            log_decay,
            scale=linear_scale,
            initial_state_BHKV=initial_state_NJKV,
            cu_seqlens=cu_seqlens,
            chunk_size=chunk_size,
            backend="torch",
        )
    check_kernels_take(OP, q_BTHK, v_BSGV, linear_q_BTJK, linear_v_BTJV)
    if chunk_size < 16 or chunk_size & (chunk_size - 1):
        raise ValueError(f"{OP}: chunk_size={chunk_size}, the kernels take powers of two from 16 on")
    # Imported here because machines without Triton (macOS) still have the torch backend.
    from triton_kernels.mixed.mixed_attention_launch import forward_op

    decays = None if log_decay is None else log_decay.float().expand(B, T, sizes["J"])
    initial = None if initial_state_NJKV is None else initial_state_NJKV.float()
    o_BTHV, _, *linear_results = forward_op(
        q=q_BTHK,
        k=k_BSGK,
        v=v_BSGV,
        sinks=sinks_H,
        linear_q=linear_q_BTJK,
        linear_k=linear_k_BTJK,
        linear_v=linear_v_BTJV,
        log_decay=decays,
        initial=initial,
        cu_seqlens=cu_seqlens,
        window=window,
        scale=scale,
        linear_scale=linear_scale,
        chunk_size=chunk_size,
    )
    return o_BTHV, *linear_results


def mixed_decode(
    q_BHK: Tensor,
    k_cache_BSGK: Tensor,
    v_cache_BSGV: Tensor,
    lengths_B: Tensor,
    linear_qkv_BX: Tensor,
    log_decay_J: Tensor,
    *,
    state_BJKV: Tensor,
    scale: float | None = None,
    sinks_H: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One token: `flash_decode` of the softmax heads over their cache, `lightning_decode` of the linear heads.

    Args:
        q_BHK: the query of each sequence's newest token.
        k_cache_BSGK, v_cache_BSGV: growing caches or rings, in the dtype of q, the token's own key and value already in
            them.
        lengths_B: int64, tokens each sequence has seen; above S the ring has gone round.
        linear_qkv_BX: the projected queries, keys and values of the linear heads side by side, before their SiLU.
        log_decay_J: fp32 nats per token, <= 0.
        state_BJKV: fp32, updated in place.
        scale, sinks_H: those of `flash_decode`.
        backend: "torch", "triton", or "auto": Triton on CUDA tensors.

    Returns:
        (o_BHV, linear_o_BJV). No gradient on Triton.

    Raises:
        ValueError: for shapes, dtypes and options that do not fit.
    """
    op = "mixed_decode"
    caches = {"k_cache_BSGK": k_cache_BSGK, "v_cache_BSGV": v_cache_BSGV}
    scale = check_decode(op, q_BHK, caches, scales={}, lengths_B=lengths_B, sinks_H=sinks_H, scale=scale)
    check_dtype(op, {"q_BHK": q_BHK, "linear_qkv_BX": linear_qkv_BX})
    check_placed(op, q_BHK=q_BHK, linear_qkv_BX=linear_qkv_BX, log_decay_J=log_decay_J, state_BJKV=state_BJKV)
    check_range(op, "lengths_B", lengths_B, 0, math.inf)
    if check_linear_projection(op, linear_qkv_BX, state_BJKV)[0] != len(q_BHK):
        raise ValueError(
            f"{op}: state_BJKV holds {len(state_BJKV)} sequences, q_BHK {len(q_BHK)}; they must be as many"
        )
    check_tensors(op, {"J": state_BJKV.shape[1]}, log_decay_J=log_decay_J)
    if check_backend(backend, q_BHK) == "torch":
        o_BHV = flash_decode(
            q_BHK, k_cache_BSGK, v_cache_BSGV, lengths_B, scale=scale, sinks_H=sinks_H, backend="torch"
        )
        return o_BHV, lightning_decode(linear_qkv_BX, log_decay_J, state_BHKV=state_BJKV, backend="torch")
    check_in_place(op, linear_qkv_BX, state_BJKV)
    check_kernels_take(op, q_BHK, v_cache_BSGV)
    from triton_kernels.mixed.mixed_attention_launch import decode_op

    return decode_op(
        q=q_BHK,
        k=k_cache_BSGK,
        v=v_cache_BSGV,
        lengths=lengths_B,
        sinks=sinks_H,
        linear_qkv=linear_qkv_BX,
        log_decay=log_decay_J,
        state=state_BJKV,
        scale=scale,
    )

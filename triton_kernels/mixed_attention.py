"""Softmax heads (full or in a sliding window) and linear heads of one layer, side by side: both kinds of memory, in one launch.

    o = flash_attention(q, k, v)                      exact recall of what its window or cache holds
    linear_o = decayed_linear_attention(q', k', v')   a fixed state for everything before

Heads of two kinds inside a layer: Hymba (arXiv 2411.13676), which has softmax and state-space heads read the same input in parallel.

Legend: B batch, T tokens, S keys, H query heads, G key/value heads, J linear heads, K key width, V value width (the linear heads have widths of their
own), N sequences (B of them, or those packed by `cu_seqlens`), X = J (2 K + V) channels.
"""

import math

import torch
from torch import Tensor

from triton_kernels.checks import check_backend, check_dtype, check_shape
from triton_kernels.decayed_linear_attention import decayed_linear_attention
from triton_kernels.flash_attention import check_attention_arguments, flash_attention
from triton_kernels.flash_decode import flash_decode
from triton_kernels.linear_decode import check_in_place, check_linear_projection, lightning_decode

OP = "mixed_attention"
MAX_WIDTH = 256


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
    """Causal `flash_attention` of the softmax heads and `decayed_linear_attention` of the linear heads over the same T tokens.

    The first three tensors, `window`, `scale` and `sinks_H` are those of flash_attention, the next four, `linear_scale`, `initial_state_NJKV` and
    `chunk_size` those of decayed_linear_attention; `cu_seqlens` holds for both kinds of heads. All tensors but log_decay and the state share a dtype.

    Returns (o_BTHV, linear_o_BTJV, final_state_NJKV fp32); gradients flow to every tensor, through all three.
    Raises ValueError for shapes, dtypes, offsets and options that do not fit.
    """
    check_attention_arguments(q_BTHK, k_BSGK, v_BSGV, True, window, sinks_H, cu_seqlens)
    B, T = q_BTHK.shape[:2]
    check_shape(OP, "linear_q_BTJK", linear_q_BTJK, {"B": B, "T": T, "J": None, "K": None})
    J, K = linear_q_BTJK.shape[2:]
    check_shape(OP, "linear_k_BTJK", linear_k_BTJK, {"B": B, "T": T, "J": J, "K": K})
    check_shape(OP, "linear_v_BTJV", linear_v_BTJV, {"B": B, "T": T, "J": J, "V": None})
    check_dtype(OP, {"q_BTHK": q_BTHK, "linear_q_BTJK": linear_q_BTJK, "linear_k_BTJK": linear_k_BTJK, "linear_v_BTJV": linear_v_BTJV})
    if log_decay is not None:
        check_shape(OP, "log_decay", log_decay, {"J": J} if log_decay.dim() == 1 else {"B": B, "T": T, "J": J})
    if initial_state_NJKV is not None:
        n_states = B if cu_seqlens is None else cu_seqlens.numel() - 1
        check_shape(OP, "initial_state_NJKV", initial_state_NJKV, {"N": n_states, "J": J, "K": K, "V": linear_v_BTJV.shape[3]})
    scale = check_scale(OP, scale, q_BTHK.shape[3])
    if check_backend(backend, q_BTHK) == "torch":
        o_BTHV = flash_attention(q_BTHK, k_BSGK, v_BSGV, window=window, scale=scale, sinks_H=sinks_H, cu_seqlens=cu_seqlens, backend="torch")
        state = {"initial_state_BHKV": initial_state_NJKV, "cu_seqlens": cu_seqlens}
        linear = (linear_q_BTJK, linear_k_BTJK, linear_v_BTJV, log_decay)
        return o_BTHV, *decayed_linear_attention(*linear, scale=linear_scale, chunk_size=chunk_size, backend="torch", **state)
    width = max(*q_BTHK.shape[3:], *v_BSGV.shape[3:], K, *linear_v_BTJV.shape[3:])
    if width > MAX_WIDTH or q_BTHK.dtype == torch.float64:
        raise ValueError(f"{OP}: {q_BTHK.dtype} heads of width {width}; the Triton kernels take float32, float16 and bfloat16 up to {MAX_WIDTH}")
    if chunk_size < 16 or chunk_size & (chunk_size - 1):
        raise ValueError(f"{OP}: chunk_size={chunk_size}, the kernels take powers of two from 16 on")
    # Imported here because machines without Triton (macOS) still have the torch backend.
    from triton_kernels.mixed_attention_triton import forward_op

    decays = None if log_decay is None else log_decay.float().expand(B, T, J)
    initial = None if initial_state_NJKV is None else initial_state_NJKV.float().contiguous()
    linear = (linear_q_BTJK, linear_k_BTJK, linear_v_BTJV, decays, initial)
    o_BTHV, _, *linear_results = forward_op(q_BTHK, k_BSGK, v_BSGV, sinks_H, *linear, cu_seqlens, window, scale, linear_scale, chunk_size)
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
    """One token: `flash_decode` of the softmax heads over their cache, `lightning_decode` of the linear heads, whose state is updated in place.

    The caches grow or are rings (lengths_B > S: gone round), in the dtype of q, the token's own key and value already in them. linear_qkv_BX are the
    projected queries, keys and values of the linear heads side by side, before their SiLU. Returns (o_BHV, linear_o_BJV); no gradient on Triton.
    Raises ValueError for shapes, dtypes and options that do not fit.
    """
    op = "mixed_decode"
    check_shape(op, "q_BHK", q_BHK, {"B": None, "H": None, "K": None})
    B, H, K = q_BHK.shape
    check_shape(op, "k_cache_BSGK", k_cache_BSGK, {"B": B, "S": None, "G": None, "K": K})
    S, G = k_cache_BSGK.shape[1:3]
    check_shape(op, "v_cache_BSGV", v_cache_BSGV, {"B": B, "S": S, "G": G, "V": None})
    if G == 0 or H % G != 0:
        raise ValueError(f"{op}: q_BHK has H={H} heads and k_cache_BSGK G={G}; H must be a multiple of G")
    check_dtype(op, {"q_BHK": q_BHK, "k_cache_BSGK": k_cache_BSGK, "v_cache_BSGV": v_cache_BSGV, "linear_qkv_BX": linear_qkv_BX})
    check_shape(op, "lengths_B", lengths_B, {"B": B})
    if lengths_B.dtype != torch.int64:
        raise ValueError(f"{op}: lengths_B is {lengths_B.dtype}, legal is torch.int64")
    if sinks_H is not None:
        check_shape(op, "sinks_H", sinks_H, {"H": H})
    if check_linear_projection(op, linear_qkv_BX, state_BJKV)[0] != B:
        raise ValueError(f"{op}: state_BJKV holds {len(state_BJKV)} sequences, q_BHK {B}; they must be as many")
    check_shape(op, "log_decay_J", log_decay_J, {"J": state_BJKV.shape[1]})
    scale = check_scale(op, scale, K)
    if check_backend(backend, q_BHK) == "torch":
        o_BHV = flash_decode(q_BHK, k_cache_BSGK, v_cache_BSGV, lengths_B, scale=scale, sinks_H=sinks_H, backend="torch")
        return o_BHV, lightning_decode(linear_qkv_BX, log_decay_J, state_BHKV=state_BJKV, backend="torch")
    check_in_place(op, linear_qkv_BX, state_BJKV)
    if max(K, v_cache_BSGV.shape[3]) > MAX_WIDTH:
        raise ValueError(f"{op}: softmax heads of width {max(K, v_cache_BSGV.shape[3])}; the Triton kernels take up to {MAX_WIDTH}")
    from triton_kernels.mixed_attention_triton import decode_op

    return decode_op(q_BHK, k_cache_BSGK, v_cache_BSGV, lengths_B, sinks_H, linear_qkv_BX, log_decay_J, state_BJKV, scale)


def check_scale(op: str, scale: float | None, key_width: int) -> float:
    """The scale of the logits: K^-0.5 unless given."""
    scale = float(key_width**-0.5 if scale is None else scale)
    if not 0 < scale < math.inf:
        raise ValueError(f"{op}: scale={scale}; it must be positive and finite")
    return scale

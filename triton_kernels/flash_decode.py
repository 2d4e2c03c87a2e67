"""Softmax attention of one new token per sequence over its cached keys and values.

The caches it reads: growing ([B, S, G, K], `lengths` tokens of each row in use), ring buffers of W tokens (the same with lengths >= S once the
ring is full: order does not matter to a softmax), pools of fixed-size blocks with a block table (PagedAttention, arXiv 2309.06180), and any of
these in int8 or fp8 with one scale per token and head. A latent cache is the growing one with G = 1, its keys [latent, rotary] and its values
the latent again: a view of the same memory, which the op accepts.

Legend: B sequences, S rows of the cache, H query heads, G key/value heads, K key width, V value width, P blocks of the pool, C tokens per block,
N blocks of the longest sequence.
"""

import math

import torch
from torch import Tensor

from triton_kernels.checks import check_backend, check_dtype, check_shape
from triton_kernels.flash_decode_torch import flash_decode_torch

OP = "flash_decode"
QUANTISED = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


def flash_decode(
    q_BHK: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths_B: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    sinks_H: Tensor | None = None,
    block_table_BN: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of the newest token, whose own key and value are already in the cache, over all that is cached.

    Args:
        q_BHK: the query of each sequence's newest token; head h reads key head h // (H // G).
        k_cache, v_cache: [B, S, G, K] and [B, S, G, V]; with a block table a pool [P, C, G, K] and [P, C, G, V]. In q's dtype, or int8,
            float8_e4m3fn or float8_e5m2 with scales.
        lengths_B: int64, tokens each sequence has seen. At most S rows are read: lengths >= S is a ring buffer gone round.
        scale: of the logits; K^-0.5 by default.
        window: only the last `window` tokens; not for a ring buffer, whose size is its window.
        sinks_H: one logit per query head in the softmax's denominator.
        block_table_BN: int32 or int64: the pool's block that holds tokens [n C, (n + 1) C) of sequence b.
        k_scale, v_scale: [B, S, G] or [P, C, G], what one unit of the quantised cache stands for.
        backend: "torch", "triton", or "auto": Triton on CUDA tensors.

    Returns:
        o_BHV in q's dtype; zeros for a sequence of length 0. No gradients. Raises ValueError for arguments that do not fit.
    """
    check_shape(OP, "q_BHK", q_BHK, {"B": None, "H": None, "K": None})
    B, H, K = q_BHK.shape
    rows = {"B": B, "S": None} if block_table_BN is None else {"P": None, "C": None}
    check_shape(OP, "k_cache", k_cache, {**rows, "G": None, "K": K})
    rows = dict(zip(rows, k_cache.shape[:2]))
    G = k_cache.shape[2]
    check_shape(OP, "v_cache", v_cache, {**rows, "G": G, "V": None})
    if G == 0 or H % G != 0:
        raise ValueError(f"{OP}: q_BHK has H={H} heads and k_cache G={G}; H must be a multiple of G")
    check_dtype(OP, {"q_BHK": q_BHK})
    for name, cache, cache_scale in (("k", k_cache, k_scale), ("v", v_cache, v_scale)):
        quantised = cache.dtype in QUANTISED
        if not quantised and cache.dtype != q_BHK.dtype:
            raise ValueError(f"{OP}: {name}_cache is {cache.dtype}, legal are q's {q_BHK.dtype} and {', '.join(map(str, QUANTISED))}")
        if quantised != (cache_scale is not None):
            raise ValueError(
                f"{OP}: {name}_cache is {cache.dtype} {'without' if quantised else 'with'} {name}_scale; int8 and fp8 need one, others none"
            )
        if cache_scale is not None:
            check_shape(OP, f"{name}_scale", cache_scale, {**rows, "G": G})
    check_shape(OP, "lengths_B", lengths_B, {"B": B})
    if lengths_B.dtype != torch.int64:
        raise ValueError(f"{OP}: lengths_B is {lengths_B.dtype}, legal is torch.int64")
    if block_table_BN is not None:
        check_shape(OP, "block_table_BN", block_table_BN, {"B": B, "N": None})
        if block_table_BN.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{OP}: block_table_BN is {block_table_BN.dtype}, legal are torch.int32 and torch.int64")
    if sinks_H is not None:
        check_shape(OP, "sinks_H", sinks_H, {"H": H})
    if window is not None and window < 1:
        raise ValueError(f"{OP}: window={window}, must be at least 1, the token itself, or None")
    scale = float(K**-0.5 if scale is None else scale)
    if not 0 < scale < math.inf:
        raise ValueError(f"{OP}: scale={scale}; it must be positive and finite")
    if check_backend(backend, q_BHK) == "torch":
        return flash_decode_torch(q_BHK, k_cache, v_cache, lengths_B, scale, window, sinks_H, block_table_BN, k_scale, v_scale)
    # Imported here because machines without Triton (macOS) still have the torch backend.
    from triton_kernels.flash_decode_triton import flash_decode_triton

    return flash_decode_triton(q_BHK, k_cache, v_cache, lengths_B, scale, window, sinks_H, block_table_BN, k_scale, v_scale)

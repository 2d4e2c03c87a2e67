"""Softmax attention of one new token per sequence over its cached keys and values.

The caches it reads: growing ([B, S, G, K], `lengths` tokens of each row in use), ring buffers of W tokens (the same
with lengths >= S once the ring is full: order does not matter to a softmax), pools of fixed-size blocks with a block
table (PagedAttention, arXiv 2309.06180), and any of these in int8 or fp8 with one scale per token and head. A latent
cache is the growing one with G = 1, its keys [latent, rotary] and its values the latent again: a view of the same
memory, which the op accepts.

Legend: B sequences, S rows of the cache, H query heads, G key/value heads, R query heads of a group, K key width, V
value width, P blocks of the pool, C tokens per block, N blocks of the longest sequence.
"""

import math

import torch
from torch import Tensor

from triton_kernels.common import checks
from triton_kernels.common.checks import (
    QUANTISED,
    check_backend,
    check_dtype,
    check_placed,
    check_range,
    check_tensors,
    values_are_free,
)
from triton_kernels.softmax.flash_attention import check_heads, check_kernels_take, check_window
from triton_kernels.softmax.flash_attention_torch import flash_attention_torch

OP = "flash_decode"
# A latent cache is as wide as its latent and its rotary part together.
MAX_WIDTH = 1024


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
        k_cache, v_cache: [B, S, G, K] and [B, S, G, V]; with a block table a pool [P, C, G, K] and [P, C, G, V]. In q's
            dtype, or int8, float8_e4m3fn or float8_e5m2 with scales.
        lengths_B: int64, tokens each sequence has seen. At most S rows are read: lengths >= S is a ring buffer gone
            round.
        scale: of the logits; K^-0.5 by default.
        window: only the last `window` tokens; not for a ring buffer, whose size is its window.
        sinks_H: one logit per query head in the softmax's denominator.
        block_table_BN: int32 or int64: the pool's block that holds tokens [n C, (n + 1) C) of sequence b.
        k_scale, v_scale: [B, S, G] or [P, C, G], what one unit of the quantised cache stands for.
        backend: "torch", "triton", or "auto": Triton on CUDA tensors.

    Returns:
        o_BHV in q's dtype; zeros for a sequence of length 0. No gradients.

    Raises:
        ValueError: for arguments that do not fit.
    """
    rows = "BS" if block_table_BN is None else "PC"
    caches = {f"k_cache_{rows}GK": k_cache, f"v_cache_{rows}GV": v_cache}
    scales = {f"k_scale_{rows}G": k_scale, f"v_scale_{rows}G": v_scale}
    scale = check_decode(OP, q_BHK, caches, scales=scales, lengths_B=lengths_B, sinks_H=sinks_H, scale=scale)
    check_tensors(OP, {"B": len(q_BHK)}, block_table_BN=block_table_BN)
    check_placed(OP, q_BHK=q_BHK, block_table_BN=block_table_BN)
    check_window(OP, window)
    _check_cached(k_cache, lengths_B, window, block_table_BN)
    if check_backend(backend, q_BHK) == "torch":
        if k_scale is None and block_table_BN is None and window is None and _all_is_seen(k_cache, lengths_B):
            # SDPA reads keys and values where they lie; the form below would copy, widen and mask them first.
            o_BTHV = flash_attention_torch(
                q_BHK[:, None],
                k_cache,
                v_cache,
                cu_seqlens=None,
                rotary=None,
                sinks_H=sinks_H,
                causal=True,
                window=None,
                scale=scale,
            )
            return o_BTHV[:, 0]
        return flash_decode_torch(
            q_BHK,
            k_cache,
            v_cache,
            lengths_B,
            scale=scale,
            window=window,
            sinks_H=sinks_H,
            block_table_BN=block_table_BN,
            k_scale=k_scale,
            v_scale=v_scale,
        )
    check_kernels_take(OP, q_BHK, v_cache, widest=MAX_WIDTH)
    # Imported here because machines without Triton (macOS) still have the torch backend.
    from triton_kernels.softmax.flash_decode_launch import decode_op

    return decode_op(
        q=q_BHK,
        k_cache=k_cache,
        v_cache=v_cache,
        lengths=lengths_B,
        scale=scale,
        window=window,
        sinks=sinks_H,
        block_table=block_table_BN,
        k_scale=k_scale,
        v_scale=v_scale,
    )


def _check_cached(k_cache: Tensor, lengths_B: Tensor, window: int | None, block_table_BN: Tensor | None) -> None:
    """Lengths that the cache can hold, and blocks that the pool has."""
    rows = k_cache.shape[1] * (1 if block_table_BN is None else block_table_BN.shape[1])
    # Without a window or a table the rows may be a ring, which holds the last of any number of tokens.
    is_ring = window is None and block_table_BN is None
    check_range(OP, "lengths_B", lengths_B, 0, math.inf if is_ring else rows)
    if block_table_BN is not None and checks.values_are_checked(block_table_BN):
        first_row_N = torch.arange(block_table_BN.shape[1], device=lengths_B.device) * k_cache.shape[1]
        in_use_BN = first_row_N < lengths_B[:, None]
        check_range(OP, "block_table_BN", block_table_BN, 0, k_cache.shape[0] - 1, in_use_BN)


def _all_is_seen(k_cache_BSGK: Tensor, lengths_B: Tensor) -> bool:
    """Whether it is known, because looking is free, that every row of the cache holds a token."""
    return values_are_free(lengths_B) and bool((lengths_B >= k_cache_BSGK.shape[1]).all())


def check_decode(
    op: str,
    q_BHK: Tensor,
    caches: dict[str, Tensor],
    *,
    scales: dict[str, Tensor | None],
    lengths_B: Tensor,
    sinks_H: Tensor | None,
    scale: float | None,
) -> float:
    """The scale of the logits; raises ValueError. `caches` and `scales` of keys and values by names that say their
    axes; no scales: not quantised."""
    sizes = check_tensors(op, None, q_BHK=q_BHK, **caches, **scales, lengths_B=lengths_B, sinks_H=sinks_H)
    check_dtype(op, {"q_BHK": q_BHK})
    others = {name.rsplit("_", 1)[0]: x for name, x in (caches | scales).items()}
    check_placed(op, q_BHK=q_BHK, lengths_B=lengths_B, sinks_H=sinks_H, **others)
    for (name, cache), scale_name in zip(caches.items(), scales or (None, None)):
        has_scale = scale_name is not None and scales[scale_name] is not None
        legal = QUANTISED if scales else ()
        if cache.dtype not in (q_BHK.dtype, *legal):
            raise ValueError(f"{op}: {name} is {cache.dtype}, legal are {', '.join(map(str, (q_BHK.dtype, *legal)))}")
        if (cache.dtype in QUANTISED) != has_scale:
            raise ValueError(
                f"{op}: {name} is {cache.dtype} {'with' if has_scale else 'without'} {scale_name}; int8 and fp8 need"
                " one, others none"
            )
    return check_heads(op, sizes, scale)


def flash_decode_torch(
    q_BHK: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths_B: Tensor,
    *,
    scale: float,
    window: int | None,
    sinks_H: Tensor | None,
    block_table_BN: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    """The torch form of any cache: gathers what is cached, widens it, and writes out the softmax."""
    accumulator = torch.promote_types(q_BHK.dtype, torch.float32)
    k_BSGK = _gathered(k_cache, k_scale, block_table_BN, accumulator)
    v_BSGV = _gathered(v_cache, v_scale, block_table_BN, accumulator)
    (B, H, K), (S, G) = q_BHK.shape, k_BSGK.shape[1:3]
    token_S = torch.arange(S, device=q_BHK.device)
    # A ring that has gone round holds its S last tokens in every row: all are seen, in whatever order.
    seen_BS = token_S < lengths_B[:, None]
    if window is not None:
        seen_BS = seen_BS & (token_S >= lengths_B[:, None] - window)
    # What lies outside may be anything, NaN included: 0 * NaN is NaN, so it is cleared and not only masked.
    k_BSGK, v_BSGV = (x.masked_fill(~seen_BS[:, :, None, None], 0) for x in (k_BSGK, v_BSGV))
    q_BGRK = q_BHK.to(accumulator).reshape(B, G, H // G, K)
    s_BGRS = torch.einsum("bgrk,bsgk->bgrs", q_BGRK, k_BSGK) * scale
    s_BGRS = s_BGRS.masked_fill(~seen_BS[:, None, None], -torch.inf)
    if sinks_H is not None:
        sink_BGR1 = sinks_H.to(accumulator).reshape(1, G, H // G, 1).expand(B, -1, -1, -1)
        s_BGRS = torch.cat([s_BGRS, sink_BGR1], dim=-1)
    # A sequence without any cached token attends to nothing: zeros, as in the kernel, where softmax would give NaN. Any
    # other NaN is the caller's and stays.
    p_BGRS = s_BGRS.softmax(-1)[..., :S].masked_fill(~seen_BS.any(-1)[:, None, None, None], 0.0)
    return torch.einsum("bgrs,bsgv->bgrv", p_BGRS, v_BSGV).reshape(B, H, -1).to(q_BHK.dtype)


def _gathered(cache: Tensor, scale: Tensor | None, block_table_BN: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[B, S, G, width] in `dtype`, from rows of one length or from the blocks of a pool, times one scale per token and
    head if there is one."""
    widened = cache.to(dtype) if scale is None else cache.to(dtype) * scale.to(dtype)[..., None]
    # Entries of the table past a sequence's end may be anything; they are read somewhere harmless, and masked.
    return widened if block_table_BN is None else widened[block_table_BN.clamp(0, cache.shape[0] - 1)].flatten(1, 2)

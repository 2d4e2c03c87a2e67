"""Torch reference of flash_decode: gathers what is cached, widens it, and writes out the softmax.

Legend: B sequences, S cached tokens, H query heads, G key/value heads, K key width, V value width, P blocks of the pool, C tokens per block.
"""

import torch
from torch import Tensor


def flash_decode_torch(
    q_BHK: Tensor, k_cache: Tensor, v_cache: Tensor, lengths_B: Tensor, scale: float, window: int | None, sinks_H: Tensor | None,
    block_table_BN: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """o_BHV; the arguments are those of `flash_decode`, already checked."""
    accumulator = torch.promote_types(q_BHK.dtype, torch.float32)
    k_BSGK = _gathered(k_cache, k_scale, block_table_BN, accumulator)
    v_BSGV = _gathered(v_cache, v_scale, block_table_BN, accumulator)
    B, H, K = q_BHK.shape
    S, G = k_BSGK.shape[1:3]
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
    # A sequence without any cached token attends to nothing: zeros, as in the kernel, where softmax would give NaN.
    p_BGRS = s_BGRS.softmax(-1).nan_to_num(0.0)[..., :S]
    return torch.einsum("bgrs,bsgv->bgrv", p_BGRS, v_BSGV).reshape(B, H, -1).to(q_BHK.dtype)


def _gathered(cache: Tensor, scale: Tensor | None, block_table_BN: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[B, S, G, width] in `dtype`, from rows of one length or from the blocks of a pool, times one scale per token and head if there is one."""
    widened = cache.to(dtype) if scale is None else cache.to(dtype) * scale.to(dtype)[..., None]
    # Entries of the table past a sequence's end may be anything; they are read somewhere harmless, and masked.
    return widened if block_table_BN is None else widened[block_table_BN.clamp(0, cache.shape[0] - 1)].flatten(1, 2)

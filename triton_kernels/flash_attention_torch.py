"""Torch reference of flash_attention: exact, differentiable on any device, and fast enough on a CPU to train with.

Everything goes through scaled_dot_product_attention, whose CPU kernel never stores the T x S scores. A window is cut into blocks of queries
that each see two blocks of keys, so that its cost is T * W and not T^2. FlexAttention would say this more shortly, but has no CPU backward.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, K key width, V value width, N blocks, C queries per block.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# A shorter block than this leaves the matmuls too small to pay for their launch.
MIN_BLOCK = 64


def flash_attention_torch(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
    sinks_H: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """o_BTHV; the arguments are those of `flash_attention`, already checked."""
    if cu_seqlens is not None:
        # Tensor.split accepts the empty pieces that empty sequences give.
        lengths = cu_seqlens.diff().tolist()
        pieces = zip(q_BTHK.split(lengths, 1), k_BSGK.split(lengths, 1), v_BSGV.split(lengths, 1))
        return torch.cat([flash_attention_torch(q, k, v, causal, window, scale, sinks_H, None) for q, k, v in pieces], dim=1)
    V = v_BSGV.shape[-1]
    q_BHTK, k_BGSK, v_BGSV = _equal_widths(q_BTHK.transpose(1, 2), k_BSGK.transpose(1, 2), v_BSGV.transpose(1, 2))
    if sinks_H is not None:
        q_BHTK, k_BGSK, v_BGSV = _with_sink_key(q_BHTK, k_BGSK, v_BGSV, sinks_H, scale)
    T, S = q_BTHK.shape[1], k_BSGK.shape[1]
    if q_BTHK.numel() == 0 or S == 0:
        # Nothing to attend to: zeros that still hang on the graph, so that every input receives its (zero) gradient.
        zero = q_BTHK.sum() + k_BSGK.sum() + v_BSGV.sum() + (0 if sinks_H is None else sinks_H.sum().to(q_BTHK.dtype))
        return q_BTHK.new_zeros(*q_BTHK.shape[:3], V) + zero * 0
    n_sinks = k_BGSK.shape[2] - S
    if window is not None and window < S:
        o_BHTV = _windowed(q_BHTK, k_BGSK, v_BGSV, window, scale, n_sinks)
    elif not causal or T == 1:
        o_BHTV = _attend(q_BHTK, k_BGSK, v_BGSV, scale)
    elif T == S:
        # SDPA aligns its causal mask to the top left: a dummy query in front makes room for the sink key in front.
        o_BHTV = _attend(F.pad(q_BHTK, (0, 0, n_sinks, 0)), k_BGSK, v_BGSV, scale, causal=True)[:, :, n_sinks:]
    else:
        mask_TS = torch.ones(T, S + n_sinks, dtype=torch.bool, device=q_BTHK.device).tril(S + n_sinks - T)
        o_BHTV = _attend(q_BHTK, k_BGSK, v_BGSV, scale, mask_TS)
    return o_BHTV[..., :V].transpose(1, 2)


def _attend(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, scale: float, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    grouped = q_BHTK.shape[1] != k_BGSK.shape[1]
    return F.scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSK, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)


def _equal_widths(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zero channels up to the wider of K and V: they change nothing, and SDPA's fast kernels want one width."""
    K, V = q_BHTK.shape[-1], v_BGSV.shape[-1]
    if K < V:
        return F.pad(q_BHTK, (0, V - K)), F.pad(k_BGSK, (0, V - K)), v_BGSV
    return q_BHTK, k_BGSK, F.pad(v_BGSV, (0, K - V)) if V < K else v_BGSV


def _with_sink_key(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, sinks_H: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """One more key in front, of value zero, that every query of head h meets with the logit sinks[h].

    Two more channels carry the logit on the query's side (a key is shared by several query heads, a query is not). There are two of them
    because one bf16 number would round the logit: the second holds what the first lost.
    """
    B, H, T, _ = q_BHTK.shape
    logit_H = sinks_H.to(torch.promote_types(q_BHTK.dtype, torch.float32)) / scale
    high_H = logit_H.detach().to(q_BHTK.dtype)
    low_H = (logit_H - high_H.to(logit_H.dtype)).to(q_BHTK.dtype)
    channels_H2 = torch.stack([high_H, low_H], dim=-1)
    q_BHTK = torch.cat([q_BHTK, channels_H2[None, :, None].expand(B, H, T, 2)], dim=-1)
    k_BGSK = F.pad(k_BGSK, (0, 2, 1, 0))
    one_K = k_BGSK.new_zeros(k_BGSK.shape[-1])
    one_K[-2:] = 1
    k_BGSK = torch.cat([one_K.expand(*k_BGSK.shape[:2], 1, -1), k_BGSK[:, :, 1:]], dim=2)
    return q_BHTK, k_BGSK, F.pad(v_BGSK, (0, 2, 1, 0))


def _windowed(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, window: int, scale: float, n_sinks: int) -> Tensor:
    """Causal attention over the last `window` keys of each query, in blocks of C >= window queries over 2 C keys."""
    (B, H, T, K), G = q_BHTK.shape, k_BGSK.shape[1]
    sink_keys, sink_values = k_BGSK[:, :, :n_sinks], v_BGSK[:, :, :n_sinks]
    # Only the window - 1 keys before the first query can be seen at all.
    seen = min(k_BGSK.shape[2] - n_sinks, T + window - 1)
    keys, values = k_BGSK[:, :, k_BGSK.shape[2] - seen :], v_BGSK[:, :, v_BGSK.shape[2] - seen :]
    C = max(window, MIN_BLOCK)
    row_C = torch.arange(C, device=q_BHTK.device)[:, None]
    column = torch.arange(2 * C, device=q_BHTK.device)[None, :] - C
    mask_C2 = (column <= row_C) & (column > row_C - window)
    if seen <= 2 * C:
        # One block of queries that ends where the keys end: the mask's last rows, moved so that its diagonal ends in the corner.
        row = torch.arange(seen - T, seen, device=q_BHTK.device)[:, None]
        key = torch.arange(seen, device=q_BHTK.device)[None, :]
        mask_TS = F.pad((key <= row) & (key > row - window), (n_sinks, 0), value=True)
        return _attend(q_BHTK, torch.cat([sink_keys, keys], 2), torch.cat([sink_values, values], 2), scale, mask_TS)
    # Queries are padded in front to start where the keys start, then both at the end to whole blocks.
    N = -(-seen // C)
    padded_q = F.pad(q_BHTK, (0, 0, seen - T, N * C - seen))
    q_blocks = padded_q.reshape(B, H, N, C, K).transpose(1, 2)

    def pairs_of_blocks(x_BGSK: Tensor, sink_BG1K: Tensor) -> Tensor:
        x_BNGCK = F.pad(x_BGSK, (0, 0, 0, N * C - seen)).reshape(B, G, N, C, K).transpose(1, 2)
        sink = sink_BG1K[:, None].expand(B, N - 1, G, n_sinks, K)
        return torch.cat([sink, x_BNGCK[:, :-1], x_BNGCK[:, 1:]], dim=3).flatten(0, 1)

    first = torch.cat([sink_keys, keys[:, :, :C]], 2), torch.cat([sink_values, values[:, :, :C]], 2)
    o_first = _attend(q_blocks[:, 0], *first, scale, F.pad(mask_C2[:, C:], (n_sinks, 0), value=True))
    mask = F.pad(mask_C2, (n_sinks, 0), value=True)
    o_rest = _attend(q_blocks[:, 1:].flatten(0, 1), pairs_of_blocks(keys, sink_keys), pairs_of_blocks(values, sink_values), scale, mask)
    o_BNHCV = torch.cat([o_first[:, None], o_rest.reshape(B, N - 1, H, C, K)], dim=1)
    return o_BNHCV.transpose(1, 2).reshape(B, H, N * C, K)[:, :, seen - T : seen]

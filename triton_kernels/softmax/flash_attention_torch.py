"""flash_attention in torch.

Everything goes through scaled_dot_product_attention, whose CPU kernel never stores the T x S scores. A window is cut
into blocks of queries that each see two blocks of keys: its cost is T * W and not T^2. FlexAttention would say this
more shortly, but has no CPU backward.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, K key width, V value width, C queries of a block,
N blocks.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_kernels.softmax.rotary import Rotary, rotate_torch

# A shorter block of the torch form leaves its matmuls too small to pay for their launch.
MIN_BLOCK = 64


def flash_attention_torch(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    *,
    cu_seqlens: Tensor | None,
    rotary: Rotary | None,
    sinks_H: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> Tensor:
    """o_BTHV; the arguments are those of `flash_attention`, already checked."""
    if rotary is not None:
        q_BTHK = rotate_torch(q_BTHK, rotary)
    if cu_seqlens is not None:
        # Tensor.split accepts the empty pieces that empty sequences give.
        lengths = cu_seqlens.diff().tolist()
        pieces = zip(q_BTHK.split(lengths, 1), k_BSGK.split(lengths, 1), v_BSGV.split(lengths, 1))
        alone = partial(
            flash_attention_torch,
            cu_seqlens=None,
            rotary=None,
            sinks_H=sinks_H,
            causal=causal,
            window=window,
            scale=scale,
        )
        return torch.cat([alone(q, k, v) for q, k, v in pieces], dim=1)
    T, S, V = q_BTHK.shape[1], k_BSGK.shape[1], v_BSGV.shape[3]
    if q_BTHK.numel() == 0 or S == 0:
        # Nothing to attend to: zeros that still hang on the graph, so that every input receives its (zero) gradient.
        zero = q_BTHK.sum() + k_BSGK.sum() + v_BSGV.sum() + (0 if sinks_H is None else sinks_H.sum().to(q_BTHK.dtype))
        return q_BTHK.new_zeros(*q_BTHK.shape[:3], V) + zero * 0
    if window is not None and window < S:
        # Only the window - 1 keys before the first query can be seen at all.
        S = min(S, T + window - 1)
        k_BSGK, v_BSGV = k_BSGK[:, k_BSGK.shape[1] - S :], v_BSGV[:, v_BSGV.shape[1] - S :]
    else:
        window = None
    q_BHTK, k_BGSK, v_BGSV = _equal_widths(q_BTHK.transpose(1, 2), k_BSGK.transpose(1, 2), v_BSGV.transpose(1, 2))
    if sinks_H is not None:
        q_BHTK, k_BGSK, v_BGSV = _with_sink_key(q_BHTK, k_BGSK, v_BGSV, sinks_H, scale)
    n_sinks = k_BGSK.shape[2] - S
    if window is not None and 2 * max(window, MIN_BLOCK) < S:
        o_BHTV = _windowed(q_BHTK, k_BGSK, v_BGSV, window, scale, n_sinks)
    elif not causal or (T == 1 and window is None):
        o_BHTV = _attend(q_BHTK, k_BGSK, v_BGSV, scale)
    elif T == S and window is None:
        # SDPA aligns its causal mask to the top left: a dummy query in front makes room for the sink key in front.
        q_BHTK = F.pad(q_BHTK, (0, 0, n_sinks, 0)) if n_sinks else q_BHTK
        o_BHTV = _attend(q_BHTK, k_BGSK, v_BGSV, scale, causal=True)[:, :, n_sinks:]
    elif window is None and _gives_log_sums(q_BHTK):
        o_BHTV = _past_and_present(q_BHTK, k_BGSK, v_BGSV, scale)
    else:
        position_T1, key_S = (
            torch.arange(S - T, S, device=q_BHTK.device)[:, None],
            torch.arange(S, device=q_BHTK.device),
        )
        o_BHTV = _attend(q_BHTK, k_BGSK, v_BGSV, scale, _visible(position_T1, key_S, window, n_sinks))
    return o_BHTV[..., :V].transpose(1, 2)


def _attend(
    q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, scale: float, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    grouped = q_BHTK.shape[1] != k_BGSK.shape[1]
    return F.scaled_dot_product_attention(
        q_BHTK, k_BGSK, v_BGSK, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def _gives_log_sums(q_BHTK: Tensor) -> bool:
    """Whether SDPA's CPU kernel can be asked for its softmax's denominators: outside of autograd and compilation."""
    return q_BHTK.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _past_and_present(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, scale: float) -> Tensor:
    """The T newest queries over S > T keys: first over all keys that every one of them sees, then causally over their
    own, and both weighed by their denominators. A mask over T x S would take more memory than the keys."""
    past = k_BGSK.shape[2] - q_BHTK.shape[2]
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    o_past, log_past = attend(q_BHTK, k_BGSK[:, :, :past], v_BGSK[:, :, :past], 0.0, False, scale=scale)
    o_own, log_own = attend(q_BHTK, k_BGSK[:, :, past:], v_BGSK[:, :, past:], 0.0, True, scale=scale)
    share_BHT1 = torch.sigmoid(log_past - log_own)[..., None].to(o_own.dtype)
    return o_past * share_BHT1 + o_own * (1 - share_BHT1)


def _visible(position_T1: Tensor, key_S: Tensor, window: int | None, n_sinks: int) -> Tensor:
    """The mask [T, sinks + S]: which keys the query at each position sees, and the sink always."""
    mask_TS = key_S <= position_T1
    mask_TS = mask_TS if window is None else mask_TS & (key_S > position_T1 - window)
    return F.pad(mask_TS, (n_sinks, 0), value=True)


def _equal_widths(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zero channels up to the wider of K and V: they change nothing, and SDPA's fast kernels want one width."""
    K, V = q_BHTK.shape[-1], v_BGSV.shape[-1]
    if K < V:
        return F.pad(q_BHTK, (0, V - K)), F.pad(k_BGSK, (0, V - K)), v_BGSV
    return q_BHTK, k_BGSK, F.pad(v_BGSV, (0, K - V)) if V < K else v_BGSV


def _with_sink_key(
    q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, sinks_H: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One more key in front, of value zero, that every query of head h meets with the logit sinks[h].

    Two more channels carry the logit on the query's side (a key is shared by several query heads, a query is not).
    There are two of them because one bf16 number would round the logit: the second holds what the first lost.
    """
    B, H, T, _ = q_BHTK.shape
    # Kept finite in the queries' dtype: an infinite channel would meet the zeros of all other keys, 0 * inf. A logit
    # of -inf is a weight of zero all the same.
    largest = torch.finfo(q_BHTK.dtype).max / 4
    logit_H = (sinks_H.to(torch.promote_types(q_BHTK.dtype, torch.float32)) / scale).clamp(-largest, largest)
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
    """Causal attention over the last `window` keys of each query, in blocks of C >= window queries over 2 C keys; more
    than 2 C keys in all."""
    (B, H, T, K), (G, S) = q_BHTK.shape, (k_BGSK.shape[1], k_BGSK.shape[2] - n_sinks)
    C = max(window, MIN_BLOCK)
    N = -(-S // C)
    # Queries are padded in front to start where the keys start, then both at the end to whole blocks.
    q_BNHCK = F.pad(q_BHTK, (0, 0, S - T, N * C - S)).reshape(B, H, N, C, K).transpose(1, 2)

    def first_block_and_pairs(x_BGSK: Tensor) -> tuple[Tensor, Tensor]:
        sink, x_BGSK = x_BGSK[:, :, :n_sinks], x_BGSK[:, :, n_sinks:]
        x_BNGCK = F.pad(x_BGSK, (0, 0, 0, N * C - S)).reshape(B, G, N, C, K).transpose(1, 2)
        sinks = sink[:, None].expand(B, N - 1, G, n_sinks, K)
        return torch.cat([sink, x_BGSK[:, :, :C]], 2), torch.cat(
            [sinks, x_BNGCK[:, :-1], x_BNGCK[:, 1:]], dim=3
        ).flatten(0, 1)

    (k_first, k_pairs), (v_first, v_pairs) = first_block_and_pairs(k_BGSK), first_block_and_pairs(v_BGSK)
    query_C1, key_C = torch.arange(C, device=q_BHTK.device)[:, None], torch.arange(2 * C, device=q_BHTK.device) - C
    o_first = _attend(q_BNHCK[:, 0], k_first, v_first, scale, _visible(query_C1, key_C[C:], window, n_sinks))
    o_rest = _attend(q_BNHCK[:, 1:].flatten(0, 1), k_pairs, v_pairs, scale, _visible(query_C1, key_C, window, n_sinks))
    o_BNHCV = torch.cat([o_first[:, None], o_rest.reshape(B, N - 1, H, C, K)], dim=1)
    return o_BNHCV.transpose(1, 2).reshape(B, H, N * C, K)[:, :, S - T : S]

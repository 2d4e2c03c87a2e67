"""Softmax attention with grouped K/V heads, causal or not, optionally in a sliding window, with sink logits, rotary
queries and packed sequences.

    s_ij = scale * <q_i, k_j>;  o_i = sum_j e^{s_ij} v_j / (sum_j e^{s_ij} + e^{sink_h})

Sources: FlashAttention-2 (arXiv 2307.08691) for the tiling, the sink logit as in gpt-oss (arXiv 2508.10925): one more
logit per head in the denominator, with no value, so that a head may attend to nothing.

In the torch form everything goes through scaled_dot_product_attention, whose CPU kernel never stores the T x S scores.
A window is cut into blocks of queries that each see two blocks of keys: its cost is T * W and not T^2. FlexAttention
would say this more shortly, but has no CPU backward.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, K key width, V value width, P half of the rotated
channels, C queries of a block, N blocks.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_kernels.checks import check_backend, check_cu_seqlens, check_dtype, check_tensors
from triton_kernels.rotary import Rotary, check_rotary, rotate, rotate_torch

OP = "flash_attention"
MAX_WIDTH = 256
MAX_ROTARY_WIDTH = 128
# A shorter block of the torch form leaves its matmuls too small to pay for their launch.
MIN_BLOCK = 64


def flash_attention(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    sinks_H: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    rotary: Rotary | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of every query over the keys it may see.

    Args:
        q_BTHK: queries. The last query is aligned with the last key, so query t stands at position S - T + t.
        k_BSGK, v_BSGV: keys and values; query head h reads head h // (H // G).
        causal: a query sees the keys up to its own position; then S >= T.
        window: how many keys a query sees, itself included (causal only); None for all.
        scale: of the logits; K^-0.5 by default.
        sinks_H: one logit per query head that joins the softmax's denominator.
        cu_seqlens: int64 [N + 1] from 0 to T: B = 1 holds N sequences end to end (empty ones included) that do not see
            each other; T == S.
        rotary: cosine and sine [T, P] of the queries' angles (`rotary_tables`), which turn the first 2 P channels of
            every query before it meets the keys; these are turned already, by `rotate`. Without gradients.
        backend: "torch", "triton", or "auto": Triton on CUDA tensors.

    Returns:
        o_BTHV in the dtype of q. Raises ValueError for shapes, dtypes and options that do not fit.
    """
    scale = check_attention(OP, q_BTHK, k_BSGK, v_BSGV, causal, window, scale, sinks_H, cu_seqlens)
    if rotary is not None:
        check_rotary(OP, rotary, q_BTHK.shape[1], q_BTHK.shape[3])
        rotary = rotary if rotary[0].shape[1] > 0 else None
    if check_backend(backend, q_BTHK) == "torch":
        return flash_attention_torch(q_BTHK, k_BSGK, v_BSGV, cu_seqlens, rotary, sinks_H, causal, window, scale)
    check_kernels_take(OP, q_BTHK, v_BSGV)
    if rotary is not None and (
        rotary[0].shape[1].bit_count() > 1 or max(q_BTHK.shape[3], v_BSGV.shape[3]) > MAX_ROTARY_WIDTH
    ):
        # The kernels fold a head's channels in two, which takes a power of two of them, and registers that wider heads
        # do not leave.
        q_BTHK, rotary = rotate(q_BTHK, rotary, backend=backend), None
    # Imported here because machines without Triton (macOS) still have the torch backend.
    from triton_kernels.flash_attention_triton import forward_op

    return forward_op(q_BTHK, k_BSGK, v_BSGV, cu_seqlens, *(rotary or (None, None)), sinks_H, causal, window, scale)[0]


def check_attention(
    op: str,
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    causal: bool,
    window: int | None,
    scale: float | None,
    sinks_H: Tensor | None,
    cu_seqlens: Tensor | None,
) -> float:
    """The scale; raises ValueError, naming the argument, its value and what is legal."""
    sizes = check_tensors(op, q_BTHK=q_BTHK, k_BSGK=k_BSGK, v_BSGV=v_BSGV, sinks_H=sinks_H)
    check_dtype(op, {"q_BTHK": q_BTHK, "k_BSGK": k_BSGK, "v_BSGV": v_BSGV})
    T, S = sizes["T"], sizes["S"]
    if causal and T > S:
        raise ValueError(
            f"{op}: causal with T={T} queries and S={S} keys; there must be at least as many keys as queries"
        )
    if window is not None and not (causal and window >= 1):
        raise ValueError(
            f"{op}: window={window} with causal={causal}; legal are None, or at least 1 (the query itself) in causal"
            " attention"
        )
    check_cu_seqlens(op, cu_seqlens, sizes["B"], T)
    if cu_seqlens is not None and T != S:
        raise ValueError(
            f"{op}: cu_seqlens with T={T} queries and S={S} keys; they must be as many, every sequence attends to"
            " itself"
        )
    return check_heads(op, sizes, scale)


def check_heads(op: str, sizes: dict[str, int], scale: float | None) -> float:
    """The scale of the logits, K^-0.5 unless given, of H query heads that share G key heads."""
    H, G = sizes["H"], sizes["G"]
    if G == 0 or H % G != 0:
        raise ValueError(f"{op}: the queries have H={H} heads and the keys G={G}; H must be a multiple of G")
    scale = float(sizes["K"] ** -0.5 if scale is None else scale)
    if not 0 < scale < math.inf:
        raise ValueError(f"{op}: scale={scale}; it must be positive and finite")
    return scale


def check_kernels_take(op: str, *heads: Tensor, widest: int = MAX_WIDTH) -> None:
    """Raises ValueError where the Triton kernels have no form for such heads."""
    width = max(x.shape[-1] for x in heads)
    if width > widest or heads[0].dtype == torch.float64:
        raise ValueError(
            f"{op}: {heads[0].dtype} heads of width {width}; the Triton kernels take float32, float16 and bfloat16 up"
            f" to {widest}"
        )


def flash_attention_torch(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
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
        return torch.cat(
            [flash_attention_torch(q, k, v, None, None, sinks_H, causal, window, scale) for q, k, v in pieces], dim=1
        )
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

"""Decayed linear attention in torch: the chunked form used on a CPU and as the kernels' reference, and the recurrence that defines both.

    S_t = e^{g_t} S_{t-1} + k_t v_t^T        o_t = S_t^T q_t

Lightning attention (arXiv 2401.04658) and RetNet (2307.08621) fix g per head, simple GLA (2312.06635, scalar gate) makes it depend on the token.
With c the inclusive cumulative log-decay of a chunk, D_ij = e^{c_i - c_j} for i >= j (else 0) and S the state at the chunk's start,

    O = (e^c . Q) S + (Q K^T . D) V          S' = e^{c_C} S + (e^{c_C - c} . K)^T V

Letters: B batch, T tokens, H heads, K key width, V value width, N chunks, C chunk length, S sequences.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch

from triton_kernels.chunk import ChunkLayout, chunk_layout, scan_states


class ChunkedAttention(torch.autograd.Function):
    """The chunked form with its backward written out: autograd would keep every product and a graph node per chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g_BNHC: torch.Tensor,
        initial_SHKV: torch.Tensor,
        within: torch.Tensor,
        layout: ChunkLayout,
        scale: float,
    ):
        """q, k [B, N, H, C, K], v [B, N, H, C, V]; log-decay g and the state in fp32 (fp64 for fp64 inputs); within: scale * D."""
        decay = chunk_decays(g_BNHC, scale, q.dtype)
        scores = (q @ k.mT).mul_(within)
        update = ((k * decay.to_end).mT @ v).to(initial_SHKV.dtype)
        states, final = scan_states(decay.whole, update, initial_SHKV, layout)
        out = (scores @ v).add_((q * decay.from_start) @ states.to(q.dtype))
        ctx.save_for_backward(q, k, v, g_BNHC, scores, states, within)
        ctx.layout, ctx.scale = layout, scale
        return out, final

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor, dfinal: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, g_BNHC, scores, states, within = ctx.saved_tensors
        # It arrives transposed, and every product would copy it again.
        dout = dout.contiguous()
        decay = chunk_decays(g_BNHC, ctx.scale, q.dtype)
        dupdate = ((q * decay.from_start).mT @ dout).to(states.dtype)
        dstates, dinitial = scan_states(decay.whole, dupdate, dfinal, ctx.layout, reverse=True)
        dstates_low = dstates.to(q.dtype)
        dscores = (dout @ v.mT).mul_(within)
        dv = (scores.mT @ dout).add_((k * decay.to_end) @ dstates_low)
        dq = (dscores @ k).add_((dout @ states.to(q.dtype).mT).mul_(decay.from_start))
        dk_state = (v @ dstates_low.mT).mul_(decay.to_end)
        dk = (dscores.mT @ q).add_(dk_state)
        dg = None
        if ctx.needs_input_grad[3]:
            dc = row_dot(q, dq) - row_dot(k, dk)
            whole_BNH = decay.whole.squeeze(-1)
            dc[..., -1] += whole_BNH * (states * dstates).sum((-1, -2)) + row_dot(k, dk_state).sum(-1)
            dg = dc.flip(-1).cumsum(-1).flip(-1).to(g_BNHC.dtype)
        return dq, dk, dv, dg, dinitial, None, None, None


class ChunkDecays(NamedTuple):
    """Three decays of each chunk, all of them <= 1, in the products' dtype but for `whole`, which multiplies the state."""

    from_start: torch.Tensor  # [B, N, H, C, 1], times scale
    to_end: torch.Tensor  # [B, N, H, C, 1]
    whole: torch.Tensor  # [B, N, H, 1]


def chunk_decays(g_BNHC: torch.Tensor, scale: float, dtype: torch.dtype) -> ChunkDecays:
    c_BNHC = g_BNHC.cumsum(-1)
    return ChunkDecays(
        from_start=(c_BNHC.exp() * scale).to(dtype)[..., None],
        to_end=(c_BNHC[..., -1:] - c_BNHC).exp().to(dtype)[..., None],
        whole=c_BNHC[..., -1:].exp(),
    )


def decay_within(g_BNHC: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """scale * D [B, N, H, C, C]: differences of cumulative sums, masked before the exponential so that nothing overflows."""
    c_BNHC = g_BNHC.cumsum(-1)
    future_CC = torch.ones(g_BNHC.shape[-1], g_BNHC.shape[-1], dtype=torch.bool, device=g_BNHC.device).triu(1)
    difference = c_BNHC[..., :, None] - c_BNHC[..., None, :]
    return difference.masked_fill_(future_CC, -torch.inf).exp_().mul_(scale).to(dtype)


def row_dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Inner product over the last axis, accumulated in fp32 at least."""
    return (a.to(torch.promote_types(a.dtype, torch.float32)) * b).sum(-1)


def token_log_decay(log_decay: torch.Tensor | None, q_BTHK: torch.Tensor) -> torch.Tensor:
    """Any legal log_decay as [B, T, H]."""
    return (q_BTHK.new_zeros((), dtype=torch.float32) if log_decay is None else log_decay).expand(q_BTHK.shape[:3])


def decayed_linear_attention_torch(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    log_decay: torch.Tensor | None,
    initial_SHKV: torch.Tensor | None,
    *,
    scale: float,
    cu_seqlens: torch.Tensor | None,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The chunked form behind `decayed_linear_attention`; log_decay is None, [H] or [B, T, H]."""
    layout = chunk_layout(q_BTHK.shape[1], chunk_size, cu_seqlens)
    state_dtype = torch.promote_types(q_BTHK.dtype, torch.float32)
    if initial_SHKV is None:
        n_states = q_BTHK.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        initial_SHKV = q_BTHK.new_zeros(n_states, *q_BTHK.shape[2:], v_BTHV.shape[3], dtype=state_dtype)
    q, k, v = (layout.to_chunks(x) for x in (q_BTHK, k_BTHK, v_BTHV))
    g_BNHC = layout.to_chunks(token_log_decay(log_decay, q_BTHK)[..., None]).squeeze(-1).to(state_dtype)
    if log_decay is not None and log_decay.dim() == 3:
        within = decay_within(g_BNHC.detach(), scale, q.dtype)
    else:
        # One decay per head: all chunks share one matrix, which is most of the exponentials.
        steady_H = torch.zeros(q.shape[2], device=q.device) if log_decay is None else log_decay.detach()
        within = decay_within(steady_H.to(state_dtype)[None, None, :, None].expand(1, 1, -1, chunk_size), scale, q.dtype)
    out, final_SHKV = ChunkedAttention.apply(q, k, v, g_BNHC, initial_SHKV, within, layout, scale)  # pyright: ignore[reportGeneralTypeIssues]
    return layout.from_chunks(out), final_SHKV


def decayed_linear_attention_recurrence(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    log_decay_BTH: torch.Tensor,
    initial_SHKV: torch.Tensor,
    *,
    scale: float = 1.0,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, token by token in the dtype given (fp64 in tests): what every other form is checked against."""
    offsets = [0, q_BTHK.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    outputs, finals = [torch.zeros_like(v_BTHV[:, :0])], []
    for sequence, (first, last) in enumerate(pairwise(offsets)):
        state = initial_SHKV if cu_seqlens is None else initial_SHKV[sequence : sequence + 1]
        for t in range(first, last):
            state = log_decay_BTH[:, t, :, None, None].exp() * state + k_BTHK[:, t, :, :, None] * v_BTHV[:, t, :, None, :]
            outputs.append((scale * q_BTHK[:, t, :, None, :] @ state).transpose(1, 2))
        finals.append(state)
    return torch.cat(outputs, 1), torch.cat(finals)

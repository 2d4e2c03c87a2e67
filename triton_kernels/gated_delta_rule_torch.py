"""The gated delta rule in torch: chunks by the WY transform with a hand-written backward, used on a CPU and as the kernels' reference.

    S_t = e^{g_t} (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T        o_t = S_t^T q_t

With c the inclusive cumulative log-decay of a chunk, S the state at its start and E the prediction errors of its tokens (the write to the state is
b E), queries and keys read the same things: q reads the output, k what is already predicted. Stack them as L = [q; k] and let
D_ij = e^{c_i - c_j} (j <= i for queries, j < i for keys), F = L K^T . D . b_j, w_j = b_j e^{c_C - c_j} k_j; then

    [O; V - E] = e^c L S + F E        S' = e^{c_C} S + w^T E

so that E = (I + G)^-1 (V - e^c K S), G the key half of F. Backward, with dV = (I + G)^-T dE, dE = F_q^T dO + w dS' and Y = [dO; -dV]:

    dL = e^c Y S^T + (Y E^T . D) b K      U = (Y E^T . D)^T L + e^{c_C - c} E dS'^T      dK = dL_k + b U      db = <K, U>
    dc = <Q, dL_q> + <K, dL_k> - b db,  dc_C += <dS', S'>                                  dS = e^{c_C} dS' + (e^c L)^T Y

Derived in notes/kernels/gated_delta_rule.md. WY form: arXiv 2406.06484; gate: arXiv 2412.06464.
Letters: B batch, T tokens, H value heads, N chunks, M = B * H, C chunk length, R = 2C rows of L, K key width, V value width, S sequences.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from triton_kernels.chunk import ChunkLayout, chunk_layout
from triton_kernels.delta_inverse import invert_unit_lower


class ChunkedDeltaRule(torch.autograd.Function):
    """Autograd would keep a matrix [C, C] per product and several graph nodes per chunk; written out, the backward is fourteen products."""

    @staticmethod
    def forward(ctx: Any, qk: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, initial: Tensor, layout: ChunkLayout, grouped: int):
        """qk [N, M / grouped, R, K] (q scaled), v [N, M, C, V], g and beta [N, M, C], initial [S, M * spans / S, K, V], all in one dtype."""
        qk = qk.repeat_interleave(grouped, 1) if grouped > 1 else qk
        N, M, R, K = qk.shape
        C, V = R // 2, v.shape[-1]
        k = qk[:, :, C:]
        decay, from_start, to_end = chunk_decays(g, qk)
        scores = product(qk, k.mT).mul_(decay).mul_(beta[:, :, None])
        inverse = invert_unit_lower(scores[:, :, C:].reshape(-1, C, C)).view(N, M, C, C)
        read, write, keep = qk * from_start, k * (beta[..., None] * to_end), from_start[:, :, -1:]

        states, errors, finals = qk.new_empty(N, M, K, V), torch.empty_like(v), torch.empty_like(initial)
        for first, last, rows in layout.spans:
            state = initial[rows].flatten(0, 1)
            for n in range(first, last):
                states[n] = state
                residual = torch.baddbmm(v[n], read[n, :, C:], state, alpha=-1)
                torch.bmm(inverse[n], residual, out=errors[n])
                state = torch.baddbmm(keep[n] * state, write[n].mT, errors[n])
            finals[rows] = state.view(finals[rows].shape)
        out = product(read[:, :, :C], states, product(scores[:, :, :C], errors))
        ctx.save_for_backward(qk, beta, decay, from_start, to_end, scores, inverse, states, errors, finals)
        ctx.layout, ctx.grouped, ctx.gated = layout, grouped, g is not None
        return out, finals

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dfinals: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        qk, beta, decay, from_start, to_end, scores, inverse, states, errors, finals = ctx.saved_tensors
        C = beta.shape[-1]
        k = qk[:, :, C:]
        read, write, keep = qk * from_start, k * (beta[..., None] * to_end), from_start[:, :, -1:]

        derrors = product(scores[:, :, :C].mT, dout)
        dstates = product(read[:, :, :C].mT, dout)
        dv, dnext, dfinals = torch.empty_like(dout), torch.empty_like(states), dfinals.clone()
        dwhole = torch.empty_like(beta[..., 0])
        for first, last, rows in ctx.layout.spans:
            dstate, after = dfinals[rows].flatten(0, 1), finals[rows].flatten(0, 1)
            for n in reversed(range(first, last)):
                dnext[n] = dstate
                dwhole[n] = (dstate * after).sum((-1, -2))
                torch.bmm(inverse[n].mT, torch.baddbmm(derrors[n], write[n], dstate), out=dv[n])
                dstate = torch.addcmul(dstates[n], keep[n], dstate).baddbmm_(read[n, :, C:].mT, dv[n], alpha=-1)
                after = states[n]
            dfinals[rows] = dstate.view(dfinals[rows].shape)

        dread = torch.cat([dout, -dv], 2)
        dscores = product(dread, errors.mT).mul_(decay)
        dqk = product(dscores, k * beta[..., None], product(dread, states.mT).mul_(from_start))
        dwrite = product(dscores.mT, qk, product(errors, dnext.mT).mul_(to_end))
        dbeta = torch.linalg.vecdot(k, dwrite)
        dg = None
        if ctx.gated:
            dc = torch.linalg.vecdot(qk, dqk).unflatten(-1, (2, C)).sum(-2).addcmul_(beta, dbeta, value=-1)
            dc[..., -1] += dwhole
            dg = dc.flip(-1).cumsum(-1).flip(-1)
        dqk[:, :, C:].addcmul_(beta[..., None], dwrite)
        dqk = dqk.unflatten(1, (-1, ctx.grouped)).sum(2) if ctx.grouped > 1 else dqk
        return dqk, dv, dg, dbeta, dfinals, None, None


def product(a: Tensor, b: Tensor, base: Tensor | None = None) -> Tensor:
    """base + a @ b of [N, M, ., .] stacks, as one batch that is read in place (torch.matmul would copy transposed operands)."""
    if base is None:
        return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).view(*a.shape[:3], b.shape[3])
    return torch.baddbmm(base.flatten(0, 1), a.flatten(0, 1), b.flatten(0, 1)).view(base.shape)


def chunk_decays(g: Tensor | None, qk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """D [N, M, R, C], e^c twice [N, M, R, 1] and e^{c_C - c} [N, M, C, 1], each at most 1."""
    N, M, R, _ = qk.shape
    row = torch.arange(R // 2, device=qk.device)
    hidden = torch.cat([row[:, None] < row, row[:, None] <= row])
    if g is None:
        ones = qk.new_ones(()).expand(N, M, R, 1)
        return torch.where(hidden, 0, ones), ones, ones[:, :, : R // 2]
    c = g.cumsum(-1)
    # The mask comes before the exponential: above the diagonal it would overflow, and inf * 0 is NaN.
    decay = (torch.cat([c, c], -1)[..., :, None] - c[..., None, :]).masked_fill_(hidden, -torch.inf).exp_()
    return decay, c.exp().repeat(1, 1, 2)[..., None], (c[..., -1:] - c).exp()[..., None]


def unit_rows(x: Tensor) -> Tensor:
    """Rows of length 1 over the last axis; rows of zeros stay zero."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def gated_delta_rule_torch(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTH: Tensor | None,
    beta_BTH: Tensor,
    initial_SHKV: Tensor,
    *,
    scale: float,
    normalize_qk: bool,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Chunked reference in fp32 (fp64 for fp64 inputs); the arguments are those of `gated_delta_rule`, checked and filled in by it."""
    batch, tokens, heads, _ = v_BTHV.shape
    layout = chunk_layout(tokens, chunk_size, cu_seqlens)

    def chunks(x: Tensor) -> Tensor:
        return layout.to_chunks(x.to(initial_SHKV.dtype)).transpose(0, 1).flatten(1, 2)

    q, k = chunks(q_BTGK), chunks(k_BTGK)
    if normalize_qk:
        q, k = unit_rows(q), unit_rows(k)
    g = None if log_decay_BTH is None else chunks(log_decay_BTH[..., None]).squeeze(-1)
    out, final = ChunkedDeltaRule.apply(  # pyright: ignore[reportGeneralTypeIssues]
        torch.cat([q * scale, k], 2), chunks(v_BTHV), g, chunks(beta_BTH[..., None]).squeeze(-1), initial_SHKV, layout, heads // q_BTGK.shape[2]
    )
    return layout.from_chunks(out.unflatten(1, (batch, heads)).transpose(0, 1)).to(v_BTHV.dtype), final


def gated_delta_rule_recurrence(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, log_decay_BTH: Tensor, beta_BTH: Tensor, initial_SHKV: Tensor, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, token by token in the dtype given (fp64 in tests), q scaled: what every other form is checked against.

    `log_decay` is [B, T, H], or [B, T, H, K] for a decay per key channel (Kimi delta attention)."""
    offsets = [0, q_BTHK.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    g = log_decay_BTH if log_decay_BTH.dim() == 4 else log_decay_BTH[..., None]
    outputs, finals = [torch.zeros_like(v_BTHV[:, :0])], []
    for sequence, (first, last) in enumerate(pairwise(offsets)):
        state = initial_SHKV if cu_seqlens is None else initial_SHKV[sequence : sequence + 1]
        for t in range(first, last):
            k = k_BTHK[:, t, :, :, None]
            state = g[:, t, :, :, None].exp() * state
            error = v_BTHV[:, t, :, None, :] - (k * state).sum(-2, keepdim=True)
            state = state + beta_BTH[:, t, :, None, None] * k * error
            outputs.append((q_BTHK[:, t, :, None, :] @ state).transpose(1, 2))
        finals.append(state)
    return torch.cat(outputs, 1), torch.cat(finals)

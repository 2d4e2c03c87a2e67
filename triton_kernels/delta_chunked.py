"""The chunked delta rule in torch, whatever its gate: the WY transform with a hand-written backward.

    S_t = (I - b_t k_t k_t^T) e^{g_t} S_{t-1} + b_t k_t v_t^T        o_t = S_t^T q_t        e^{g_t} a scalar, or diagonal over the key channels

With c the inclusive cumulative log-decay of a chunk, S the state at its start and E the prediction errors of its tokens (the write to the state is
b E), queries and keys read the same things: q reads the output, k what is already predicted. Stack them as L = [q; k] and let F_ij =
b_j sum_d L_id k_jd e^{c_id - c_jd} (j <= i for queries, j < i for keys) and w_j = b_j e^{c_C - c_j} k_j; then

    [O; V - E] = e^c L S + F E        S' = e^{c_C} S + w^T E

so that E = (I + G)^-1 (V - e^c K S), G the key half of F. Backward, with dV = (I + G)^-T dE, dE = F_q^T dO + w dS', Y = [dO; -dV], Z = Y E^T:

    dL_i = e^{c_i} Y_i S^T + sum_j Z_ij b_j k_j e^{c_i - c_j}      U_j = sum_i Z_ij L_i e^{c_i - c_j} + e^{c_C - c_j} E_j dS'^T
    dK = dL_k + b U      db = <K, U>      dc = q dL_q + k dL_k - b k U,  dc_C += rows of dS' S'      dS = e^{c_C} dS' + (e^c L)^T Y

Derived in notes/kernels/gated_delta_rule.md. WY form: arXiv 2406.06484; gates: 2412.06464 (scalar), 2510.26692 (per channel).
Letters: B batch, T tokens, G query/key heads, H value heads, n chunks of a block, M = B * H, C chunk length, R = 2C rows of L, K key width,
V value width, S sequences.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from triton_kernels.chunk import ChunkLayout
from triton_kernels.delta_blocks import blocks_of, load_qk, product, store_qk_gradients
from triton_kernels.delta_inverse import invert_unit_lower


class Decay(Protocol):
    """The decays inside the chunks of a block: what differs between the gates."""

    # e^c [n, M, C, 1 or K], e^{c_C - c} [n, M, C, 1 or K], e^{c_C} [n, M, 1 or K, 1]
    from_start: Tensor
    to_end: Tensor
    whole: Tensor

    def scores(self, qk: Tensor, k: Tensor) -> Tensor:
        """sum_d L_id k_jd e^{c_id - c_jd} [n, M, R, C], zero where j is hidden from i."""
        ...

    def scores_backward(self, dscores: Tensor, qk: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Its two gradients, [n, M, R, K] and [n, M, C, K]."""
        ...


class DecayFactory(Protocol):
    def __call__(self, g: Tensor | None, qk: Tensor) -> Decay: ...


class ChunkedDeltaRule(torch.autograd.Function):
    """Autograd would keep a matrix [C, C] per product and several graph nodes per chunk; written out, only the states, the errors and the inverses
    are kept, and the rest is computed again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, initial: Tensor, layout: ChunkLayout, options: tuple):
        """q, k [B, T, G, K], v [B, T, H, V], g [B, T, H] or [B, T, H, K], beta [B, T, H], initial [S, H, K, V] in the dtype to compute in."""
        make_decay, scale, normalize_qk = options
        (B, _, H, V), K, C, dtype = v.shape, q.shape[3], layout.chunk_size, initial.dtype
        blocks = blocks_of(layout, B * H * C * max(K, V))
        out, finals = torch.empty_like(v), initial.clone()
        states, errors = initial.new_empty(layout.n_chunks, B * H, K, V), initial.new_empty(layout.n_chunks, B * H, C, V)
        inverses = initial.new_empty(layout.n_chunks, B * H, C, C)
        state = initial
        for block in blocks:
            here = slice(block.first, block.last)
            qk, values, b = load_qk(block, q, k, H, dtype, scale, normalize_qk), block.load(v, dtype), block.load(beta, dtype)[..., None]
            keys = qk[:, :, C:]
            decay = make_decay(None if g is None else block.load(g, dtype), qk)
            scores = decay.scores(qk, keys).mul_(b.mT)
            read_q, read_k, write = qk[:, :, :C] * decay.from_start, keys * decay.from_start, keys * (b * decay.to_end)
            inverses[here] = invert_unit_lower(scores[:, :, C:].reshape(-1, C, C)).view(inverses[here].shape)
            for n in range(block.first, block.last):
                i = n - block.first
                if n in block.starts:
                    state = initial[block.starts[n]].flatten(0, 1)
                states[n] = state
                torch.bmm(inverses[n], torch.baddbmm(values[i], read_k[i], state, alpha=-1), out=errors[n])
                state = torch.baddbmm(decay.whole[i] * state, write[i].mT, errors[n])
                if n in block.ends:
                    finals[block.ends[n]] = state.unflatten(0, (-1, H))
            block.store(out, product(read_q, states[here], product(scores[:, :, :C], errors[here])))
        ctx.save_for_backward(q, k, v, g, beta, states, errors, inverses, finals)
        ctx.blocks, ctx.options = blocks, options
        return out, finals

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dfinals: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, g, beta, states, errors, inverses, finals = ctx.saved_tensors
        make_decay, scale, normalize_qk = ctx.options
        H, C, dtype = v.shape[2], errors.shape[2], states.dtype
        dq, dk, dv, dbeta = (torch.empty_like(x) for x in (q, k, v, beta))
        dg = None if g is None else torch.empty_like(g)
        dinitial = dfinals.clone()
        dstate = after = states
        for block in reversed(ctx.blocks):
            here = slice(block.first, block.last)
            qk, douts, b = load_qk(block, q, k, H, dtype, scale, normalize_qk), block.load(dout, dtype), block.load(beta, dtype)[..., None]
            keys = qk[:, :, C:]
            decay = make_decay(None if g is None else block.load(g, dtype), qk)
            scores = decay.scores(qk, keys).mul_(b.mT)
            read_q, read_k, write = qk[:, :, :C] * decay.from_start, keys * decay.from_start, keys * (b * decay.to_end)
            derrors, dstates = product(scores[:, :, :C].mT, douts), product(read_q.mT, douts)
            dvalues, dnext, dwhole = torch.empty_like(derrors), torch.empty_like(dstates), torch.empty_like(dstates[..., 0])
            for n in reversed(range(block.first, block.last)):
                i = n - block.first
                if n in block.ends:
                    dstate, after = dfinals[block.ends[n]].flatten(0, 1), finals[block.ends[n]].flatten(0, 1)
                dnext[i] = dstate
                dwhole[i] = torch.linalg.vecdot(dstate, after)
                torch.bmm(inverses[n].mT, torch.baddbmm(derrors[i], write[i], dstate), out=dvalues[i])
                dstate = torch.addcmul(dstates[i], decay.whole[i], dstate).baddbmm_(read_k[i].mT, dvalues[i], alpha=-1)
                after = states[n]
                if n in block.starts:
                    dinitial[block.starts[n]] = dstate.unflatten(0, (-1, H))

            dread = torch.cat([douts, -dvalues], 2)
            dqk, dkeys = decay.scores_backward(product(dread, errors[here].mT), qk, keys * b)
            dqk.unflatten(2, (2, C)).addcmul_(product(dread, states[here].mT).unflatten(2, (2, C)), decay.from_start[:, :, None])
            dkeys.addcmul_(product(errors[here], dnext.mT), decay.to_end)
            if dg is not None:
                dc = (qk * dqk).unflatten(2, (2, C)).sum(2).addcmul_(keys * b, dkeys, value=-1)
                dc[:, :, -1] += dwhole
                dc = dc if g.dim() == 4 else dc.sum(-1)
                block.store(dg, dc.flip(2).cumsum(2).flip(2))
            block.store(dbeta, torch.linalg.vecdot(keys, dkeys))
            dqk[:, :, C:].addcmul_(b, dkeys)
            store_qk_gradients(block, dqk, q, k, dq, dk, scale, normalize_qk)
            block.store(dv, dvalues)
        return dq, dk, dv, dg, dbeta, dinitial, None, None

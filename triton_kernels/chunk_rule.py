"""Chunked linear attention in torch, whatever the gate, with the delta rule's correction or without: forward, and the backward written out.

    S_t = (I - b_t k_t k_t^T) e^{g_t} S_{t-1} + b_t k_t v_t^T        o_t = S_t^T q_t        e^{g_t} a scalar, or diagonal over the key channels

With c the inclusive cumulative log-decay of a chunk, S the state at its start and E the prediction errors of its tokens (the write to the state is
b E), a row x_i (a query; or a key, which reads what is already predicted) reads e^{c_i} x_i S + sum_j F_ij E_j with
F_ij = b_j sum_d x_id k_jd e^{c_id - c_jd}, for j <= i (queries) or j < i (keys: G). So with w_j = b_j e^{c_C - c_j} k_j

    O = e^c Q S + F E        E = (I + G)^-1 (V - e^c K S)        S' = e^{c_C} S + w^T E

Without the correction there is no G: E is V and b is 1. Backward, with dV = (I + G)^-T dE, dE = F^T dO + w dS', Y = dO for the queries and -dV for
the keys, Z = Y E^T of each:

    dx_i = e^{c_i} Y_i S^T + sum_j Z_ij b_j k_j e^{c_i - c_j}      U_j = sum_i Z_ij x_i e^{c_i - c_j} (of both) + e^{c_C - c_j} E_j dS'^T
    dK = dx + b U      db = <K, U>      dc = q dq + k dx - b k U,  dc_C += rows of dS' S'      dS = e^{c_C} dS' + (e^c x)^T Y

Derived in notes/kernels/gated_delta_rule.md. WY form: arXiv 2406.06484; gates: 2312.06635, 2412.06464 (scalar), 2510.26692 (per channel).
Letters: B batch, T tokens, G query/key heads, H value heads, n chunks of a block, M = B * H, C chunk length, K key width, V value width, S sequences.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from triton_kernels.chunk import Block, chunk_blocks
from triton_kernels.chunk_decay import Decay, product
from triton_kernels.chunk_inverse import invert_unit_lower

EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class Rule:
    """decay makes the decays of a block from its log-decays [n, M, C] or [n, M, C, K]."""

    decay: Callable[[Tensor], Decay]
    scale: float
    normalize_qk: bool = False


class ChunkedRule(torch.autograd.Function):
    """Autograd would keep a matrix [C, C] per product and several graph nodes per chunk; here only what the backward cannot cheaply make again is
    kept. The state and the gates are in fp32 (fp64 for fp64 inputs), and so are the products of all inputs but bf16, whose products are in bf16."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, initial: Tensor, cu_seqlens: Tensor | None, chunk: int, rule: Rule
    ):
        """q, k [B, T, G, K], v [B, T, H, V], g [B, T, H] or [B, T, H, K], beta [B, T, H] or None for no correction, initial [S, H, K, V]."""
        (B, T, H, V), K, exact = v.shape, q.shape[3], initial.dtype
        dtype = torch.bfloat16 if q.dtype == torch.bfloat16 else exact
        blocks = chunk_blocks(T, chunk, cu_seqlens, B * H * chunk * max(K, V) * dtype.itemsize)
        out, finals, state = torch.empty_like(v), initial.clone(), initial
        kept: list[Tensor | None] = []
        for block in blocks:
            decay = rule.decay(block.load(g, exact))
            queries = load_heads(block, q, H, dtype, rule.scale, rule.normalize_qk)
            keys = load_heads(block, k, H, dtype, 1.0, rule.normalize_qk)
            weighted = keys if beta is None else (keys * block.load(beta, exact)[..., None]).to(dtype)
            read_q, write = (queries * decay.from_start).to(dtype), (weighted * decay.to_end).to(dtype)
            attention = decay.scores(queries, weighted)
            errors, states = block.load(v, dtype), queries.new_empty(*queries.shape[:2], K, V)
            inverse = read_k = None
            if beta is not None:
                # Errors of the correction would come back multiplied by its inverse, so it is never rounded to bf16.
                correction = decay.scores(keys.to(exact), weighted.to(exact)).tril_(-1)
                inverse = invert_unit_lower(correction.flatten(0, 1)).view_as(correction).to(dtype)
                read_k = (keys * decay.from_start).to(dtype)
            for i in range(block.n_chunks):
                if i in block.starts:
                    state = initial[block.starts[i]].flatten(0, 1)
                states[i] = state
                if inverse is not None and read_k is not None:
                    errors[i] = torch.bmm(inverse[i], torch.baddbmm(errors[i], read_k[i], states[i], alpha=-1))
                state = add_product(decay.whole[i] * state, write[i].mT, errors[i])
                if i in block.ends:
                    finals[block.ends[i]] = state.unflatten(0, (-1, H))
            block.store(out, product(attention, errors).add_(product(read_q, states)))
            kept += [queries, keys, attention, inverse, errors, states]
        ctx.save_for_backward(q, k, v, g, beta, *kept)
        ctx.blocks, ctx.rule = blocks, rule
        return out, finals

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dfinals: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, g, beta, *kept = ctx.saved_tensors
        rule, exact = ctx.rule, dfinals.dtype
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        dg = g.new_empty(g.shape) if ctx.needs_input_grad[3] else None
        dbeta = None if beta is None else torch.empty_like(beta)
        dinitial = dfinals.clone()
        dstate = dinitial
        for number, block in reversed(list(enumerate(ctx.blocks))):
            queries, keys, attention, inverse, errors, states = kept[6 * number : 6 * number + 6]
            dtype = queries.dtype
            decay = rule.decay(block.load(g, exact))
            b = None if beta is None else block.load(beta, exact)[..., None]
            weighted = keys if b is None else (keys * b).to(dtype)
            read_q, write = (queries * decay.from_start).to(dtype), (weighted * decay.to_end).to(dtype)
            read_k = None if b is None else (keys * -decay.from_start).to(dtype)
            douts = block.load(dout, dtype)
            derrors = product(attention.mT, douts)
            dvalues, dnext = torch.empty_like(derrors), torch.empty_like(states)
            for i in reversed(range(block.n_chunks)):
                if i in block.ends:
                    dstate = dfinals[block.ends[i]].flatten(0, 1)
                dnext[i] = dstate
                derror = torch.baddbmm(derrors[i], write[i], dnext[i])
                dvalues[i] = derror if inverse is None else torch.bmm(inverse[i].mT, derror)
                dstate = add_product(decay.whole[i] * dstate, read_q[i].mT, douts[i])
                if read_k is not None:
                    dstate = add_product(dstate, read_k[i].mT, dvalues[i])
                if i in block.starts:
                    dinitial[block.starts[i]] = dstate.unflatten(0, (-1, dinitial.shape[1]))
            block.store(dv, dvalues)

            # What was written, U: read by later chunks, then by the queries and the keys of this one.
            dwritten = product(errors, dnext.mT) * decay.to_end
            # Rows of dS' S', as what the chunk began with and what it wrote.
            dc_end = (dnext * states).sum(-1).mul_(decay.whole[..., 0]).add_((weighted * dwritten).sum(2)) if dg is not None else None
            readers = [(queries, douts, 0)] if b is None else [(queries, douts, 0), (keys, -dvalues, -1)]
            drows = []
            for rows, y, last_seen in readers:
                drow, dkey = decay.scores_backward(product(y, errors.mT).tril_(last_seen), rows, weighted)
                drows.append((product(y, states.mT) * decay.from_start).add_(drow))
                dwritten += dkey
            if dg is not None:
                dc = (weighted * dwritten).neg_()
                for (rows, _, _), drow in zip(readers, drows):
                    dc += rows * drow
                dc[:, :, -1] += dc_end
                dc = dc if g.dim() == 4 else dc.sum(-1)
                block.store(dg, dc.flip(2).cumsum(2).flip(2))
            if b is None:
                drows.append(dwritten)
            else:
                block.store(dbeta, (keys * dwritten).sum(-1))
                drows[1].addcmul_(b, dwritten)
            store_heads(block, drows[0], q, dq, rule.scale, rule.normalize_qk)
            store_heads(block, drows[1], k, dk, 1.0, rule.normalize_qk)
        return dq, dk, dv, dg, dbeta, dinitial, None, None, None


def chunked_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, initial: Tensor | None, cu_seqlens: Tensor | None, chunk_size: int, rule: Rule
) -> tuple[Tensor, Tensor]:
    """`ChunkedRule` with a state of zeros where none is given."""
    if initial is None:
        n_states = v.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        initial = v.new_zeros(n_states, v.shape[2], q.shape[3], v.shape[3], dtype=torch.promote_types(v.dtype, torch.float32))
    return ChunkedRule.apply(q, k, v, g, beta, initial, cu_seqlens, chunk_size, rule)  # pyright: ignore


def add_product(base: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """base + a @ b in the dtype of base, which may be wider; takes `base` for its own."""
    return base.baddbmm_(a, b) if base.dtype == a.dtype else base.add_(torch.bmm(a, b))


def inverse_length(x: Tensor) -> Tensor:
    """1 / length over the last axis, finite for rows of zeros."""
    return (x.square().sum(-1, keepdim=True) + EPSILON).rsqrt()


def load_heads(block: Block, x: Tensor, heads: int, dtype: torch.dtype, scale: float, normalize: bool) -> Tensor:
    """Queries or keys, normalised and scaled, for every value head [n, M, C, K]."""
    rows = block.load(x, torch.promote_types(dtype, torch.float32))
    if normalize:
        rows *= inverse_length(rows)
    if scale != 1.0:
        rows *= scale
    rows = rows.to(dtype)
    return rows if heads == x.shape[2] else rows.repeat_interleave(heads // x.shape[2], 1)


def store_heads(block: Block, drows: Tensor, x: Tensor, dx: Tensor, scale: float, normalize: bool) -> None:
    """The adjoint of `load_heads`: the gradient of what it returned, into the tokens of dx."""
    if drows.shape[1] != x.shape[0] * x.shape[2]:
        drows = drows.unflatten(1, (x.shape[0] * x.shape[2], -1)).sum(2)
    if scale != 1.0:
        drows = drows * scale
    if normalize:
        rows = block.load(x, drows.dtype)
        length = inverse_length(rows)
        rows *= length
        drows = (drows - rows * (drows * rows).sum(-1, keepdim=True)) * length
    block.store(dx, drows)

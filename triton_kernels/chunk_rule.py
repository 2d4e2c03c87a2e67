"""Chunked linear attention in torch, whatever the gate, with the delta rule's correction or without: forward, and the backward written out.

    S_t = (I - b_t k_t k_t^T) e^{g_t} S_{t-1} + b_t k_t v_t^T        o_t = S_t^T q_t        e^{g_t} a scalar, or diagonal over the key channels

With c the inclusive cumulative log-decay of a chunk, S the state at its start and E the prediction errors of its tokens (the write to the state is
b E), a row x_i (a query; or a key, which reads what is already predicted) reads e^{c_i} x_i S + sum_j F_ij E_j with
F_ij = b_j sum_d x_id k_jd e^{c_id - c_jd}, for j <= i (queries) or j < i (keys: G). So with w_j = b_j e^{c_C - c_j} k_j and A = (I + G)^-1

    O = e^c Q S + F E        E = A V - (A e^c K) S        S' = e^{c_C} S + w^T E

Without the correction there is no G: E is V and b is 1. Backward, with dE = F^T dO + w dS', dV = A^T dE, Y = dO for the queries and -dV for the
keys, Z = Y E^T of each:

    dx_i = e^{c_i} Y_i S^T + sum_j Z_ij b_j k_j e^{c_i - c_j}      U_j = sum_i Z_ij x_i e^{c_i - c_j} (of both) + e^{c_C - c_j} E_j dS'^T
    dK = dx + b U      db = <K, U>      dc = q dq + k dx - b k U,  dc_C += rows of dS' S'      dS = e^{c_C} dS' + (e^c Q)^T dO - (A e^c K)^T dE

Derived in notes/kernels/gated_delta_rule.md. WY form: arXiv 2406.06484; gates: 2312.06635, 2412.06464 (scalar), 2510.26692 (per channel).
Letters: B batch, T tokens, G query/key heads, H value heads, n chunks of a block, N of all blocks, M = B * H, r kinds of rows (queries; queries and
keys), C chunk length, K key width, V value width, S sequences.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from triton_kernels.chunk import Block, Scratch, chunk_blocks, scratch_on
from triton_kernels.chunk_decay import ChannelDecay, ScalarDecay, add_product, off_diagonal, product

EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class Rule:
    """decay makes the decays of a block from its log-decays [n, M, C] or [n, M, C, K]; `whole_chunks` are those of a block without padding where it
    is the same for all of them, one chunk [1, M, C] standing for n."""

    decay: Callable[[Tensor, Scratch], ScalarDecay | ChannelDecay]
    scale: float
    normalize_qk: bool = False
    whole_chunks: ScalarDecay | None = None


class Operands:
    """What forward and backward make of a block's inputs, before any state is known."""

    def __init__(self, block: Block, q: Tensor, k: Tensor, g: Tensor, beta: Tensor | None, rule: Rule, scratch: Scratch, dtype: torch.dtype):
        n, M, C, K = block.n_chunks, q.shape[0] * g.shape[2], block.chunk_size, q.shape[3]
        exact = torch.promote_types(dtype, torch.float32)
        if rule.whole_chunks is not None and block.rows is None:
            self.decay = rule.whole_chunks
        else:
            self.decay = rule.decay(block.load(g, scratch("gates", exact, n, M, C, *g.shape[3:])), scratch)
        readers = [q] if beta is None else [q, k]
        # Queries, and keys where they read too, as one stack of rows.
        rows = scratch("rows", exact, n, M, len(readers), C, K)
        for kind, x in enumerate(readers):
            block.load(x, rows[:, :, kind])
        self.lengths = inverse_length(rows) if rule.normalize_qk else None
        if self.lengths is not None:
            rows *= self.lengths
        weighted, self.b = scratch("weighted", exact, n, M, C, K), None
        if beta is None:
            block.load(k, weighted)
        else:
            self.b = block.load(beta, scratch("beta", exact, n, M, C))[..., None]
            torch.mul(rows[:, :, 1], self.b, out=weighted)
        # As they are, and rounded for the products.
        self.exact_rows, self.exact_weighted = rows, weighted
        self.rows, self.weighted = rows, weighted
        if dtype != exact:
            self.rows, self.weighted = scratch("rows", dtype, *rows.shape).copy_(rows), scratch("weighted", dtype, *weighted.shape).copy_(weighted)
        self.read = torch.mul(self.rows, self.decay.from_start[:, :, None].to(dtype), out=scratch("read", dtype, *rows.shape))
        self.write = torch.mul(self.weighted, self.decay.to_end.to(dtype), out=scratch("write", dtype, n, M, C, K))


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
        N, M, r, scratch = blocks[-1].chunks.stop if blocks else 0, B * H, 1 if beta is None else 2, scratch_on(q.device)
        out, finals, state = torch.empty_like(v), initial.clone(), initial
        attention_NMCC, states_NMKV = v.new_empty(N, M, chunk, chunk, dtype=dtype), v.new_empty(N + 1, M, K, V, dtype=dtype)
        inverse_NMCC = errors_NMCV = None
        if beta is not None:
            inverse_NMCC, errors_NMCV = torch.empty_like(attention_NMCC), v.new_empty(N, M, chunk, V, dtype=dtype)
        for block in blocks:
            n = block.n_chunks
            x = Operands(block, q, k, g, beta, rule, scratch, dtype)
            attention, states = attention_NMCC[block.chunks], states_NMKV[block.chunks]
            after = states_NMKV[block.chunks.start + 1 : block.chunks.stop + 1]
            values = block.load(v, scratch("values", dtype, n, M, chunk, V))
            # Errors of the correction would come back multiplied by its inverse, so scores with one are never rounded to bf16.
            if errors_NMCV is None or inverse_NMCC is None:
                x.decay.scores(x.rows, x.weighted, attention[:, :, None])
                errors, minus_w = values, None
            else:
                scores = x.decay.scores(x.exact_rows, x.exact_weighted, scratch("scores", exact, n, M, r, chunk, chunk))
                attention.copy_(scores[:, :, 0])
                scores[:, :, 1].diagonal(dim1=2, dim2=3).zero_()
                inverse = inverse_NMCC[block.chunks].copy_(invert_unit_lower(scores[:, :, 1].flatten(0, 1)).unflatten(0, (n, M)))
                errors = product(inverse, values, errors_NMCV[block.chunks])
                minus_w = product(inverse, x.read[:, :, 1], scratch("minus w", dtype, n, M, chunk, K)).neg_()
            # What the chunks write to the state, where the state after them will lie; where nothing is corrected, it does not wait for the state.
            updates = after if dtype == exact else scratch("updates", dtype, n, M, K, V)
            if minus_w is None:
                product(x.write.mT, errors, updates)
            wholes = x.decay.whole.expand(n, *x.decay.whole.shape[1:])
            for i, (before, error, update, whole, next_) in enumerate(zip(states, errors, updates, wholes, after)):
                if i in block.starts:
                    state = initial[block.starts[i]].flatten(0, 1)
                    before.copy_(state)
                if minus_w is not None:
                    error.baddbmm_(minus_w[i], before)
                    torch.bmm(x.write[i].mT, error, out=update)
                state = advance(state, whole, update, next_)
                if i in block.ends:
                    finals[block.ends[i]] = state.unflatten(0, (-1, H))
            out_nMCV = product(attention, errors, scratch("out", dtype, n, M, chunk, V))
            block.store(out, add_product(out_nMCV, x.read[:, :, 0], states).mul_(rule.scale))
        ctx.save_for_backward(q, k, v, g, beta, attention_NMCC, states_NMKV, inverse_NMCC, errors_NMCV)
        ctx.blocks, ctx.rule = blocks, rule
        return out, finals

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dfinals: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, g, beta, attention_NMCC, states_NMKV, inverse_NMCC, errors_NMCV = ctx.saved_tensors
        rule, exact, dtype, scratch = ctx.rule, dfinals.dtype, states_NMKV.dtype, scratch_on(q.device)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        dg = g.new_empty(g.shape) if ctx.needs_input_grad[3] else None
        dbeta = None if beta is None else torch.empty_like(beta)
        dstate, dinitial = None, dfinals.clone()
        for block in reversed(ctx.blocks):
            x = Operands(block, q, k, g, beta, rule, scratch, dtype)
            attention, states = attention_NMCC[block.chunks], states_NMKV[block.chunks]
            n, M, r, C, K = x.rows.shape
            V = v.shape[3]
            y = scratch("y", dtype, n, M, r, C, V)
            douts = block.load(dout, y[:, :, 0]).mul_(rule.scale)
            errors = block.load(v, scratch("values", dtype, n, M, C, V)) if errors_NMCV is None else errors_NMCV[block.chunks]
            derrors = product(attention.mT, douts, scratch("derrors", dtype, n, M, C, V))
            # The gradients of the state before the first chunk and after each.
            dstates, minus_w = scratch("dstates", dtype, n + 1, M, K, V), None
            dnext, same = dstates[1:], dtype == exact
            if dstate is not None:
                dstates[n].copy_(dstate)
                dstate = dstates[n] if same else dstate
            updates = product(x.read[:, :, 0].mT, douts, dstates[:n] if same else scratch("updates", dtype, n, M, K, V))
            if inverse_NMCC is not None:
                minus_w = product(inverse_NMCC[block.chunks], x.read[:, :, 1], scratch("minus w", dtype, n, M, C, K)).neg_()
            wholes = x.decay.whole.expand(n, *x.decay.whole.shape[1:])
            for i, (before, after, derror, update, whole) in reversed(list(enumerate(zip(dstates, dnext, derrors, updates, wholes)))):
                if i in block.ends:
                    dstate = dfinals[block.ends[i]].flatten(0, 1)
                    after.copy_(dstate)
                assert dstate is not None
                if minus_w is not None:
                    derror.baddbmm_(x.write[i], after)
                    update.baddbmm_(minus_w[i].mT, derror)
                dstate = advance(dstate, whole, update, before)
                if i in block.starts:
                    dinitial[block.starts[i]] = dstate.unflatten(0, (-1, dinitial.shape[1]))
            if inverse_NMCC is None:
                dvalues = add_product(derrors, x.write, dnext)
            else:
                dvalues = product(inverse_NMCC[block.chunks].mT, derrors, scratch("values", dtype, n, M, C, V))
                y[:, :, 1].copy_(dvalues).neg_()
            block.store(dv, dvalues)

            # What was written, U: read by later chunks, then by the queries and the keys of this one.
            dwritten = product(errors, dnext.mT, scratch("dwritten", exact, n, M, C, K)).mul_(x.decay.to_end)
            dc_end = None
            if dg is not None:
                # Rows of dS' S', as what the chunk began with and what it wrote.
                dc_end = (dnext * states).sum(-1).mul_(x.decay.whole[..., 0]).add_((x.exact_weighted * dwritten).sum(2))
            y_nMRV = y.flatten(2, 3)
            drows = scratch("drows", exact, n, M, r, C, K)
            product(y_nMRV, states.mT, drows.flatten(2, 3))
            drows.mul_(x.decay.from_start[:, :, None])
            dscores = product(y_nMRV, errors.mT, scratch("dscores", dtype, n, M, r * C, C)).unflatten(2, (r, C))
            dscores[:, :, 1:].diagonal(dim1=3, dim2=4).zero_()
            x.decay.scores_backward(dscores, x.rows, x.weighted, drows, dwritten)
            if dg is not None and dc_end is not None:
                dc = (x.exact_rows * drows).sum(2).addcmul_(x.exact_weighted, dwritten, value=-1)
                dc[:, :, -1] += dc_end
                dc = dc if g.dim() == 4 else dc.sum(-1)
                block.store(dg, dc.flip(2).cumsum(2).flip(2))
            if x.b is not None:
                block.store(dbeta, (x.exact_rows[:, :, 1] * dwritten).sum(-1))
                drows[:, :, 1].addcmul_(x.b, dwritten)
            if x.lengths is not None:
                drows.sub_(x.exact_rows * (drows * x.exact_rows).sum(-1, keepdim=True)).mul_(x.lengths)
            block.store(dq, drows[:, :, 0])
            block.store(dk, dwritten if beta is None else drows[:, :, 1])
        return dq, dk, dv, dg, dbeta, dinitial, None, None, None


def chunked_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, initial: Tensor | None, cu_seqlens: Tensor | None, chunk_size: int, rule: Rule
) -> tuple[Tensor, Tensor]:
    """`ChunkedRule` with a state of zeros where none is given."""
    if initial is None:
        n_states = v.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        initial = v.new_zeros(n_states, v.shape[2], q.shape[3], v.shape[3], dtype=torch.promote_types(v.dtype, torch.float32))
    return ChunkedRule.apply(q, k, v, g, beta, initial, cu_seqlens, chunk_size, rule)  # pyright: ignore


def advance(state: Tensor, whole: Tensor, update: Tensor, place: Tensor) -> Tensor:
    """whole * state + update in the dtype of `state`; left at `place` too, in the dtype found there."""
    if place.dtype == state.dtype:
        return torch.addcmul(update, whole, state, out=place)
    state = torch.addcmul(update.to(state.dtype), whole, state)
    place.copy_(state)
    return state


def inverse_length(x: Tensor) -> Tensor:
    """1 / length over the last axis, finite for rows of zeros."""
    return (x.square().sum(-1, keepdim=True) + EPSILON).rsqrt()


def invert_unit_lower(a_XCC: Tensor, block: int = 4) -> Tensor:
    """(I + a)^-1 of strictly lower triangular matrices [X, C, C]; C is at most `block`, or `block` times a power of two.

    Diagonal blocks by doubling, (I - a)(I + a^2)(I + a^4)...: exact because a^block = 0, and so short that the powers cannot grow (at 16 they reach
    1e6 when keys repeat and beta is 2). Neighbouring blocks are then merged: the inverse of [[P, 0], [R, Q]] is [[P^-1, 0], [-Q^-1 R P^-1, Q^-1]].
    """
    size = a_XCC.shape[-1]
    block = min(block, size)
    diagonal = a_XCC.unflatten(2, (-1, block)).unflatten(1, (-1, block)).diagonal(dim1=1, dim2=3).movedim(-1, 1).flatten(0, 1)
    inverse = torch.eye(block, dtype=a_XCC.dtype, device=a_XCC.device) - diagonal
    power, reach = diagonal, 2
    while reach < block:
        power = torch.bmm(power, power)
        inverse = torch.baddbmm(inverse, inverse, power)
        reach *= 2
    while block < size:
        upper, lower = inverse.unflatten(0, (-1, 2)).unbind(1)
        between = off_diagonal(a_XCC, block).flatten(0, 1)
        inverse = a_XCC.new_zeros(len(upper), 2 * block, 2 * block)
        inverse[:, :block, :block], inverse[:, block:, block:] = upper, lower
        inverse[:, block:, :block] = torch.bmm(lower, torch.bmm(between, upper)).neg_()
        block *= 2
    return inverse

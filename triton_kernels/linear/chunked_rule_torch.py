"""Chunked linear attention in torch, whatever the gate, with the delta rule's correction or without: forward, and the
backward written out.

    S_t = (I - b_t k_t k_t^T) e^{g_t} S_{t-1} + b_t k_t v_t^T        o_t = S_t^T q_t        e^{g_t} a scalar, or
    diagonal over the key channels

With c the inclusive cumulative log-decay of a chunk, S the state at its start and E the prediction errors of its tokens
(the write to the state is b E), a row x_i (a query; or a key, which reads what is already predicted) reads e^{c_i} x_i
S + sum_j F_ij E_j with F_ij = b_j sum_d x_id k_jd e^{c_id - c_jd}, for j <= i (queries) or j < i (keys: G). So with w_j
= b_j e^{c_C - c_j} k_j and A = (I + G)^-1

    O = e^c Q S + F E        E = A V - (A e^c K) S        S' = e^{c_C} S + w^T E

Without the correction there is no G: E is V and b is 1. Backward, with dE = F^T dO + w dS', dV = A^T dE, Y = dO for the
queries and -dV for the keys, Z = Y E^T of each:

    dx_i = e^{c_i} Y_i S^T + sum_j Z_ij b_j k_j e^{c_i - c_j}      U_j = sum_i Z_ij x_i e^{c_i - c_j} (of both) + e^{c_C
    - c_j} E_j dS'^T dK = dx + b U      db = <K, U>      dc = q dq + k dx - b k U,  dc_C += rows of dS' S'      dS =
      e^{c_C} dS' + (e^c Q)^T dO - (A e^c K)^T dE

Derived in notes/kernels/gated_delta_rule.md. WY form: arXiv 2406.06484; gates: 2312.06635, 2412.06464 (scalar),
2510.26692 (per channel). Legend: B batch, T tokens, G query/key heads, H value heads, n chunks of a block, N of all
blocks, M = B * H, X = n * M, r kinds of rows (queries; queries and keys), C chunk length, K key width, V value width, S
sequences.
"""

from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from triton_kernels.common.checks import values_are_free
from triton_kernels.common.registration import ALL, has_work, kernel_op
from triton_kernels.linear.chunk_decays_torch import STRONGEST, ChannelDecay, ScalarDecay
from triton_kernels.linear.chunks_torch import Chunks, Scratch, load, scratch_on, store
from triton_kernels.linear.products_torch import add_matmul, matmul

EPSILON = 1e-6


class Inputs:
    """A call's tensors in chunks, q and k for every value head, and the scratch memory of its blocks. A decay of one
    number per head is made once for all chunks where none is padded and it is weak enough; then there are no
    log-decays."""

    def __init__(
        self, chunks: Chunks, q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, beta: Tensor | None, normalize_qk: bool
    ):
        (B, T, H), kinds = v.shape[:3], 1 if beta is None else 2
        self.normalize_qk, self.M = normalize_qk, B * H
        self.scratch = scratch_on(q.device, torch.promote_types(v.dtype, torch.float32))
        self.q, self.k, self.v = chunks.view(q, H), chunks.view(k, H), chunks.view(v)
        self.beta = None if beta is None else chunks.view(beta)
        self.blocks = chunks.blocks(
            self.M * kinds * chunks.size * max(q.shape[3], v.shape[3]) * self.scratch.dtype.itemsize
        )
        self.g = self.fixed_decay = None
        if g.dim() == 1 and chunks.rows is None and values_are_free(g):
            fixed = ScalarDecay.fixed(g.to(self.scratch.dtype).repeat(B), chunks.size)
            self.fixed_decay = None if fixed is None else fixed.repeated(self.blocks[0].stop)
        if self.fixed_decay is None:
            self.g = chunks.view(g.expand(B, T, H) if g.dim() == 1 else g)


class Operands:
    """What forward and backward make of a block's inputs, before any state is known. `here`: its rows among those of
    all chunks."""

    def __init__(self, inputs: Inputs, block: slice):
        scratch, q, k = inputs.scratch, inputs.q[block], inputs.k[block]
        self.here = slice(block.start * inputs.M, block.stop * inputs.M)
        self.X, C, K = q.shape[:4].numel(), *q.shape[4:]
        self.lengths = self.b = None
        if inputs.fixed_decay is not None:
            self.decay = inputs.fixed_decay.first(self.X)
            self.rows = self.read = load(q, scratch("read", self.X, 1, C, K), self.decay.from_start)
            self.weighted = self.write = load(k, scratch("write", self.X, C, K), self.decay.to_end)
            return
        assert inputs.g is not None
        g = load(inputs.g[block], scratch("gates", self.X, *inputs.g.shape[4:])).clamp_(min=STRONGEST)
        self.decay = ScalarDecay.of(g, scratch) if g.dim() == 2 else ChannelDecay(g, scratch)
        readers = [q] if inputs.beta is None else [q, k]
        # Queries, and keys where they read too, as one stack of rows.
        rows = scratch("rows", self.X, len(readers), C, K)
        for kind, x in enumerate(readers):
            load(x, rows[:, kind])
        if inputs.normalize_qk:
            self.lengths = inverse_length(rows)
            rows.mul_(self.lengths)
        weighted = scratch("weighted", self.X, C, K)
        if inputs.beta is None:
            load(k, weighted)
        else:
            self.b = load(inputs.beta[block], scratch("beta", self.X, C))[..., None]
            torch.mul(rows[:, 1], self.b, out=weighted)
        self.rows, self.weighted = rows, weighted
        self.read = torch.mul(rows, self.decay.from_start[:, None], out=scratch("read", *rows.shape))
        self.write = torch.mul(weighted, self.decay.to_end, out=scratch("write", *weighted.shape))


@kernel_op("chunked_linear_attention", strided=ALL)
def forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    initial: Tensor,
    cu_seqlens: Tensor | None,
    chunk: int,
    scale: float,
    normalize_qk: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, finals), and what the backward cannot cheaply make again: attention and states of every chunk, and of a
    correction its inverse and the errors. Autograd would keep a matrix [C, C] per product and several graph nodes per
    chunk, and the compiler would unroll the chunks.

    q, k [B, T, G, K], v [B, T, H, V], g [B, T, H], [B, T, H, K] or, without a gradient, [H]; beta [B, T, H] or None for
    no correction; initial [S, H, K, V]. Everything is computed in fp32 (fp64 for fp64 inputs): 16-bit products would
    not make up for what rounding and small calls cost."""
    (B, T, H, V), K, C = v.shape, q.shape[3], chunk
    # As many chunks as there may be: how many, only the values of cu_seqlens say. M rows of each; the state before
    # every chunk and after the last.
    M, n_most = B * H, -(-T // C) + (0 if cu_seqlens is None else cu_seqlens.shape[0] - 1)
    finals = initial.clone(memory_format=torch.contiguous_format)
    attention_YCC, states_YKV = initial.new_empty(n_most * M, C, C), initial.new_empty((n_most + 1) * M, K, V)
    inverse_YCC, errors_YCV = (initial.new_empty(0 if beta is None else n_most * M, C, width) for width in (C, V))
    if not has_work(v):
        return v.new_empty(v.shape), finals, attention_YCC, states_YKV, inverse_YCC, errors_YCV
    chunks = Chunks(T, chunk, cu_seqlens)
    inputs, out = Inputs(chunks, q, k, v, g=g, beta=beta, normalize_qk=normalize_qk), chunks.empty(v)
    scratch, states_MKV = inputs.scratch, states_YKV.split(M)
    split = partial(scratch.once, torch.split)
    for block in inputs.blocks:
        x = Operands(inputs, block)
        here, X = x.here, x.X
        attention, states = attention_YCC[here], states_YKV[here]
        values = load(inputs.v[block], scratch("values", X, C, V))
        if beta is None:
            x.decay.scores(x.rows, x.weighted, attention[:, None])
            errors, corrections = values, repeat(None)
            # What a chunk writes to the state lies where the state after it will.
            matmul(x.write.mT, errors, states_YKV[here.start + M : here.stop + M])
        else:
            scores = x.decay.scores(x.rows, x.weighted, scratch("scores", X, 2, C, C))
            attention.copy_(scores[:, 0])
            inverse = inverse_YCC[here].copy_(invert_unit_lower(scores[:, 1]))
            errors = matmul(inverse, values, errors_YCV[here])
            removed = matmul(inverse, x.read[:, 1], scratch("removed", X, C, K))
            corrections = zip(split(removed, M), errors.split(M), split(x.write, M))
        parts = zip(
            states_MKV[block], states_MKV[block.start + 1 : block.stop + 1], x.decay.whole.split(M), corrections
        )
        for i, (before, after, whole, correction) in enumerate(parts, block.start):
            if i in chunks.starts:
                before.copy_(initial[chunks.starts[i]].flatten(0, 1))
            if correction is not None:
                reads, error, writes = correction
                error.baddbmm_(reads, before, alpha=-1)
                torch.bmm(writes.mT, error, out=after)
            after.addcmul_(whole, before)
            if i in chunks.ends:
                finals[chunks.ends[i]] = after.unflatten(0, (-1, v.shape[2]))
        out_XCV = matmul(attention, errors, scratch("out", X, C, V))
        store(add_matmul(out_XCV, x.read[:, 0], states), out[block], scale)
    return chunks.tokens(out), finals, attention_YCC, states_YKV, inverse_YCC, errors_YCV


@kernel_op("chunked_linear_attention_backward", strided=ALL)
def backward_op(
    dout: Tensor,
    dfinals: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    cu_seqlens: Tensor | None,
    attention_YCC: Tensor,
    states_YKV: Tensor,
    inverse_YCC: Tensor,
    errors_YCV: Tensor,
    scale: float,
    normalize_qk: bool,
    gate_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dg, dbeta, dinitial); dg and dbeta are empty where there is none."""
    dinitial, no_gradient = dfinals.clone(memory_format=torch.contiguous_format), dfinals.new_empty(0)
    if not has_work(v):
        wanted = (q, k, v, g if gate_gradient else no_gradient, no_gradient if beta is None else beta)
        return *(x.new_zeros(x.shape) for x in wanted), dinitial  # pyright: ignore[reportReturnType]
    chunks = Chunks(v.shape[1], attention_YCC.shape[1], cu_seqlens)
    inputs, douts = Inputs(chunks, q, k, v, g=g, beta=beta, normalize_qk=normalize_qk), chunks.view(dout)
    dq, dk, dv = (chunks.empty(x) for x in (q, k, v))
    dg, dbeta = chunks.empty(g) if gate_gradient else None, None if beta is None else chunks.empty(beta)
    M, scratch, dstate = inputs.M, inputs.scratch, dfinals.new_zeros(())
    split, times = partial(scratch.once, torch.split), partial(multiplied, scratch)
    later_CC = dfinals.new_ones(chunks.size, chunks.size).triu_()
    for block in reversed(inputs.blocks):
        x = Operands(inputs, block)
        attention, states, (X, r, C, K), V = attention_YCC[x.here], states_YKV[x.here], x.rows.shape, v.shape[3]
        y = scratch("y", X, r, C, V)
        do = load(douts[block], y[:, 0], scale)
        errors = load(inputs.v[block], scratch("values", X, C, V)) if beta is None else errors_YCV[x.here]
        derrors = matmul(attention.mT, do, scratch("derrors", X, C, V))
        corrections = repeat(None)
        if beta is not None:
            removed = matmul(inverse_YCC[x.here], x.read[:, 1], scratch("removed", X, C, K))
            corrections = zip(split(removed, M), split(derrors, M), split(x.write, M))
        # The gradients of the states before the first chunk and after each, which begin as what the chunk adds to them.
        dstates = scratch("dstates", X + M, K, V)
        dnext, dstates_MKV = dstates[M:], split(dstates, M)
        dstates_MKV[-1].copy_(dstate)
        matmul(x.read[:, 0].mT, do, scratch("dstates", X, K, V))
        parts = zip(dstates_MKV, dstates_MKV[1:], x.decay.whole.split(M), corrections)
        for i, (before, after, whole, correction) in reversed(list(enumerate(parts, block.start))):
            if i in chunks.ends:
                after.copy_(dfinals[chunks.ends[i]].flatten(0, 1))
            if correction is not None:
                reads, derror, writes = correction
                derror.baddbmm_(writes, after)
                before.baddbmm_(reads.mT, derror, alpha=-1)
            before.addcmul_(whole, after)
            if i in chunks.starts:
                dinitial[chunks.starts[i]] = before.unflatten(0, (-1, dinitial.shape[1]))
        dstate = dstates_MKV[0]
        if beta is None:
            dvalues = add_matmul(derrors, x.write, dnext)
        else:
            dvalues = matmul(inverse_YCC[x.here].mT, derrors, scratch("values", X, C, V))
            torch.neg(dvalues, out=y[:, 1])
        store(dvalues, dv[block])

        # What was written, U: read by later chunks, then by the queries and the keys of this one.
        dwritten = matmul(errors, dnext.mT, scratch("dwritten", X, C, K))
        if not x.decay.applied:
            dwritten.mul_(x.decay.to_end)
        dc_end = None
        if dg is not None:
            # Rows of dS' S', as what the chunk began with and what it wrote.
            dc_end = times(dnext, states).sum(-1).mul_(x.decay.whole[..., 0])
            dc_end += times(x.weighted, dwritten).sum(1)
        y_XRV = y.flatten(1, 2)
        drows = scratch("drows", X, r, C, K)
        matmul(y_XRV, states.mT, drows.flatten(1, 2))
        if not x.decay.applied:
            drows.mul_(x.decay.from_start[:, None])
        dscores = scratch("dscores", X, r, C, C)
        matmul(y_XRV, errors.mT, dscores.flatten(1, 2))
        if beta is not None:
            dscores[:, 1].diagonal(dim1=1, dim2=2).zero_()
        x.decay.scores_backward(dscores, x.rows, x.weighted, drows, dwritten)
        if dg is not None and dc_end is not None:
            dc = torch.sum(times(x.rows, drows), 1, out=scratch("dc", X, C, K)).addcmul_(x.weighted, dwritten, value=-1)
            dc[:, -1] += dc_end
            dc = dc if g.dim() == 4 else dc.sum(-1, keepdim=True)
            # From a row to the chunk's end.
            dgate = matmul(later_CC.expand(X, C, C), dc, scratch("dgate", *dc.shape))
            store(dgate if g.dim() == 4 else dgate[..., 0], dg[block])
        if dbeta is not None and x.b is not None:
            store(times(x.rows[:, 1], dwritten).sum(-1), dbeta[block])
            drows[:, 1].addcmul_(x.b, dwritten)
        if x.lengths is not None:
            along = times(x.rows, drows).sum(-1, keepdim=True)
            drows.sub_(times(x.rows, along)).mul_(x.lengths)
        of_q, of_k = (x.decay.from_start, x.decay.to_end) if x.decay.applied else (1.0, 1.0)
        store(drows[:, 0], dq[block], of_q)
        store(dwritten if beta is None else drows[:, 1], dk[block], of_k)
    dg, dbeta = (no_gradient.clone() if x is None else chunks.tokens(x) for x in (dg, dbeta))
    return chunks.tokens(dq), chunks.tokens(dk), chunks.tokens(dv), dg, dbeta, dinitial


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, g, beta, _, cu_seqlens, _, ctx.scale, ctx.normalize_qk = inputs
    ctx.save_for_backward(q, k, v, g, beta, cu_seqlens, *output[2:])
    ctx.mark_non_differentiable(*output[2:])


def _backward(ctx: Any, dout: Tensor, dfinals: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    q, k, v, g, beta, cu_seqlens, attention_YCC, states_YKV, inverse_YCC, errors_YCV = ctx.saved_tensors
    gate_gradient = ctx.needs_input_grad[3]
    dq, dk, dv, dg, dbeta, dinitial = backward_op(
        dout,
        dfinals,
        q=q,
        k=k,
        v=v,
        g=g,
        beta=beta,
        cu_seqlens=cu_seqlens,
        attention_YCC=attention_YCC,
        states_YKV=states_YKV,
        inverse_YCC=inverse_YCC,
        errors_YCV=errors_YCV,
        scale=ctx.scale,
        normalize_qk=ctx.normalize_qk,
        gate_gradient=gate_gradient,
    )
    dg, dbeta = dg if gate_gradient else None, None if beta is None else dbeta
    return dq, dk, dv, dg, dbeta, dinitial, None, None, None, None


forward_op.register_autograd(_backward, setup_context=_save)


def chunked_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    beta: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk: int,
    scale: float,
    normalize_qk: bool,
) -> tuple[Tensor, Tensor]:
    """(out, finals) of `forward_op`, from a state of zeros where none is given."""
    if initial is None:
        n_states = v.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        initial = v.new_zeros(
            n_states, v.shape[2], q.shape[3], v.shape[3], dtype=torch.promote_types(v.dtype, torch.float32)
        )
    out, finals, *_ = forward_op(
        q=q,
        k=k,
        v=v,
        g=g,
        beta=beta,
        initial=initial,
        cu_seqlens=cu_seqlens,
        chunk=chunk,
        scale=scale,
        normalize_qk=normalize_qk,
    )
    return out, finals


def multiplied(scratch: Scratch, a: Tensor, b: Tensor) -> Tensor:
    """a * b, valid until the next one."""
    return torch.mul(a, b, out=scratch("multiplied", *a.shape))


def inverse_length(x: Tensor) -> Tensor:
    """1 / length over the last axis, finite for rows of zeros."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square().add(EPSILON).rsqrt()


def invert_unit_lower(a_XCC: Tensor) -> Tensor:
    """(I + a)^-1, of what stands below the diagonals."""
    eye = torch.eye(a_XCC.shape[-1], dtype=a_XCC.dtype, device=a_XCC.device)
    return torch.linalg.solve_triangular(a_XCC, eye.expand_as(a_XCC), upper=False, unitriangular=True)

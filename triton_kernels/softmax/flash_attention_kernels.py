"""Kernels of flash_attention: forward, the queries' gradient, then the keys' and values', each a program's own sum in a
fixed order.

A query at position p sees the keys (p - window, p] when causal, all of them otherwise. For a block of queries the keys
fall into three runs: blocks cut by the window's left edge, blocks seen whole (no mask is computed there), and blocks
cut by the diagonal or by the end.

With P = exp(scale s - lse), delta_i = <do_i, o_i> and dP = dO V^T:  dS = P * (dP - delta),  dQ = scale dS K,  dK =
scale dS^T Q,  dV = P^T dO. Scores are computed twice in the backward, once per kernel, because a single pass would have
to add to dQ from many programs at once: atomics, whose order is not the same in two runs. The last kernel works on
transposed scores from the start, so that no tensor core result is ever transposed (a form that Triton up to 3.7.0
miscompiles on Hopper).

Legend: M queries, N keys of a block, K key width, V value width (padded to powers of two), H query heads, P half of the
rotated channels, F folds of the channels, W channels that do not turn. `lse` and `delta` are [B, H, T].
"""

# A jitted helper that returns a tuple looks like a function that never returns to a type checker.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
import math
from collections import namedtuple

import triton
import triton.language as tl

from triton_kernels.common.tiles import load_block, product, store_block, wide

LOG2E = tl.constexpr(math.log2(math.e))
# What every kernel of one call is given: q, k, v as Rows, tables [T, P], sizes; scale_log2 is for scores in units of
# log 2.
Call = namedtuple("Call", "q k v cu_seqlens cos sin T S H n_sequences n_blocks window scale scale_log2")
# Its constants: widths, what they are padded to (powers of two), query heads per key head, rotated channels (a power of
# two, or 0).
Form = namedtuple("Form", "K V BLOCK_K BLOCK_V GROUP ROTARY CAUSAL WINDOW")


@triton.jit
def locate(call, n_heads, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr, first_program=0):
    """(batch row, head, first token of the sequence (int64), its queries, its keys, this program's block in it).

    Programs run over the blocks of a head first, so that neighbours share its keys in L2. LAST_FIRST starts with the
    last block, which is the longest when causal. Packed, sequence n owns the slots from cu_seqlens[n] // BLOCK + n on:
    at least as many as it has blocks, found without a table and without the host. The slots left over hold a block past
    the sequence's end. Programs below first_program are not counted.
    """
    program = tl.program_id(0) - first_program
    slot = program % call.n_blocks
    head = (program // call.n_blocks) % n_heads
    batch = program // call.n_blocks // n_heads
    if call.cu_seqlens is not None:
        n_started = 0
        for first in range(0, call.n_sequences, 128):
            n = first + tl.arange(0, 128)
            slot_N = tl.load(call.cu_seqlens + n, mask=n < call.n_sequences, other=0) // BLOCK + n
            n_started += tl.sum(((slot_N <= slot) & (n < call.n_sequences)).to(tl.int32))
        sequence = n_started - 1
        start = tl.load(call.cu_seqlens + sequence)
        length = (tl.load(call.cu_seqlens + sequence + 1) - start).to(tl.int32)
        return batch, head, start, length, length, (slot - start // BLOCK - sequence).to(tl.int32)
    else:
        return batch, head, wide(0), call.T, call.S, call.n_blocks - 1 - slot if LAST_FIRST else slot


@triton.jit
def key_runs(first_position, n_keys, window, FORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(a, b, c, d): the queries at [first_position, + BLOCK_M) see keys [a, d); of the steps of BLOCK_N from a, those
    in [b, c) are seen whole."""
    past = tl.minimum(first_position + BLOCK_M, n_keys) if FORM.CAUSAL else n_keys
    past_whole = first_position + 1 if FORM.CAUSAL else n_keys
    first = 0 * n_keys
    whole = first
    if FORM.WINDOW:
        first = tl.maximum(first_position - window + 1, 0)
        whole = tl.minimum(first + tl.cdiv(tl.maximum(past - window - first, 0), BLOCK_N) * BLOCK_N, past)
    past_whole = whole + tl.maximum(past_whole - whole, 0) // BLOCK_N * BLOCK_N
    return first, whole, tl.minimum(past_whole, past), past


@triton.jit
def query_runs(
    first_key,
    offset,
    n_queries,
    window,
    FORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ONE: tl.constexpr,
):
    """(a, b, c): queries [a, c) see some of the keys [first_key, + BLOCK_N), and those of [b, c) all of them. ONE: all
    count as cut (b = c)."""
    first = 0 * n_queries
    whole = first
    past = n_queries
    if FORM.CAUSAL:
        first = tl.minimum(tl.maximum(first_key - offset, 0), n_queries)
        if FORM.WINDOW:
            past = tl.minimum(tl.maximum(first_key + BLOCK_N + window - 1 - offset, first), n_queries)
        cut = tl.maximum(first_key + BLOCK_N - 1 - offset - first, 0)
        whole = past if ONE else tl.minimum(first + tl.cdiv(cut, BLOCK_M) * BLOCK_M, past)
    return first, whole, past


@triton.jit
def visible(position, key, n_keys, window, FORM: tl.constexpr):
    """The mask of a block, for positions and keys that broadcast against each other."""
    seen = key < n_keys
    if FORM.CAUSAL:
        seen = seen & (key <= position)
    if FORM.WINDOW:
        seen = seen & (key > position - window)
    return seen


@triton.jit
def load_queries(call, batch, head, row, inside_M, FORM: tl.constexpr):
    """The block of queries from `row` on, turned."""
    q_MK = load_block(call.q, batch, row, head, inside_M, FORM.K, FORM.BLOCK_K)
    if FORM.ROTARY > 0:
        q_MK = rotate_tile(q_MK, call, row, inside_M, FORM.ROTARY, False).to(q_MK.dtype)
    return q_MK


@triton.jit
def load_keys(call, batch, group, row, inside_N, FORM: tl.constexpr, CHECK_ROWS: tl.constexpr):
    """Keys and values of one step."""
    k_NK = load_block(call.k, batch, row, group, inside_N, FORM.K, FORM.BLOCK_K, CHECK_ROWS)
    return k_NK, load_block(call.v, batch, row, group, inside_N, FORM.V, FORM.BLOCK_V, CHECK_ROWS)


@triton.jit
def rotate_tile(x_MK, call, row, inside_M, ROTARY: tl.constexpr, BACK: tl.constexpr):
    """x in fp32, its first ROTARY channels turned by the tables' rows from `row` on (BACK: turned back, as gradients
    are).

    The channels are folded into halves that lie in the same registers of a tensor core's result, so that no channel has
    to be fetched.
    """
    M: tl.constexpr = x_MK.shape[0]
    HALF: tl.constexpr = ROTARY // 2
    FOLDS: tl.constexpr = x_MK.shape[1] // ROTARY
    first_MFP, second_MFP = tl.split(tl.permute(tl.reshape(x_MK.to(tl.float32), [M, FOLDS, 2, HALF]), (0, 1, 3, 2)))
    # Rows past the end read row 0 rather than nothing: a mask would cost registers.
    angle_MFP = tl.where(inside_M, row + tl.arange(0, M), 0)[:, None, None] * HALF + tl.arange(0, HALF)[None, None, :]
    if FOLDS == 1:
        cos_MFP, sin_MFP = tl.load(call.cos + angle_MFP), tl.load(call.sin + angle_MFP)
    else:
        turns_MFP = (tl.arange(0, FOLDS) == 0)[None, :, None]
        cos_MFP, sin_MFP = (
            tl.load(call.cos + angle_MFP, mask=turns_MFP, other=1.0),
            tl.load(call.sin + angle_MFP, mask=turns_MFP, other=0.0),
        )
    sin_MFP = -sin_MFP if BACK else sin_MFP
    turned_MFP2 = tl.join(first_MFP * cos_MFP - second_MFP * sin_MFP, second_MFP * cos_MFP + first_MFP * sin_MFP)
    return tl.reshape(tl.permute(turned_MFP2, (0, 1, 3, 2)), [M, FOLDS * ROTARY])


@triton.jit
def forward_kernel(
    call, sinks_ptr, o, lse_ptr, FORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, first_program=0
):
    """o [B, T, H, V] and lse: log2 of each softmax's denominator, in units of the scaled logits times log2(e)."""
    batch, head, start, n_queries, n_keys, block = locate(call, call.H, BLOCK_M, FORM.CAUSAL, first_program)
    first = block * BLOCK_M
    if first >= n_queries:
        return
    inside_M = first + tl.arange(0, BLOCK_M) < n_queries
    position = first + n_keys - n_queries
    q_MK = load_queries(call, batch, head, start + first, inside_M, FORM)
    BLOCK_V: tl.constexpr = FORM.BLOCK_V
    o_MV = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    if sinks_ptr is not None:
        # The sink is a key that was met first: its logit is the maximum so far, its weight the denominator so far, its
        # value zero.
        max_M = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        sum_M = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        max_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
        sum_M = tl.zeros([BLOCK_M], tl.float32)
    runs = key_runs(position, n_keys, call.window, FORM, BLOCK_M, BLOCK_N)
    for run in tl.static_range(0 if FORM.WINDOW else 1, 3):
        for key in range(runs[run], runs[run + 1], BLOCK_N):
            key_N = key + tl.arange(0, BLOCK_N)
            k_NK, v_NV = load_keys(call, batch, head // FORM.GROUP, start + key, key_N < n_keys, FORM, run != 1)
            s_MN = product(q_MK, tl.trans(k_NK), None)
            if run != 1:
                position_M = position + tl.arange(0, BLOCK_M)
                s_MN = tl.where(
                    visible(position_M[:, None], key_N[None, :], n_keys, call.window, FORM), s_MN, float("-inf")
                )
            new_max_M = tl.maximum(max_M, tl.max(s_MN, 1) * call.scale_log2)
            # A row that has seen no key yet keeps -inf; the exponent must then be finite, or -inf - -inf would be NaN.
            shift_M = new_max_M if run == 1 else tl.where(new_max_M == float("-inf"), 0.0, new_max_M)
            p_MN = tl.exp2(s_MN * call.scale_log2 - shift_M[:, None])
            rescale_M = tl.exp2(max_M - shift_M)
            sum_M = sum_M * rescale_M + tl.sum(p_MN, 1)
            o_MV = product(p_MN.to(v_NV.dtype), v_NV, o_MV * rescale_M[:, None])
            max_M = new_max_M
    store_block(o, batch, start + first, head, o_MV / tl.where(sum_M > 0, sum_M, 1.0)[:, None], inside_M, FORM.V)
    statistic_M = (wide(batch) * call.H + head) * call.T + start + first + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + statistic_M, max_M + tl.log2(sum_M), mask=inside_M)


@triton.jit
def query_gradient_kernel(
    call, o, do, lse_ptr, delta_ptr, dq, turned_q, FORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """dq [B, T, H, K], and what the other kernel needs: delta, and the queries turned [B, T, H, K]."""
    batch, head, start, n_queries, n_keys, block = locate(call, call.H, BLOCK_M, FORM.CAUSAL)
    first = block * BLOCK_M
    if first >= n_queries:
        return
    inside_M = first + tl.arange(0, BLOCK_M) < n_queries
    position = first + n_keys - n_queries
    q_MK = load_queries(call, batch, head, start + first, inside_M, FORM)
    if FORM.ROTARY > 0:
        store_block(turned_q, batch, start + first, head, q_MK, inside_M, FORM.K)
    do_MV = load_block(do, batch, start + first, head, inside_M, FORM.V, FORM.BLOCK_V)
    o_MV = load_block(o, batch, start + first, head, inside_M, FORM.V, FORM.BLOCK_V)
    delta_M = tl.sum(o_MV.to(tl.float32) * do_MV.to(tl.float32), 1)
    statistic_M = (wide(batch) * call.H + head) * call.T + start + first + tl.arange(0, BLOCK_M)
    tl.store(delta_ptr + statistic_M, delta_M, mask=inside_M)
    lse_M = tl.load(lse_ptr + statistic_M, mask=inside_M, other=float("inf"))
    dq_MK = tl.zeros(q_MK.shape, tl.float32)
    runs = key_runs(position, n_keys, call.window, FORM, BLOCK_M, BLOCK_N)
    for run in tl.static_range(0 if FORM.WINDOW else 1, 3):
        for key in range(runs[run], runs[run + 1], BLOCK_N):
            key_N = key + tl.arange(0, BLOCK_N)
            k_NK, v_NV = load_keys(call, batch, head // FORM.GROUP, start + key, key_N < n_keys, FORM, run != 1)
            if q_MK.dtype == tl.float32:
                # Without it the compiler keeps the operands of all steps' products in registers, on the plain
                # multipliers as many as their widths.
                tl.debug_barrier()
            p_MN = tl.exp2(product(q_MK, tl.trans(k_NK), None) * call.scale_log2 - lse_M[:, None])
            if run != 1:
                position_M = position + tl.arange(0, BLOCK_M)
                p_MN = tl.where(visible(position_M[:, None], key_N[None, :], n_keys, call.window, FORM), p_MN, 0.0)
            ds_MN = p_MN * (product(do_MV, tl.trans(v_NV), None) - delta_M[:, None])
            dq_MK = product(ds_MN.to(k_NK.dtype), k_NK, dq_MK)
    if FORM.ROTARY > 0:
        dq_MK = rotate_tile(dq_MK, call, start + first, inside_M, FORM.ROTARY, True)
    store_block(dq, batch, start + first, head, dq_MK * call.scale, inside_M, FORM.K)


@triton.jit
def key_value_gradient_kernel(
    call, do, lse_ptr, delta_ptr, dk, dv, FORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """dk [B, S, G, K] and dv [B, S, G, V]: a program owns a block of keys of one key head and meets the queries of its
    GROUP query heads."""
    batch, group, start, n_queries, n_keys, block = locate(call, call.H // FORM.GROUP, BLOCK_N, False)
    first = block * BLOCK_N
    if first >= n_keys:
        return
    key_N = first + tl.arange(0, BLOCK_N)
    k_NK, v_NV = load_keys(call, batch, group, start + first, key_N < n_keys, FORM, True)
    dk_NK = tl.zeros(k_NK.shape, tl.float32)
    dv_NV = tl.zeros(v_NV.shape, tl.float32)
    offset = n_keys - n_queries
    # In a window few blocks are seen whole, and at 256 channels the accumulators leave no registers for a second copy
    # of the loop.
    ONE: tl.constexpr = FORM.CAUSAL and (FORM.WINDOW or FORM.BLOCK_K + FORM.BLOCK_V > 256)
    runs = query_runs(first, offset, n_queries, call.window, FORM, BLOCK_M, BLOCK_N, ONE)
    for run in tl.static_range(0 if FORM.CAUSAL else 1, 1 if ONE else 2):
        n_steps = tl.cdiv(runs[run + 1] - runs[run], BLOCK_M)
        # One loop over the steps of every query head, so that loads are in flight across heads too, which matters in a
        # short window.
        for step in range(0, n_steps * FORM.GROUP):
            member = 0 if FORM.GROUP == 1 else step // n_steps
            head = group * FORM.GROUP + member
            t = runs[run] + (step - member * n_steps) * BLOCK_M
            t_M = t + tl.arange(0, BLOCK_M)
            q_MK = load_block(call.q, batch, start + t, head, t_M < n_queries, FORM.K, FORM.BLOCK_K)
            do_MV = load_block(do, batch, start + t, head, t_M < n_queries, FORM.V, FORM.BLOCK_V)
            # A row past the end has a denominator of infinity: its weights are zero.
            statistic = (wide(batch) * call.H + head) * call.T + start + t
            lse_M = tl.load(lse_ptr + statistic + tl.arange(0, BLOCK_M), mask=t_M < n_queries, other=float("inf"))
            delta_M = tl.load(delta_ptr + statistic + tl.arange(0, BLOCK_M), mask=t_M < n_queries, other=0.0)
            p_NM = tl.exp2(product(k_NK, tl.trans(q_MK), None) * call.scale_log2 - lse_M[None, :])
            if run == 0:
                p_NM = tl.where(visible((t_M + offset)[None, :], key_N[:, None], n_keys, call.window, FORM), p_NM, 0.0)
            dv_NV = product(p_NM.to(do_MV.dtype), do_MV, dv_NV)
            ds_NM = p_NM * (product(v_NV, tl.trans(do_MV), None) - delta_M[None, :])
            dk_NK = product(ds_NM.to(q_MK.dtype), q_MK, dk_NK)
    store_block(dk, batch, start + first, group, dk_NK * call.scale, key_N < n_keys, FORM.K)
    store_block(dv, batch, start + first, group, dv_NV, key_N < n_keys, FORM.V)

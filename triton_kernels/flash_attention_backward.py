"""Backward kernels of flash_attention: the queries' gradient, then the keys' and values', each a program's own sum in a fixed order.

With P = exp(scale s - lse), delta_i = <do_i, o_i> and dP = dO V^T:  dS = P * (dP - delta),  dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO.
Scores are computed twice, once per kernel, because a single pass would have to add to dQ from many programs at once: atomics, whose order
is not the same in two runs. The second kernel works on transposed scores from the start, so that no tensor core result is ever transposed
(a form that Triton up to 3.7.0 miscompiles on Hopper).

Legend: M queries, N keys of a block, K key width, V value width (padded to powers of two), H query heads, G key/value heads.
"""

# A jitted helper that returns a tuple looks like a function that never returns to a type checker.
# pyright: reportGeneralTypeIssues=false
import triton
import triton.language as tl

from triton_kernels.flash_attention_blocks import key_runs, load_tile, locate, product, query_runs, visible, wide


@triton.jit
def query_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    do_ptr,
    lse_ptr,
    cu_seqlens_ptr,
    dq_ptr,
    delta_ptr,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_g,
    v_stride_b,
    v_stride_s,
    v_stride_g,
    T,
    S,
    H,
    n_sequences,
    n_blocks,
    window,
    scale,
    scale_log2,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq [B, T, H, K] and delta [B, H, T], which the other kernel needs; o and do are contiguous."""
    batch, head, start, n_queries, n_keys, block = locate(cu_seqlens_ptr, n_sequences, n_blocks, H, T, S, BLOCK_M, PACKED, CAUSAL)
    if block * BLOCK_M >= n_queries:
        return
    t_M = block * BLOCK_M + tl.arange(0, BLOCK_M)
    k_K, v_V = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    first_position = block * BLOCK_M + n_keys - n_queries
    position_M = first_position + tl.arange(0, BLOCK_M)
    row_mask = t_M[:, None] < n_queries
    query_mask, value_mask = row_mask & (k_K < KEY_WIDTH)[None, :], row_mask & (v_V < VALUE_WIDTH)[None, :]
    row_M = start + t_M
    o_row_M = (wide(batch) * T + row_M) * H + head
    statistic_M = (wide(batch) * H + head) * T + row_M
    q_base = q_ptr + wide(batch) * q_stride_b + (start + block * BLOCK_M) * q_stride_t + wide(head) * q_stride_h
    q_MK = tl.load(q_base + tl.arange(0, BLOCK_M)[:, None] * q_stride_t + k_K[None, :], mask=query_mask, other=0.0)
    do_MV = tl.load(do_ptr + o_row_M[:, None] * VALUE_WIDTH + v_V[None, :], mask=value_mask, other=0.0)
    o_MV = tl.load(o_ptr + o_row_M[:, None] * VALUE_WIDTH + v_V[None, :], mask=value_mask, other=0.0)
    delta_M = tl.sum(o_MV.to(tl.float32) * do_MV.to(tl.float32), 1)
    tl.store(delta_ptr + statistic_M, delta_M, mask=t_M < n_queries)
    lse_M = tl.load(lse_ptr + statistic_M, mask=t_M < n_queries, other=float("inf"))

    k_base = k_ptr + wide(batch) * k_stride_b + start * k_stride_s + wide(head // GROUP) * k_stride_g
    v_base = v_ptr + wide(batch) * v_stride_b + start * v_stride_s + wide(head // GROUP) * v_stride_g
    k_tile = tl.arange(0, BLOCK_N)[:, None] * k_stride_s + k_K[None, :]
    v_tile = tl.arange(0, BLOCK_N)[:, None] * v_stride_s + v_V[None, :]
    dq_MK = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    first, whole, past_whole, past = key_runs(first_position, n_queries, n_keys, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)
    for run in tl.static_range(0 if WINDOW else 1, 3):
        begin = first if run == 0 else (whole if run == 1 else past_whole)
        end = whole if run == 0 else (past_whole if run == 1 else past)
        k_step, v_step = k_base + wide(begin) * k_stride_s, v_base + wide(begin) * v_stride_s
        for key in range(begin, end, BLOCK_N):
            key_N = key + tl.arange(0, BLOCK_N)
            k_NK = load_tile(k_step + k_tile, (key_N < n_keys)[:, None], (k_K < KEY_WIDTH)[None, :], run != 1, KEY_WIDTH < BLOCK_K)
            v_NV = load_tile(v_step + v_tile, (key_N < n_keys)[:, None], (v_V < VALUE_WIDTH)[None, :], run != 1, VALUE_WIDTH < BLOCK_V)
            p_MN = tl.exp2(product(q_MK, tl.trans(k_NK), None) * scale_log2 - lse_M[:, None])
            if run != 1:
                p_MN = tl.where(visible(position_M[:, None], key_N[None, :], n_keys, window, CAUSAL, WINDOW), p_MN, 0.0)
            ds_MN = p_MN * (product(do_MV, tl.trans(v_NV), None) - delta_M[:, None])
            dq_MK = product(ds_MN.to(k_NK.dtype), k_NK, dq_MK)
            k_step += BLOCK_N * k_stride_s
            v_step += BLOCK_N * v_stride_s
    tl.store(dq_ptr + o_row_M[:, None] * KEY_WIDTH + k_K[None, :], (dq_MK * scale).to(dq_ptr.dtype.element_ty), mask=query_mask)


@triton.jit
def key_value_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    cu_seqlens_ptr,
    dk_ptr,
    dv_ptr,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_g,
    v_stride_b,
    v_stride_s,
    v_stride_g,
    T,
    S,
    G,
    n_sequences,
    n_blocks,
    window,
    scale,
    scale_log2,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk [B, S, G, K] and dv [B, S, G, V]: a program owns a block of keys of one key head and meets the queries of its GROUP query heads."""
    batch, group, start, n_queries, n_keys, block = locate(cu_seqlens_ptr, n_sequences, n_blocks, G, T, S, BLOCK_N, PACKED, False)
    if block * BLOCK_N >= n_keys:
        return
    key_N = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k_K, v_V = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    key_mask = (key_N < n_keys)[:, None] & (k_K < KEY_WIDTH)[None, :]
    value_mask = (key_N < n_keys)[:, None] & (v_V < VALUE_WIDTH)[None, :]
    k_base = k_ptr + wide(batch) * k_stride_b + (start + block * BLOCK_N) * k_stride_s + wide(group) * k_stride_g
    v_base = v_ptr + wide(batch) * v_stride_b + (start + block * BLOCK_N) * v_stride_s + wide(group) * v_stride_g
    k_NK = tl.load(k_base + tl.arange(0, BLOCK_N)[:, None] * k_stride_s + k_K[None, :], mask=key_mask, other=0.0)
    v_NV = tl.load(v_base + tl.arange(0, BLOCK_N)[:, None] * v_stride_s + v_V[None, :], mask=value_mask, other=0.0)

    o_stride = G * GROUP * VALUE_WIDTH
    q_tile = tl.arange(0, BLOCK_M)[:, None] * q_stride_t + k_K[None, :]
    do_tile = tl.arange(0, BLOCK_M)[:, None] * o_stride + v_V[None, :]
    dk_NK = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    dv_NV = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    offset = n_keys - n_queries
    # In a window few blocks are seen whole, and at 256 channels the accumulators leave no registers for a second copy of the loop.
    ONE: tl.constexpr = CAUSAL and (WINDOW or BLOCK_K + BLOCK_V > 256)
    first, whole, past = query_runs(block * BLOCK_N, offset, n_queries, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, ONE)
    q_base = q_ptr + wide(batch) * q_stride_b + start * q_stride_t + wide(group) * GROUP * q_stride_h
    do_base = do_ptr + (wide(batch) * T + start) * o_stride + wide(group) * GROUP * VALUE_WIDTH
    statistic_base = (wide(batch) * G + group) * GROUP * T + start
    for run in tl.static_range(0 if CAUSAL else 1, 1 if ONE else 2):
        begin = first if run == 0 else whole
        end = whole if run == 0 else past
        n_steps = tl.cdiv(end - begin, BLOCK_M)
        # One loop over the steps of every query head, so that loads are in flight across heads too, which matters in a short window.
        for step in range(0, n_steps * GROUP):
            member = 0 if GROUP == 1 else step // n_steps
            t = begin + (step - member * n_steps) * BLOCK_M
            t_M = t + tl.arange(0, BLOCK_M)
            rows, statistic_step = (t_M < n_queries)[:, None], statistic_base + wide(member) * T + t
            q_step = q_base + wide(member) * q_stride_h + wide(t) * q_stride_t
            do_step = do_base + wide(member) * VALUE_WIDTH + wide(t) * o_stride
            q_MK = load_tile(q_step + q_tile, rows, (k_K < KEY_WIDTH)[None, :], True, KEY_WIDTH < BLOCK_K)
            do_MV = load_tile(do_step + do_tile, rows, (v_V < VALUE_WIDTH)[None, :], True, VALUE_WIDTH < BLOCK_V)
            # A row past the end has a denominator of infinity: its weights are zero.
            lse_M = tl.load(lse_ptr + statistic_step + tl.arange(0, BLOCK_M), mask=t_M < n_queries, other=float("inf"))
            delta_M = tl.load(delta_ptr + statistic_step + tl.arange(0, BLOCK_M), mask=t_M < n_queries, other=0.0)
            p_NM = tl.exp2(product(k_NK, tl.trans(q_MK), None) * scale_log2 - lse_M[None, :])
            if run == 0:
                p_NM = tl.where(visible((t_M + offset)[None, :], key_N[:, None], n_keys, window, CAUSAL, WINDOW), p_NM, 0.0)
            dv_NV = product(p_NM.to(do_MV.dtype), do_MV, dv_NV)
            ds_NM = p_NM * (product(v_NV, tl.trans(do_MV), None) - delta_M[None, :])
            dk_NK = product(ds_NM.to(q_MK.dtype), q_MK, dk_NK)

    row_N = (wide(batch) * S + start + key_N) * G + group
    tl.store(dk_ptr + row_N[:, None] * KEY_WIDTH + k_K[None, :], (dk_NK * scale).to(dk_ptr.dtype.element_ty), mask=key_mask)
    tl.store(dv_ptr + row_N[:, None] * VALUE_WIDTH + v_V[None, :], dv_NV.to(dv_ptr.dtype.element_ty), mask=value_mask)

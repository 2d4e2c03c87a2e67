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

from triton_kernels.flash_attention_blocks import (
    head_pointer,
    key_runs,
    load_tile,
    locate,
    product,
    query_runs,
    store_tile,
    tile_offsets,
    visible,
    wide,
)
from triton_kernels.rotary_triton import rotate_tile


@triton.jit
def query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, cu_seqlens_ptr, cos_ptr, sin_ptr, o_ptr, do_ptr, lse_ptr, dq_ptr, delta_ptr, turned_q_ptr,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_s, k_stride_g, v_stride_b, v_stride_s, v_stride_g,
    T, S, H, n_sequences, n_blocks, window, scale, scale_log2,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr,
    ROTARY: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq [B, T, H, K], and what the other kernel needs: delta [B, H, T] and the turned queries [B, T, H, K]; o and do are contiguous."""
    batch, head, start, n_queries, n_keys, block = locate(cu_seqlens_ptr, n_sequences, n_blocks, H, T, S, BLOCK_M, CAUSAL)
    if block * BLOCK_M >= n_queries:
        return
    k_K, v_V = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    t_M = block * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, row_M = t_M < n_queries, start + t_M
    first_position = block * BLOCK_M + n_keys - n_queries
    position_M = first_position + tl.arange(0, BLOCK_M)
    q_base = head_pointer(q_ptr, q_stride_b, q_stride_t, q_stride_h, batch, start + block * BLOCK_M, head)
    k_base = head_pointer(k_ptr, k_stride_b, k_stride_s, k_stride_g, batch, start, head // GROUP)
    v_base = head_pointer(v_ptr, v_stride_b, v_stride_s, v_stride_g, batch, start, head // GROUP)
    # Of contiguous [B, T, H, width] tensors, and of [B, H, T] ones.
    first_row = (wide(batch) * T + start + block * BLOCK_M) * H + head
    statistic_M = (wide(batch) * H + head) * T + row_M
    q_MK = load_tile(q_base + tile_offsets(q_stride_t, k_K, BLOCK_M), rows, k_K, True, KEY_WIDTH)
    if ROTARY > 0:
        q_MK = rotate_tile(q_MK, cos_ptr, sin_ptr, row_M, rows, ROTARY, False).to(q_MK.dtype)
        store_tile(turned_q_ptr + first_row * KEY_WIDTH, H * KEY_WIDTH, q_MK, rows, k_K, KEY_WIDTH)
    o_tile = tile_offsets(H * VALUE_WIDTH, v_V, BLOCK_M)
    do_MV = load_tile(do_ptr + first_row * VALUE_WIDTH + o_tile, rows, v_V, True, VALUE_WIDTH)
    o_MV = load_tile(o_ptr + first_row * VALUE_WIDTH + o_tile, rows, v_V, True, VALUE_WIDTH)
    delta_M = tl.sum(o_MV.to(tl.float32) * do_MV.to(tl.float32), 1)
    tl.store(delta_ptr + statistic_M, delta_M, mask=rows)
    lse_M = tl.load(lse_ptr + statistic_M, mask=rows, other=float("inf"))

    k_tile, v_tile = tile_offsets(k_stride_s, k_K, BLOCK_N), tile_offsets(v_stride_s, v_V, BLOCK_N)
    dq_MK = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    first, whole, past_whole, past = key_runs(first_position, n_queries, n_keys, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)
    for run in tl.static_range(0 if WINDOW else 1, 3):
        begin = first if run == 0 else (whole if run == 1 else past_whole)
        end = whole if run == 0 else (past_whole if run == 1 else past)
        k_step, v_step = k_base + wide(begin) * k_stride_s, v_base + wide(begin) * v_stride_s
        for key in range(begin, end, BLOCK_N):
            key_N = key + tl.arange(0, BLOCK_N)
            k_NK = load_tile(k_step + k_tile, key_N < n_keys, k_K, run != 1, KEY_WIDTH)
            v_NV = load_tile(v_step + v_tile, key_N < n_keys, v_V, run != 1, VALUE_WIDTH)
            p_MN = tl.exp2(product(q_MK, tl.trans(k_NK), None) * scale_log2 - lse_M[:, None])
            if run != 1:
                p_MN = tl.where(visible(position_M[:, None], key_N[None, :], n_keys, window, CAUSAL, WINDOW), p_MN, 0.0)
            ds_MN = p_MN * (product(do_MV, tl.trans(v_NV), None) - delta_M[:, None])
            dq_MK = product(ds_MN.to(k_NK.dtype), k_NK, dq_MK)
            k_step += BLOCK_N * k_stride_s
            v_step += BLOCK_N * v_stride_s
    if ROTARY > 0:
        dq_MK = rotate_tile(dq_MK, cos_ptr, sin_ptr, row_M, rows, ROTARY, True)
    store_tile(dq_ptr + first_row * KEY_WIDTH, H * KEY_WIDTH, dq_MK * scale, rows, k_K, KEY_WIDTH)


@triton.jit
def key_value_gradient_kernel(
    q_ptr, k_ptr, v_ptr, cu_seqlens_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_s, k_stride_g, v_stride_b, v_stride_s, v_stride_g,
    T, S, G, n_sequences, n_blocks, window, scale, scale_log2,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk [B, S, G, K] and dv [B, S, G, V]: a program owns a block of keys of one key head and meets the queries of its GROUP query heads."""
    batch, group, start, n_queries, n_keys, block = locate(cu_seqlens_ptr, n_sequences, n_blocks, G, T, S, BLOCK_N, False)
    if block * BLOCK_N >= n_keys:
        return
    k_K, v_V = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    key_N = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k_base = head_pointer(k_ptr, k_stride_b, k_stride_s, k_stride_g, batch, start + block * BLOCK_N, group)
    v_base = head_pointer(v_ptr, v_stride_b, v_stride_s, v_stride_g, batch, start + block * BLOCK_N, group)
    k_NK = load_tile(k_base + tile_offsets(k_stride_s, k_K, BLOCK_N), key_N < n_keys, k_K, True, KEY_WIDTH)
    v_NV = load_tile(v_base + tile_offsets(v_stride_s, v_V, BLOCK_N), key_N < n_keys, v_V, True, VALUE_WIDTH)

    dk_NK = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    dv_NV = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    offset = n_keys - n_queries
    # In a window few blocks are seen whole, and at 256 channels the accumulators leave no registers for a second copy of the loop.
    ONE: tl.constexpr = CAUSAL and (WINDOW or BLOCK_K + BLOCK_V > 256)
    first, whole, past = query_runs(block * BLOCK_N, offset, n_queries, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, ONE)
    do_stride = G * GROUP * VALUE_WIDTH
    q_base = head_pointer(q_ptr, q_stride_b, q_stride_t, q_stride_h, batch, start, group * GROUP)
    q_tile, do_tile = tile_offsets(q_stride_t, k_K, BLOCK_M), tile_offsets(do_stride, v_V, BLOCK_M)
    do_base = do_ptr + (wide(batch) * T + start) * do_stride + wide(group) * GROUP * VALUE_WIDTH
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
            statistic_step = statistic_base + wide(member) * T + t
            q_step = q_base + wide(member) * q_stride_h + wide(t) * q_stride_t
            do_step = do_base + wide(member) * VALUE_WIDTH + wide(t) * do_stride
            q_MK = load_tile(q_step + q_tile, t_M < n_queries, k_K, True, KEY_WIDTH)
            do_MV = load_tile(do_step + do_tile, t_M < n_queries, v_V, True, VALUE_WIDTH)
            # A row past the end has a denominator of infinity: its weights are zero.
            lse_M = tl.load(lse_ptr + statistic_step + tl.arange(0, BLOCK_M), mask=t_M < n_queries, other=float("inf"))
            delta_M = tl.load(delta_ptr + statistic_step + tl.arange(0, BLOCK_M), mask=t_M < n_queries, other=0.0)
            p_NM = tl.exp2(product(k_NK, tl.trans(q_MK), None) * scale_log2 - lse_M[None, :])
            if run == 0:
                p_NM = tl.where(visible((t_M + offset)[None, :], key_N[:, None], n_keys, window, CAUSAL, WINDOW), p_NM, 0.0)
            dv_NV = product(p_NM.to(do_MV.dtype), do_MV, dv_NV)
            ds_NM = p_NM * (product(v_NV, tl.trans(do_MV), None) - delta_M[None, :])
            dk_NK = product(ds_NM.to(q_MK.dtype), q_MK, dk_NK)

    first_row = (wide(batch) * S + start + block * BLOCK_N) * G + group
    store_tile(dk_ptr + first_row * KEY_WIDTH, G * KEY_WIDTH, dk_NK * scale, key_N < n_keys, k_K, KEY_WIDTH)
    store_tile(dv_ptr + first_row * VALUE_WIDTH, G * VALUE_WIDTH, dv_NV, key_N < n_keys, v_V, VALUE_WIDTH)

"""Forward kernel of flash_attention: one program per block of queries of a head, one pass over the keys that block can see.

Legend: M queries of a block, N keys of a step, K key width, V value width (padded to powers of two), H query heads, G key/value heads.
"""

# A jitted helper that returns a tuple looks like a function that never returns to a type checker.
# pyright: reportGeneralTypeIssues=false
import triton
import triton.language as tl

from triton_kernels.flash_attention_blocks import head_pointer, key_runs, load_tile, locate, product, store_tile, tile_offsets, visible, wide
from triton_kernels.rotary_triton import rotate_tile

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, cu_seqlens_ptr, cos_ptr, sin_ptr, sinks_ptr, o_ptr, lse_ptr,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_s, k_stride_g, v_stride_b, v_stride_s, v_stride_g,
    T, S, H, n_sequences, n_blocks, window, scale, scale_log2,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr,
    ROTARY: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, first_program=0,
):  # fmt: skip
    """o [B, T, H, V] and lse [B, H, T]: log2 of each softmax's denominator, in units of the scaled logits times log2(e)."""
    batch, head, start, n_queries, n_keys, block = locate(cu_seqlens_ptr, n_sequences, n_blocks, H, T, S, BLOCK_M, CAUSAL, first_program)
    if block * BLOCK_M >= n_queries:
        return
    k_K, v_V = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    t_M = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_M = start + t_M
    first_position = block * BLOCK_M + n_keys - n_queries
    position_M = first_position + tl.arange(0, BLOCK_M)
    q_base = head_pointer(q_ptr, q_stride_b, q_stride_t, q_stride_h, batch, start + block * BLOCK_M, head)
    k_base = head_pointer(k_ptr, k_stride_b, k_stride_s, k_stride_g, batch, start, head // GROUP)
    v_base = head_pointer(v_ptr, v_stride_b, v_stride_s, v_stride_g, batch, start, head // GROUP)
    q_MK = load_tile(q_base + tile_offsets(q_stride_t, k_K, BLOCK_M), t_M < n_queries, k_K, True, KEY_WIDTH)
    if ROTARY > 0:
        q_MK = rotate_tile(q_MK, cos_ptr, sin_ptr, row_M, t_M < n_queries, ROTARY, False).to(q_MK.dtype)

    k_tile, v_tile = tile_offsets(k_stride_s, k_K, BLOCK_N), tile_offsets(v_stride_s, v_V, BLOCK_N)
    o_MV = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    if sinks_ptr is not None:
        # The sink is a key that was met first: its logit is the maximum so far, its weight the denominator so far, its value zero.
        max_M = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        sum_M = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        max_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
        sum_M = tl.zeros([BLOCK_M], tl.float32)
    first, whole, past_whole, past = key_runs(first_position, n_queries, n_keys, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)
    for run in tl.static_range(0 if WINDOW else 1, 3):
        begin = first if run == 0 else (whole if run == 1 else past_whole)
        end = whole if run == 0 else (past_whole if run == 1 else past)
        # One scalar pointer walks along each tensor: a tile of 64-bit pointers would take the registers that the products need.
        k_step, v_step = k_base + wide(begin) * k_stride_s, v_base + wide(begin) * v_stride_s
        for key in range(begin, end, BLOCK_N):
            key_N = key + tl.arange(0, BLOCK_N)
            k_NK = load_tile(k_step + k_tile, key_N < n_keys, k_K, run != 1, KEY_WIDTH)
            v_NV = load_tile(v_step + v_tile, key_N < n_keys, v_V, run != 1, VALUE_WIDTH)
            s_MN = product(q_MK, tl.trans(k_NK), None)
            if run != 1:
                seen_MN = visible(position_M[:, None], key_N[None, :], n_keys, window, CAUSAL, WINDOW)
                s_MN = tl.where(seen_MN, s_MN, float("-inf"))
            new_max_M = tl.maximum(max_M, tl.max(s_MN, 1) * scale_log2)
            # A row that has seen no key yet keeps -inf; the exponent must then be finite, or -inf - -inf would be NaN.
            shift_M = new_max_M if run == 1 else tl.where(new_max_M == float("-inf"), 0.0, new_max_M)
            p_MN = tl.exp2(s_MN * scale_log2 - shift_M[:, None])
            rescale_M = tl.exp2(max_M - shift_M)
            sum_M = sum_M * rescale_M + tl.sum(p_MN, 1)
            o_MV = product(p_MN.to(v_NV.dtype), v_NV, o_MV * rescale_M[:, None])
            max_M = new_max_M
            k_step += BLOCK_N * k_stride_s
            v_step += BLOCK_N * v_stride_s

    o_MV = o_MV / tl.where(sum_M > 0, sum_M, 1.0)[:, None]
    first_row = (wide(batch) * T + start + block * BLOCK_M) * H + head
    store_tile(o_ptr + first_row * VALUE_WIDTH, H * VALUE_WIDTH, o_MV, t_M < n_queries, v_V, VALUE_WIDTH)
    tl.store(lse_ptr + (wide(batch) * H + head) * T + row_M, max_M + tl.log2(sum_M), mask=t_M < n_queries)

"""First launch of Kimi delta attention: everything of a chunk that does not depend on the state, one program per chunk and value head.

Letters as in `chunk_rule.py`. Outputs: attention F_q and inverse (I + G)^-1 [H, tokens, CHUNK]; with scale, lengths and decays multiplied in, the
matrices with which the scan reads and writes the state, [tokens, H, K]: read_q = e^c q, read_k = e^c k, write = b e^{c_C - c} k; and whole = e^{c_C}
[H, slots, K].
"""

# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false
# fmt: off
import triton
import triton.language as tl

from triton_kernels.delta_tiles import inverse_length, invert_unit_lower, load_tile, place_chunk
from triton_kernels.gates import channel_decays, level_decays, same_pair


@triton.jit
def prepare_kernel(
    q, k, gate, beta, attention, inverse, read_q, read_k, write, whole, cu_seqlens,
    n_tokens: tl.int64, n_all_tokens: tl.int64, n_chunks, n_slots, n_sequences, n_heads, q_stride, q_head, k_stride, k_head, scale,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr, GROUP: tl.constexpr,
    NORMALIZE: tl.constexpr, PACKED: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):
    slot = (tl.program_id(0) // n_heads).to(tl.int64)
    head = (tl.program_id(0) % n_heads).to(tl.int64)
    token0, n_rows = place_chunk(cu_seqlens, slot, n_tokens, n_chunks, n_sequences, CHUNK, BLOCK_S, PACKED)
    if n_rows <= 0:
        return
    rows = tl.arange(0, CHUNK)
    inside = rows < n_rows
    dtype: tl.constexpr = q.dtype.element_ty
    q += token0 * q_stride + head // GROUP * q_head
    k += token0 * k_stride + head // GROUP * k_head
    row_k = (token0 * n_heads + head) * K
    b = tl.load(beta + (token0 + rows) * n_heads + head, mask=inside, other=0.0).to(tl.float32)
    q_factor = tl.zeros([CHUNK], tl.float32) + scale
    k_factor = tl.zeros([CHUNK], tl.float32) + 1.0
    if NORMALIZE:
        q_factor *= inverse_length(load_tile(q, rows, q_stride, tl.arange(0, BLOCK_K), inside, K).to(tl.float32))
        k_factor *= inverse_length(load_tile(k, rows, k_stride, tl.arange(0, BLOCK_K), inside, K).to(tl.float32))

    # Channels never meet before the sums over them: a few at a time, to stay within the registers.
    f_q = tl.zeros([CHUNK, CHUNK], tl.float32)
    f_k = tl.zeros([CHUNK, CHUNK], tl.float32)
    own = tl.zeros([CHUNK], tl.float32)
    for column0 in range(0, K, BLOCK):
        columns = column0 + tl.arange(0, BLOCK)
        c, c_last = channel_decays(gate + row_k, rows, n_heads * K, columns, inside, K)
        q_tile = load_tile(q, rows, q_stride, columns, inside, K).to(tl.float32)
        k_tile = load_tile(k, rows, k_stride, columns, inside, K).to(tl.float32)
        tile = row_k + rows[:, None] * (n_heads * K) + columns[None, :]
        mask = inside[:, None] & (columns < K)[None, :]
        from_start = tl.exp2(c)
        tl.store(read_q + tile, q_tile * from_start * q_factor[:, None], mask=mask)
        tl.store(read_k + tile, k_tile * from_start * k_factor[:, None], mask=mask)
        tl.store(write + tile, k_tile * tl.exp2(c_last[None, :] - c) * (k_factor * b)[:, None], mask=mask)
        tl.store(whole + (head * n_slots + slot) * K + columns, tl.exp2(c_last), mask=columns < K)
        own += tl.sum(q_tile * k_tile, 1)
        for level in range(0, LEVELS):
            decay, late = level_decays(c, rows, level)
            pairs = same_pair(rows, level)
            early = tl.trans(tl.where(late[:, None], 0.0, k_tile * decay).to(dtype))
            f_q += tl.where(pairs, tl.dot(tl.where(late[:, None], q_tile * decay, 0.0).to(dtype), early, input_precision=PRECISION), 0.0)
            f_k += tl.where(pairs, tl.dot(tl.where(late[:, None], k_tile * decay, 0.0).to(dtype), early, input_precision=PRECISION), 0.0)

    weight = (b * k_factor)[None, :]
    at = (head * n_all_tokens + token0) * CHUNK + rows[:, None] * CHUNK + rows[None, :]
    f_q += tl.where(rows[:, None] == rows[None, :], own[:, None], 0.0)
    tl.store(attention + at, f_q * weight * q_factor[:, None], mask=inside[:, None])
    tl.store(inverse + at, invert_unit_lower(f_k * weight * k_factor[:, None], CHUNK, PRECISION), mask=inside[:, None])

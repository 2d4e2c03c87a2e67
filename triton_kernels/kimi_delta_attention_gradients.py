"""Last launch of Kimi delta attention's backward: dq, dk, the gate's and beta's gradient, one program per chunk and value head.

With Y = [dO; -dV], Z = Y E^T and the letters of `delta_chunked.py`, channel by channel:

    dL_i = e^{c_i} Y_i S^T + sum_j Z_ij b_j k_j e^{c_i - c_j}      U_j = sum_i Z_ij L_i e^{c_i - c_j} + e^{c_C - c_j} E_j dS'^T
    dK = dL_k + b U      db = <K, U>      dc = q dL_q + k dL_k - b k U,  dc_C += rows of dS' S',  and dg sums dc from a row to the chunk's end

The decayed sums go through the levels of `kimi_delta_attention_decay.py`. As for the scalar gate S' is not read, and Z^T is a product of its own.
dq and dk are those of one value head: the sum over a group is left to the caller.
"""

# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false
# fmt: off
import triton
import triton.language as tl

from triton_kernels.delta_tiles import inverse_length, load_tile, place_chunk
from triton_kernels.gated_delta_rule_gradients import normalized_gradient
from triton_kernels.kimi_delta_attention_decay import channel_decays, level_decays, same_pair


@triton.jit
def value_products(y, y_stride, errors, e_stride, states, rows, k_columns, inside, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr,
                   BLOCK: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """(Y E^T, Y S^T) of one half of Y, summed over blocks of value columns."""
    z = tl.zeros([CHUNK, CHUNK], tl.float32)
    dl = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    for column0 in range(0, V, BLOCK):
        columns = column0 + tl.arange(0, BLOCK)
        y_tile = load_tile(y, rows, y_stride, columns, inside, V)
        e_tile = load_tile(errors, rows, e_stride, columns, inside, V)
        s_tile = load_tile(states, k_columns, V, columns, k_columns < K, V)
        z = tl.dot(y_tile, tl.trans(e_tile), z, input_precision=PRECISION)
        dl = tl.dot(y_tile, tl.trans(s_tile), dl, input_precision=PRECISION)
    return z, dl


@triton.jit
def read_gradient(z, dl, k_tile, c, rows, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """dl + sum_{j < i} z_ij k_j e^{c_i - c_j}."""
    size = CHUNK // 2
    while size > 0:
        decay, late = level_decays(c, rows, size, PRECISION)
        early = tl.where(late[:, None], 0.0, k_tile.to(tl.float32) * decay).to(k_tile.dtype)
        level = tl.dot(tl.where(same_pair(rows, size), z, 0.0).to(k_tile.dtype), early, input_precision=PRECISION)
        dl += tl.where(late[:, None], level * decay, 0.0)
        size = size // 2
    return dl


@triton.jit
def gradient_kernel(
    q, k, gate, beta, do, errors, dv, states, dstates, dq, dk, dgate, dbeta, cu_seqlens,
    n_tokens: tl.int64, n_chunks, n_slots, n_sequences, n_heads, q_stride, q_head, k_stride, k_head, do_stride, do_head, scale,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
    NORMALIZE: tl.constexpr, PACKED: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):
    slot = (tl.program_id(0) // n_heads).to(tl.int64)
    head = (tl.program_id(0) % n_heads).to(tl.int64)
    token0, n_rows = place_chunk(cu_seqlens, slot, n_tokens, n_chunks, n_sequences, CHUNK, BLOCK_S, PACKED)
    if n_rows <= 0:
        return
    rows = tl.arange(0, CHUNK)
    inside = rows < n_rows
    k_columns = tl.arange(0, BLOCK_K)
    dtype: tl.constexpr = q.dtype.element_ty
    q += token0 * q_stride + head // GROUP * q_head
    k += token0 * k_stride + head // GROUP * k_head
    do += token0 * do_stride + head * do_head
    row_v = (token0 * n_heads + head) * V
    dv += row_v
    errors += row_v
    state_at = (head * n_slots + slot) * (K * V)
    states += state_at
    dstates += state_at
    gate += (token0 * n_heads + head) * K
    q_tile = load_tile(q, rows, q_stride, k_columns, inside, K)
    k_tile = load_tile(k, rows, k_stride, k_columns, inside, K)
    q_length = tl.zeros([CHUNK], tl.float32) + 1.0
    k_length = q_length
    if NORMALIZE:
        q_length = inverse_length(q_tile.to(tl.float32))
        k_length = inverse_length(k_tile.to(tl.float32))
    token_head = (token0 + rows) * n_heads + head
    b = tl.load(beta + token_head, mask=inside, other=0.0).to(tl.float32)
    c, c_last = channel_decays(gate, rows, n_heads * K, k_columns, inside, K)

    # What the keys wrote: U. The transposed Z carry the factor of the row that read.
    z_q, u = value_products(errors, n_heads * V, do, do_stride, dstates, rows, k_columns, inside, K, V, BLOCK_K, BLOCK, CHUNK, PRECISION)
    z_k = tl.zeros([CHUNK, CHUNK], tl.float32)
    for column0 in range(0, V, BLOCK):
        columns = column0 + tl.arange(0, BLOCK)
        e_tile = load_tile(errors, rows, n_heads * V, columns, inside, V)
        z_k = tl.dot(e_tile, tl.trans(load_tile(dv, rows, n_heads * V, columns, inside, V)), z_k, input_precision=PRECISION)
    z_q = z_q * (q_length * scale)[None, :]
    z_k = z_k * -k_length[None, :]
    u *= tl.exp2(c_last[None, :] - c)
    along_state = tl.sum(k_tile.to(tl.float32) * u * (b * k_length)[:, None], 0)
    own = tl.sum(tl.where(rows[:, None] == rows[None, :], z_q, 0.0), 1)
    u += own[:, None] * q_tile.to(tl.float32)
    size = CHUNK // 2
    while size > 0:
        decay, late = level_decays(c, rows, size, PRECISION)
        pairs = same_pair(rows, size)
        q_late = tl.where(late[:, None], q_tile.to(tl.float32) * decay, 0.0).to(dtype)
        level = tl.dot(tl.where(pairs, z_q, 0.0).to(dtype), q_late, input_precision=PRECISION)
        k_late = tl.where(late[:, None], k_tile.to(tl.float32) * decay, 0.0).to(dtype)
        level = tl.dot(tl.where(pairs, z_k, 0.0).to(dtype), k_late, level, input_precision=PRECISION)
        u += tl.where(late[:, None], 0.0, level * decay)
        size = size // 2
    db = tl.sum(k_tile.to(tl.float32) * u, 1) * k_length
    tl.store(dbeta + token_head, db, mask=inside)

    # What the keys read: dL_k. The Z carry b_j / |k_j| of the key.
    z_k, dl = value_products(dv, n_heads * V, errors, n_heads * V, states, rows, k_columns, inside, K, V, BLOCK_K, BLOCK, CHUNK, PRECISION)
    dl = -read_gradient(z_k * (b * k_length)[None, :], dl * tl.exp2(c), k_tile, c, rows, CHUNK, PRECISION)
    k_rows = k_tile.to(tl.float32) * k_length[:, None]
    dc = k_rows * (dl - b[:, None] * u)
    dl += b[:, None] * u
    tile = (token0 * n_heads + head) * K + rows[:, None] * (n_heads * K) + k_columns[None, :]
    mask = inside[:, None] & (k_columns < K)[None, :]
    tl.store(dk + tile, normalized_gradient(dl, k_tile, k_length, tl.sum(k_rows * dl, 1), NORMALIZE), mask=mask)

    # What the queries read: dL_q.
    z_q, dl = value_products(do, do_stride, errors, n_heads * V, states, rows, k_columns, inside, K, V, BLOCK_K, BLOCK, CHUNK, PRECISION)
    z_q = z_q * (b * k_length)[None, :]
    own = tl.sum(tl.where(rows[:, None] == rows[None, :], z_q, 0.0), 1)
    dl = read_gradient(z_q, dl * tl.exp2(c) + own[:, None] * k_tile.to(tl.float32), k_tile, c, rows, CHUNK, PRECISION) * scale
    along = q_tile.to(tl.float32) * q_length[:, None] * dl
    dc += along
    tl.store(dq + tile, normalized_gradient(dl, q_tile, q_length, tl.sum(along, 1), NORMALIZE), mask=mask)

    products = tl.zeros([BLOCK_K], tl.float32)
    for column0 in range(0, V, 16):
        columns = column0 + tl.arange(0, 16)
        s_tile = load_tile(states, k_columns, V, columns, k_columns < K, V).to(tl.float32)
        products += tl.sum(s_tile * load_tile(dstates, k_columns, V, columns, k_columns < K, V).to(tl.float32), 1)
    dc = tl.cumsum(dc, 0, reverse=True) + (products * tl.exp2(c_last) + along_state)[None, :]
    tl.store(dgate + tile, dc, mask=mask)

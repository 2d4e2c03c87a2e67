"""The last two launches of Kimi delta attention's backward: dq, dk, the gate's and beta's gradient.

With Y = [dO; -dV], Z = Y E^T and the letters of `chunk_rule.py`, channel by channel:

    dL_i = e^{c_i} Y_i S^T + sum_j Z_ij b_j k_j e^{c_i - c_j}      U_j = sum_i Z_ij L_i e^{c_i - c_j} + e^{c_C - c_j} E_j dS'^T
    dK = dL_k + b U      db = <K, U>      dc = q dL_q + k dL_k - b k U,  dc_C += rows of dS' S',  and dg sums dc from a row to the chunk's end

The decayed sums go through the levels of `gates.py`. As for the scalar gate S' is not read, and Z^T is a product of its own.
Channels meet only in Z and in the row sums that normalisation and beta need. So a program of the first launch takes a chunk, a value head and a few
channels, which keeps it within the registers, and the second launch does the row sums, the normalisation and the sum over a group of value heads.
"""

# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false
# fmt: off
import triton
import triton.language as tl

from triton_kernels.delta_tiles import inverse_length, load_tile, place_chunk
from triton_kernels.gated_delta_rule_gradients import normalized_gradient
from triton_kernels.gates import channel_decays, level_decays, same_pair


@triton.jit
def scores_gradient(y, y_stride, x, x_stride, rows, inside, V: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """Y X^T [CHUNK, CHUNK] over all value columns."""
    z = tl.zeros([CHUNK, CHUNK], tl.float32)
    for column0 in range(0, V, BLOCK_V):
        columns = column0 + tl.arange(0, BLOCK_V)
        y_tile = load_tile(y, rows, y_stride, columns, inside, V)
        z = tl.dot(y_tile, tl.trans(load_tile(x, rows, x_stride, columns, inside, V)), z, input_precision=PRECISION)
    return z


@triton.jit
def state_product(y, y_stride, states, rows, k_columns, inside, K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr,
                  CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """Y S^T [CHUNK, channels] over all value columns."""
    out = tl.zeros([CHUNK, BLOCK], tl.float32)
    for column0 in range(0, V, BLOCK_V):
        columns = column0 + tl.arange(0, BLOCK_V)
        s_tile = load_tile(states, k_columns, V, columns, k_columns < K, V)
        out = tl.dot(load_tile(y, rows, y_stride, columns, inside, V), tl.trans(s_tile), out, input_precision=PRECISION)
    return out


@triton.jit
def read_gradient(z, dl, k_tile, c, rows, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """dl + sum_{j < i} z_ij k_j e^{c_i - c_j}."""
    for level in range(0, LEVELS):
        decay, late = level_decays(c, rows, level)
        early = tl.where(late[:, None], 0.0, k_tile * decay).to(z.dtype)
        product = tl.dot(tl.where(same_pair(rows, level), z, 0.0).to(z.dtype), early, input_precision=PRECISION)
        dl += tl.where(late[:, None], product * decay, 0.0)
    return dl


@triton.jit
def write_gradient(z, u, x_tile, c, rows, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """u + sum_{i > j} z_ji x_i e^{c_i - c_j}."""
    for level in range(0, LEVELS):
        decay, late = level_decays(c, rows, level)
        x_late = tl.where(late[:, None], x_tile * decay, 0.0).to(z.dtype)
        product = tl.dot(tl.where(same_pair(rows, level), z, 0.0).to(z.dtype), x_late, input_precision=PRECISION)
        u += tl.where(late[:, None], 0.0, product * decay)
    return u


@triton.jit
def channel_block(
    column0, q, q_stride, k, k_stride, gate, do, do_stride, dv, errors, v_stride, states, dstates, dgate, k_row_stride, rows, inside, b, k_length,
    scale, q_length,
    K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr,
):
    """For BLOCK channels: the gradients of the normalised q and k, k's part in that of beta; the gate's gradient is stored."""
    dtype: tl.constexpr = q.dtype.element_ty
    columns = column0 + tl.arange(0, BLOCK)
    c, c_last = channel_decays(gate, rows, k_row_stride, columns, inside, K)
    from_start = tl.exp2(c)
    q_tile = load_tile(q, rows, q_stride, columns, inside, K).to(tl.float32)
    k_tile = load_tile(k, rows, k_stride, columns, inside, K).to(tl.float32)

    # Z carries b_j / |k_j| of the key written; its transpose, a product of its own, the factor of the row that read.
    on_diagonal = rows[:, None] == rows[None, :]
    u = state_product(errors, v_stride, dstates, rows, columns, inside, K, V, BLOCK, BLOCK_V, CHUNK, PRECISION) * tl.exp2(c_last[None, :] - c)
    along_state = tl.sum(k_tile * u * (b * k_length)[:, None], 0)
    z = scores_gradient(errors, v_stride, do, do_stride, rows, inside, V, BLOCK_V, CHUNK, PRECISION) * (q_length * scale)[None, :]
    u += tl.sum(tl.where(on_diagonal, z, 0.0), 1)[:, None] * q_tile
    u = write_gradient(z.to(dtype), u, q_tile, c, rows, LEVELS, PRECISION)
    z = scores_gradient(errors, v_stride, dv, v_stride, rows, inside, V, BLOCK_V, CHUNK, PRECISION) * -k_length[None, :]
    u = write_gradient(z.to(dtype), u, k_tile, c, rows, LEVELS, PRECISION)
    k_rows = k_tile * k_length[:, None]
    dbeta = tl.sum(k_rows * u, 1)
    u *= b[:, None]
    z = scores_gradient(dv, v_stride, errors, v_stride, rows, inside, V, BLOCK_V, CHUNK, PRECISION) * (-b * k_length)[None, :]
    dk = -state_product(dv, v_stride, states, rows, columns, inside, K, V, BLOCK, BLOCK_V, CHUNK, PRECISION) * from_start
    dk = read_gradient(z.to(dtype), dk, k_tile, c, rows, LEVELS, PRECISION)
    dc = k_rows * (dk - u)
    dk += u

    z = scores_gradient(do, do_stride, errors, v_stride, rows, inside, V, BLOCK_V, CHUNK, PRECISION) * (b * k_length)[None, :]
    dq = state_product(do, do_stride, states, rows, columns, inside, K, V, BLOCK, BLOCK_V, CHUNK, PRECISION) * from_start
    dq += tl.sum(tl.where(on_diagonal, z, 0.0), 1)[:, None] * k_tile
    dq = read_gradient(z.to(dtype), dq, k_tile, c, rows, LEVELS, PRECISION) * scale
    dc += q_tile * q_length[:, None] * dq

    products = tl.zeros([BLOCK], tl.float32)
    for value0 in range(0, V, 16):
        values = value0 + tl.arange(0, 16)
        s_tile = load_tile(states, columns, V, values, columns < K, V).to(tl.float32)
        products += tl.sum(s_tile * load_tile(dstates, columns, V, values, columns < K, V).to(tl.float32), 1)
    dc = tl.cumsum(dc, 0, reverse=True) + (products * tl.exp2(c_last) + along_state)[None, :]
    tl.store(dgate + rows[:, None] * k_row_stride + columns[None, :], dc, mask=inside[:, None] & (columns < K)[None, :])
    return dq, dk, dbeta


@triton.jit
def gradient_kernel(
    q, k, gate, beta, do, errors, dv, states, dstates, dq, dk, dgate, dbeta, cu_seqlens,
    n_tokens: tl.int64, n_all_tokens: tl.int64, n_chunks, n_slots, n_sequences, n_heads, q_stride, q_head, k_stride, k_head, do_stride, do_head,
    scale, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr, CHUNK: tl.constexpr,
    LEVELS: tl.constexpr, GROUP: tl.constexpr, NORMALIZE: tl.constexpr, PACKED: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):
    """The gate's gradient; those of the normalised q and k per value head [tokens, H, K] and of beta per block of channels, all three in fp32."""
    N_BLOCKS: tl.constexpr = (K + CHANNELS - 1) // CHANNELS
    block = tl.program_id(0) % N_BLOCKS
    slot = (tl.program_id(0) // N_BLOCKS // n_heads).to(tl.int64)
    head = (tl.program_id(0) // N_BLOCKS % n_heads).to(tl.int64)
    token0, n_rows = place_chunk(cu_seqlens, slot, n_tokens, n_chunks, n_sequences, CHUNK, BLOCK_S, PACKED)
    if n_rows <= 0:
        return
    rows = tl.arange(0, CHUNK)
    inside = rows < n_rows
    q += token0 * q_stride + head // GROUP * q_head
    k += token0 * k_stride + head // GROUP * k_head
    do += token0 * do_stride + head * do_head
    dv += (token0 * n_heads + head) * V
    errors += (token0 * n_heads + head) * V
    states += (head * n_slots + slot) * (K * V)
    dstates += (head * n_slots + slot) * (K * V)
    row_k = (token0 * n_heads + head) * K
    q_length = tl.zeros([CHUNK], tl.float32) + 1.0
    k_length = q_length
    if NORMALIZE:
        q_length = inverse_length(load_tile(q, rows, q_stride, tl.arange(0, BLOCK_K), inside, K).to(tl.float32))
        k_length = inverse_length(load_tile(k, rows, k_stride, tl.arange(0, BLOCK_K), inside, K).to(tl.float32))
    token_head = (token0 + rows) * n_heads + head
    b = tl.load(beta + token_head, mask=inside, other=0.0).to(tl.float32)
    dq_block, dk_block, db = channel_block(
        block * CHANNELS, q, q_stride, k, k_stride, gate + row_k, do, do_stride, dv, errors, n_heads * V, states, dstates, dgate + row_k, n_heads * K,
        rows, inside, b, k_length, scale, q_length, K, V, CHANNELS, BLOCK, CHUNK, LEVELS, PRECISION,
    )
    columns = block * CHANNELS + tl.arange(0, CHANNELS)
    tile = row_k + rows[:, None] * (n_heads * K) + columns[None, :]
    mask = inside[:, None] & (columns < K)[None, :]
    tl.store(dq + tile, dq_block, mask=mask)
    tl.store(dk + tile, dk_block, mask=mask)
    tl.store(dbeta + block * n_all_tokens * n_heads + token_head, db, mask=inside)


@triton.jit
def finish_tile(x, x_stride, grads, out, row0, rows, inside, head, n_heads, K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
                GROUP: tl.constexpr, NORMALIZE: tl.constexpr):
    """Sum over the value heads of a group and take the gradient through the normalisation."""
    columns = tl.arange(0, BLOCK_K)
    grad = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for member in range(0, GROUP):
        grad += load_tile(grads + (row0 * n_heads + head * GROUP + member) * K, rows, n_heads * K, columns, inside, K)
    x_tile = load_tile(x, rows, x_stride, columns, inside, K)
    length = inverse_length(x_tile.to(tl.float32))
    grad = normalized_gradient(grad, x_tile, length, tl.sum(x_tile.to(tl.float32) * grad, 1) * length, NORMALIZE)
    groups = n_heads // GROUP
    tile = (row0 * groups + head) * K + rows[:, None] * (groups * K) + columns[None, :]
    tl.store(out + tile, grad, mask=inside[:, None] & (columns < K)[None, :])


@triton.jit
def finish_kernel(
    q, k, head_dq, head_dk, block_dbeta, dq, dk, dbeta, n_all_tokens: tl.int64, n_heads, q_stride, q_head, k_stride, k_head,
    K: tl.constexpr, BLOCK_K: tl.constexpr, N_BLOCKS: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, NORMALIZE: tl.constexpr,
):
    groups = n_heads // GROUP
    row0 = (tl.program_id(0) // groups).to(tl.int64) * ROWS
    head = (tl.program_id(0) % groups).to(tl.int64)
    rows = tl.arange(0, ROWS)
    inside = row0 + rows < n_all_tokens
    finish_tile(q + row0 * q_stride + head * q_head, q_stride, head_dq, dq, row0, rows, inside, head, n_heads, K, BLOCK_K, ROWS, GROUP, NORMALIZE)
    finish_tile(k + row0 * k_stride + head * k_head, k_stride, head_dk, dk, row0, rows, inside, head, n_heads, K, BLOCK_K, ROWS, GROUP, NORMALIZE)
    for member in range(0, GROUP):
        at = (row0 + rows) * n_heads + head * GROUP + member
        db = tl.zeros([ROWS], tl.float32)
        for block in range(0, N_BLOCKS):
            db += tl.load(block_dbeta + block * n_all_tokens * n_heads + at, mask=inside, other=0.0)
        tl.store(dbeta + at, db, mask=inside)

"""Last launch of the gated delta rule's backward: dq, dk, the gate's and beta's gradient, one program per chunk and value head.

With Y = [dO; -dV], Z = Y E^T and the letters of `chunk_rule.py`:

    dL = e^c Y S^T + (Z . D) b K      U = (Z . D)^T L + e^{c_C - c} E dS'^T      dK = dL_k + b U      db = <K, U>
    dc = <Q, dL_q> + <K, dL_k> - b db,  dc_C += <dS', S'>,  and dg sums dc from a row to the chunk's end

<dS', S'> is e^{c_C} <dS', S> + sum_j b_j <k_j, (e^{c_C - c} E dS'^T)_j>, so S' is not read. Z^T is computed as E Y^T, a product of its own: the
transpose of a product's result is what Triton before 3.7.1 miscompiles on Hopper. dq and dk are those of
one value head: the sum over a group is left to the caller.
"""

# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false
# fmt: off
import triton
import triton.language as tl

from triton_kernels.delta_tiles import inverse_length, load_tile, place_chunk
from triton_kernels.gates import decay_from, decay_to, scalar_decays


@triton.jit
def normalized_gradient(dy, x, length, along, NORMALIZE: tl.constexpr):
    """Gradient of x where dy is that of y = x * length (length 1 / |x|) and `along` is <y, dy>."""
    if NORMALIZE:
        return (dy - x.to(tl.float32) * (length * along)[:, None]) * length[:, None]
    return dy


@triton.jit
def gradient_kernel(
    q, k, gate, beta, do, errors, dv, states, dstates, dq, dk, dgate, dbeta, cu_seqlens,
    n_tokens: tl.int64, n_all_tokens: tl.int64, n_chunks, n_slots, n_sequences, n_heads, q_stride, q_head, k_stride, k_head, do_stride, do_head,
    scale, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
    HAS_GATE: tl.constexpr, NORMALIZE: tl.constexpr, PACKED: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
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
    q_length = tl.zeros([CHUNK], tl.float32) + 1.0
    k_length = q_length
    if NORMALIZE:
        q_length = inverse_length(load_tile(q, rows, q_stride, k_columns, inside, K).to(tl.float32))
        k_length = inverse_length(load_tile(k, rows, k_stride, k_columns, inside, K).to(tl.float32))
    token_head = (token0 + rows) * n_heads + head
    b = tl.load(beta + token_head, mask=inside, other=0.0).to(tl.float32)
    c, c_last = scalar_decays(gate + token0 * n_heads + head if HAS_GATE else gate, rows, n_heads, inside, CHUNK, HAS_GATE)
    do_head_base = do + token0 * do_stride + head * do_head
    row_v = (token0 * n_heads + head) * V
    state_at = (head * n_slots + slot) * (K * V)

    # What the keys wrote: U. The weights carry the factor of the row that read.
    z_q, z_k = tl.zeros([CHUNK, CHUNK], tl.float32), tl.zeros([CHUNK, CHUNK], tl.float32)
    u = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    for column0 in range(0, V, BLOCK):
        columns = column0 + tl.arange(0, BLOCK)
        do_tile = load_tile(do_head_base, rows, do_stride, columns, inside, V)
        dv_tile = load_tile(dv + row_v, rows, n_heads * V, columns, inside, V)
        e_tile = load_tile(errors + row_v, rows, n_heads * V, columns, inside, V)
        ds_tile = load_tile(dstates + state_at, k_columns, V, columns, k_columns < K, V)
        z_q = tl.dot(e_tile, tl.trans(do_tile), z_q, input_precision=PRECISION)
        z_k = tl.dot(e_tile, tl.trans(dv_tile), z_k, input_precision=PRECISION)
        u = tl.dot(e_tile, tl.trans(ds_tile), u, input_precision=PRECISION)
    k_tile = load_tile(k, rows, k_stride, k_columns, inside, K)
    u *= tl.exp2(c_last - c)[:, None]
    along_state = tl.sum(k_tile.to(tl.float32) * u, 1) * b * k_length
    u = tl.dot((z_k * decay_from(c, rows, True) * -k_length[None, :]).to(dtype), k_tile, u, input_precision=PRECISION)
    q_tile = load_tile(q, rows, q_stride, k_columns, inside, K)
    u = tl.dot((z_q * decay_from(c, rows, False) * (q_length * scale)[None, :]).to(dtype), q_tile, u, input_precision=PRECISION)
    db = tl.sum(k_tile.to(tl.float32) * u, 1) * k_length
    tl.store(dbeta + token_head, db, mask=inside)

    # What the keys read: dL_k. The weights carry b_j / |k_j| of the key; a row's own factor comes at the end.
    z = tl.zeros([CHUNK, CHUNK], tl.float32)
    dl = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    for column0 in range(0, V, BLOCK):
        columns = column0 + tl.arange(0, BLOCK)
        dv_tile = load_tile(dv + row_v, rows, n_heads * V, columns, inside, V)
        e_tile = load_tile(errors + row_v, rows, n_heads * V, columns, inside, V)
        s_tile = load_tile(states + state_at, k_columns, V, columns, k_columns < K, V)
        z = tl.dot(dv_tile, tl.trans(e_tile), z, input_precision=PRECISION)
        dl = tl.dot(dv_tile, tl.trans(s_tile), dl, input_precision=PRECISION)
    k_tile = load_tile(k, rows, k_stride, k_columns, inside, K)
    weight = decay_to(c, rows, True) * (b * k_length)[None, :]
    dl = tl.dot((z * weight).to(dtype), k_tile, dl * tl.exp2(c)[:, None], input_precision=PRECISION)
    along_k = -tl.sum(k_tile.to(tl.float32) * dl, 1) * k_length
    mask = inside[:, None] & (k_columns < K)[None, :]
    tile = (token0 * n_heads + head) * K + rows[:, None] * (n_heads * K) + k_columns[None, :]
    tl.store(dk + tile, normalized_gradient(b[:, None] * u - dl, k_tile, k_length, along_k + b * db, NORMALIZE), mask=mask)

    # What the queries read: dL_q.
    z = tl.zeros([CHUNK, CHUNK], tl.float32)
    dl = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    for column0 in range(0, V, BLOCK):
        columns = column0 + tl.arange(0, BLOCK)
        do_tile = load_tile(do_head_base, rows, do_stride, columns, inside, V)
        e_tile = load_tile(errors + row_v, rows, n_heads * V, columns, inside, V)
        s_tile = load_tile(states + state_at, k_columns, V, columns, k_columns < K, V)
        z = tl.dot(do_tile, tl.trans(e_tile), z, input_precision=PRECISION)
        dl = tl.dot(do_tile, tl.trans(s_tile), dl, input_precision=PRECISION)
    k_tile = load_tile(k, rows, k_stride, k_columns, inside, K)
    weight = decay_to(c, rows, False) * (b * k_length)[None, :]
    dl = tl.dot((z * weight).to(dtype), k_tile, dl * tl.exp2(c)[:, None], input_precision=PRECISION) * scale
    q_tile = load_tile(q, rows, q_stride, k_columns, inside, K)
    along_q = tl.sum(q_tile.to(tl.float32) * dl, 1) * q_length
    tl.store(dq + tile, normalized_gradient(dl, q_tile, q_length, along_q, NORMALIZE), mask=mask)

    if HAS_GATE:
        products = tl.zeros([1024], tl.float32)
        for start in range(0, K * V, 1024):
            entries = start + tl.arange(0, 1024)
            s_part = tl.load(states + state_at + entries, mask=entries < K * V, other=0.0).to(tl.float32)
            products += s_part * tl.load(dstates + state_at + entries, mask=entries < K * V, other=0.0).to(tl.float32)
        dc = along_q + along_k - b * db
        # From a row to the chunk's end, and what the state there adds to every row (as a matrix: Triton 3.7.1 cannot sum these vectors to a scalar
        # for Blackwell).
        sums = tl.where(rows[None, :] >= rows[:, None], dc[None, :], 0.0) + along_state[None, :]
        tl.store(dgate + token_head, tl.exp2(c_last) * tl.sum(products, 0) + tl.sum(sums, 1), mask=inside)

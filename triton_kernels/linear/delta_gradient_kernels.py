"""The last launches of the delta rules' backward: dq, dk, the gate's and beta's gradient.

With Y = [dO; -dV], Z = Y E^T and the letters of notes/kernels/gated_delta_rule.md, channel by channel where each has a
decay of its own (CHANNEL):

    dL_i = e^{c_i} Y_i S^T + sum_j Z_ij b_j k_j e^{c_i - c_j}      U_j = sum_i Z_ij L_i e^{c_i - c_j} + e^{c_C - c_j}
    E_j dS'^T dK = dL_k + b U      db = <K, U>      dc = q dL_q + k dL_k - b k U,  dc_C += <dS', S'>,  and dg sums dc
    from a row to the chunk's end

With one decay for all channels dc is summed over them. <dS', S'> is e^{c_C} <dS', S> + sum_j b_j <k_j, (e^{c_C - c} E
dS'^T)_j>, so S' is not read. Z^T is computed as E Y^T, a product of its own: the transpose of a product's result is
what Triton before 3.7.1 miscompiles on Hopper.

A program takes a chunk and a value head. With a decay per channel it takes only a few channels, which keeps it within
the registers: they meet only in Z and in the row sums that normalisation and beta need, and a second launch does those,
and the sum over a group of value heads. Otherwise the latter is left to the caller.
"""

# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false
from collections import namedtuple

import triton
import triton.language as tl

from triton_kernels.linear.tiles import (
    Matrix,
    channel_decays,
    chunk_decays,
    decay_within,
    level_decays,
    load_tile,
    normalization,
    place_chunk,
)

# Of one call: what goes in and what comes out, and strides by token and by head.
GradientTensors = namedtuple(
    "GradientTensors", "q k gate beta do errors dv states dstates dq dk dgate dbeta cu_seqlens"
)
GradientStrides = namedtuple("GradientStrides", "q q_head k k_head do do_head")
FinishTensors = namedtuple("FinishTensors", "q k head_dq head_dk block_dbeta dq dk dbeta")
FinishForm = namedtuple("FinishForm", "K BLOCK_K N_BLOCKS ROWS GROUP NORMALIZE")


@triton.jit
def row_product(
    y, x, V: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr
):
    """Y X^T [CHUNK, N] over all V value columns, for N rows of X; both are a `Matrix`."""
    out = tl.zeros([CHUNK, N], tl.float32)
    for column0 in range(0, V, BLOCK):
        columns = column0 + tl.arange(0, BLOCK)
        x_tile = load_tile(x.ptr, x.rows, x.stride, columns, x.inside, V)
        y_tile = load_tile(y.ptr, y.rows, y.stride, columns, y.inside, V)
        out = tl.dot(y_tile, tl.trans(x_tile), out, input_precision=PRECISION)
    return out


@triton.jit
def add_decayed(
    out,
    z,
    x_tile,
    c,
    rows,
    SIGN: tl.constexpr,
    STRICT: tl.constexpr,
    CHUNK: tl.constexpr,
    CHANNEL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out_i + sum_j z_ij x_j e^{|c_i - c_j|'s negative} over j before i (SIGN 1) or after it (-1), and over j = i
    unless STRICT."""
    dtype: tl.constexpr = x_tile.dtype
    if CHANNEL:
        x = x_tile.to(tl.float32)
        if not STRICT:
            out += tl.sum(tl.where(rows[:, None] == rows[None, :], z, 0.0), 1)[:, None] * x
        z = z.to(dtype)
        size = 1
        while size < CHUNK:
            decay, late, pairs = level_decays(c, rows, size)
            receives = (late if SIGN > 0 else ~late)[:, None]
            given = tl.where(receives, 0.0, x * decay).to(dtype)
            product = tl.dot(tl.where(pairs, z, 0.0).to(dtype), given, input_precision=PRECISION)
            out += tl.where(receives, product * decay, 0.0)
            size *= 2
        return out
    else:
        return tl.dot((z * decay_within(c, rows, SIGN, STRICT)).to(dtype), x_tile, out, input_precision=PRECISION)


@triton.jit
def of_gate(x, CHANNEL: tl.constexpr):
    """[CHUNK, channels] as it is where each channel has a decay, else its row sums."""
    if CHANNEL:
        return x
    else:
        return tl.sum(x, 1)


@triton.jit
def normalized_gradient(dy, x, length):
    """Gradient of x where dy is that of y = x * length, length 1 / |x|."""
    x = x.to(tl.float32)
    along = tl.sum(x * dy, 1) * length
    return (dy - x * (length * along)[:, None]) * length[:, None]


@triton.jit
def gradient_kernel(
    tensors,
    n_tokens: tl.int64,
    n_all_tokens: tl.int64,
    sizes,
    strides,
    scale,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """dq and dk of a value head [tokens, H, K], the gate's and beta's gradient. CHANNEL: dq and dk are those of the
    normalised q and k, in fp32, and beta's is one for each block of channels."""
    K: tl.constexpr = FORM.K
    V: tl.constexpr = FORM.V
    BLOCK_K: tl.constexpr = FORM.BLOCK_K
    CHUNK: tl.constexpr = FORM.CHUNK
    CHANNEL: tl.constexpr = FORM.CHANNEL
    NORMALIZE: tl.constexpr = FORM.NORMALIZE
    PRECISION: tl.constexpr = FORM.PRECISION
    gate, dq, dk, dgate, dbeta = tensors.gate, tensors.dq, tensors.dk, tensors.dgate, tensors.dbeta
    n_slots, n_heads, n_sequences = sizes
    N_BLOCKS: tl.constexpr = (K + CHANNELS - 1) // CHANNELS
    block, program = tl.program_id(0) % N_BLOCKS, tl.program_id(0) // N_BLOCKS
    slot, head, _, token0, n_rows = place_chunk(
        tensors.cu_seqlens, program, n_tokens, n_sequences, n_heads, CHUNK, FORM.BLOCK_S, FORM.PACKED
    )
    if n_rows <= 0:
        return
    rows = tl.arange(0, CHUNK)
    inside = rows < n_rows
    columns = block * CHANNELS + tl.arange(0, CHANNELS)
    q = tensors.q + (token0 * strides.q + head // FORM.GROUP * strides.q_head)
    k = tensors.k + (token0 * strides.k + head // FORM.GROUP * strides.k_head)
    token_head = token0 * n_heads + head
    v_stride = n_heads * V
    # Rows of value columns: of this chunk's tokens, or of the state's key channels.
    do = Matrix(tensors.do + (token0 * strides.do + head * strides.do_head), strides.do, rows, inside)
    dv = Matrix(tensors.dv + token_head * V, v_stride, rows, inside)
    errors = Matrix(tensors.errors + token_head * V, v_stride, rows, inside)
    states = Matrix(tensors.states + (head * n_slots + slot) * (K * V), V, columns, columns < K)
    dstates = Matrix(tensors.dstates + (head * n_slots + slot) * (K * V), V, columns, columns < K)
    q_length = normalization(q, rows, strides.q, inside, K, BLOCK_K, CHUNK, NORMALIZE)
    k_length = normalization(k, rows, strides.k, inside, K, BLOCK_K, CHUNK, NORMALIZE)
    b = tl.load(tensors.beta + token_head + rows * n_heads, mask=inside, other=0.0).to(tl.float32)
    if CHANNEL:
        c, c_last = channel_decays(gate + token_head * K, rows, n_heads * K, columns, inside, K)
        to_end = tl.exp2(c_last[None, :] - c)
    else:
        c, c_last = chunk_decays(None if gate is None else gate + token_head, rows, n_heads, inside, CHUNK)
        to_end = tl.exp2(c_last - c)[:, None]
    tile = token_head * K + rows[:, None] * (n_heads * K) + columns[None, :]
    mask = inside[:, None] & (columns < K)[None, :]

    # What the keys wrote: U. The weights carry the factor of the row that read.
    u = row_product(errors, dstates, V, CHANNELS, CHUNK, BLOCK, PRECISION)
    z = row_product(errors, do, V, CHUNK, CHUNK, BLOCK, PRECISION)
    u *= to_end
    k_tile = load_tile(k, rows, strides.k, columns, inside, K)
    along_state = tl.sum(k_tile.to(tl.float32) * u * (b * k_length)[:, None], 0 if CHANNEL else 1)
    q_tile = load_tile(q, rows, strides.q, columns, inside, K)
    u = add_decayed(u, z * (q_length * scale)[None, :], q_tile, c, rows, -1, False, CHUNK, CHANNEL, PRECISION)
    z = row_product(errors, dv, V, CHUNK, CHUNK, BLOCK, PRECISION)
    u = add_decayed(u, z * -k_length[None, :], k_tile, c, rows, -1, True, CHUNK, CHANNEL, PRECISION)
    tl.store(
        dbeta + block * n_all_tokens * n_heads + token_head + rows * n_heads,
        tl.sum(k_tile.to(tl.float32) * u, 1) * k_length,
        mask=inside,
    )
    u *= b[:, None]

    # What the keys read: -dL_k. The weights carry b_j / |k_j| of the key; a row's own factor comes at the end.
    from_start = tl.exp2(c) if CHANNEL else tl.exp2(c)[:, None]
    dl = row_product(dv, states, V, CHANNELS, CHUNK, BLOCK, PRECISION)
    z = row_product(dv, errors, V, CHUNK, CHUNK, BLOCK, PRECISION)
    k_tile = load_tile(k, rows, strides.k, columns, inside, K)
    dl = add_decayed(dl * from_start, z * (b * k_length)[None, :], k_tile, c, rows, 1, True, CHUNK, CHANNEL, PRECISION)
    dc = of_gate(k_tile.to(tl.float32) * (-k_length)[:, None] * (dl + u), CHANNEL)
    dl = u - dl
    if NORMALIZE and not CHANNEL:
        dl = normalized_gradient(dl, k_tile, k_length)
    tl.store(dk + tile, dl, mask=mask)

    # What the queries read: dL_q.
    dl = row_product(do, states, V, CHANNELS, CHUNK, BLOCK, PRECISION)
    z = row_product(do, errors, V, CHUNK, CHUNK, BLOCK, PRECISION)
    k_tile = load_tile(k, rows, strides.k, columns, inside, K)
    dl = (
        add_decayed(dl * from_start, z * (b * k_length)[None, :], k_tile, c, rows, 1, False, CHUNK, CHANNEL, PRECISION)
        * scale
    )
    q_tile = load_tile(q, rows, strides.q, columns, inside, K)
    dc += of_gate(q_tile.to(tl.float32) * q_length[:, None] * dl, CHANNEL)
    if NORMALIZE and not CHANNEL:
        dl = normalized_gradient(dl, q_tile, q_length)
    tl.store(dq + tile, dl, mask=mask)

    if gate is not None:
        state_products = tl.zeros([CHANNELS, 16], tl.float32)
        for value0 in range(0, V, 16):
            values = value0 + tl.arange(0, 16)
            s_tile = load_tile(states.ptr, columns, V, values, columns < K, V).to(tl.float32)
            state_products += s_tile * load_tile(dstates.ptr, columns, V, values, columns < K, V).to(tl.float32)
        if CHANNEL:
            dc = tl.cumsum(dc, 0, reverse=True) + (tl.sum(state_products, 1) * tl.exp2(c_last) + along_state)[None, :]
            tl.store(dgate + tile, dc, mask=mask)
        else:
            # As a matrix: Triton 3.7.1 cannot sum these vectors to a scalar for Blackwell.
            sums = tl.where(rows[None, :] >= rows[:, None], dc[None, :], 0.0) + along_state[None, :]
            dc = tl.exp2(c_last) * tl.sum(state_products) + tl.sum(sums, 1)
            tl.store(dgate + token_head + rows * n_heads, dc, mask=inside)


@triton.jit
def finish_tile(x, grads, out, row0, head, n_heads, FORM: tl.constexpr):
    """Sum over the value heads of a group and take the gradient through the normalisation; x is a `Matrix`."""
    K: tl.constexpr = FORM.K
    ROWS: tl.constexpr = FORM.ROWS
    BLOCK_K: tl.constexpr = FORM.BLOCK_K
    rows, inside = x.rows, x.inside
    columns = tl.arange(0, BLOCK_K)
    grad = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for member in range(0, FORM.GROUP):
        member_grads = grads + (row0 * n_heads + head * FORM.GROUP + member) * K
        grad += load_tile(member_grads, rows, n_heads * K, columns, inside, K)
    if FORM.NORMALIZE:
        length = normalization(x.ptr, rows, x.stride, inside, K, BLOCK_K, ROWS, True)
        grad = normalized_gradient(grad, load_tile(x.ptr, rows, x.stride, columns, inside, K), length)
    groups = n_heads // FORM.GROUP
    tile = (row0 * groups + head) * K + rows[:, None] * (groups * K) + columns[None, :]
    tl.store(out + tile, grad, mask=inside[:, None] & (columns < K)[None, :])


@triton.jit
def finish_kernel(tensors, n_all_tokens: tl.int64, n_heads, strides, FORM: tl.constexpr):
    """dq and dk [tokens, G, K] and dbeta [tokens, H] of a block of tokens and a query/key head."""
    ROWS: tl.constexpr = FORM.ROWS
    groups = n_heads // FORM.GROUP
    row0 = (tl.program_id(0) // groups).to(tl.int64) * ROWS
    head = (tl.program_id(0) % groups).to(tl.int64)
    rows = tl.arange(0, ROWS)
    inside = row0 + rows < n_all_tokens
    q = Matrix(tensors.q + row0 * strides.q + head * strides.q_head, strides.q, rows, inside)
    finish_tile(q, tensors.head_dq, tensors.dq, row0, head, n_heads, FORM)
    k = Matrix(tensors.k + row0 * strides.k + head * strides.k_head, strides.k, rows, inside)
    finish_tile(k, tensors.head_dk, tensors.dk, row0, head, n_heads, FORM)
    for member in range(0, FORM.GROUP):
        at = (row0 + rows) * n_heads + head * FORM.GROUP + member
        db = tl.zeros([ROWS], tl.float32)
        for block in range(0, FORM.N_BLOCKS):
            db += tl.load(tensors.block_dbeta + block * n_all_tokens * n_heads + at, mask=inside, other=0.0)
        tl.store(tensors.dbeta + at, db, mask=inside)

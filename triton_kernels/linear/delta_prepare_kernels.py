"""First launch of the delta rules: everything of a chunk that does not depend on the state, one program per chunk and
value head.

Legend as in notes/kernels/gated_delta_rule.md. Outputs: attention F_q and inverse (I + G)^-1 [H, tokens, CHUNK], and
that with which the scan reads and writes the state, so that it knows neither gate nor normalisation: read_q = scale e^c
q, read_k = e^c k, write = b e^{c_C - c} k, whole = e^{c_C}. With a decay per channel (CHANNEL) these are matrices
[tokens, H, K] and whole is [H, slots, K]; otherwise only the factors of the rows of q and k, [H, tokens], and whole is
[H, slots].
"""

# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
from collections import namedtuple

import triton
import triton.language as tl

from triton_kernels.linear.tiles import (
    channel_decays,
    chunk_decays,
    decay_within,
    level_decays,
    load_tile,
    normalization,
    place_chunk,
)


@triton.jit
def invert_unit_lower(a, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """(I + a)^-1 of a strictly lower triangular [CHUNK, CHUNK] fp32 matrix.

    2 x 2 diagonal blocks invert by a sign. Then neighbours merge, [[P, 0], [R, Q]]^-1 = [[P^-1, 0], [-Q^-1 R P^-1,
    Q^-1]], all blocks of a level in two products of whole matrices: block forward substitution, as stable as the
    row-by-row one and without its chain of CHUNK steps.
    """
    row = tl.arange(0, CHUNK)[:, None]
    column = tl.arange(0, CHUNK)[None, :]
    inverse = tl.where(row == column, 1.0, 0.0) - tl.where(row // 2 == column // 2, a, 0.0)
    # A loop that is left rolled: unrolled, its ten products spill on Ampere.
    size = 2
    while size < CHUNK:
        pairs = row // (2 * size) == column // (2 * size)
        lower_left = tl.where(pairs & (row // size != column // size), a, 0.0)
        inverse -= tl.dot(inverse, tl.dot(lower_left, inverse, input_precision=PRECISION), input_precision=PRECISION)
        size *= 2
    return inverse


@triton.jit
def channel_scores(
    f_q, f_k, q_tile, k_tile, c, rows, dtype: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr
):
    """f_q + q k^T and f_k + k k^T over a few channels, decayed, on and below the diagonal; below it for f_k."""
    f_q += tl.where(rows[:, None] == rows[None, :], tl.sum(q_tile * k_tile, 1)[:, None], 0.0)
    size = 1
    while size < CHUNK:
        decay, late, pairs = level_decays(c, rows, size)
        early = tl.trans(tl.where(late[:, None], 0.0, k_tile * decay).to(dtype))
        f_q += tl.where(
            pairs, tl.dot(tl.where(late[:, None], q_tile * decay, 0.0).to(dtype), early, input_precision=PRECISION), 0.0
        )
        f_k += tl.where(
            pairs, tl.dot(tl.where(late[:, None], k_tile * decay, 0.0).to(dtype), early, input_precision=PRECISION), 0.0
        )
        size *= 2
    return f_q, f_k


# What all kernels of a delta rule know beforehand: widths, what the key width is padded to, tokens of a chunk, value
# heads per query/key head, whether each key channel has a decay of its own, whether q and k are normalised, whether
# sequences are packed and what their number is padded to, and how fp32 products are computed.
DeltaForm = namedtuple("DeltaForm", "K V BLOCK_K CHUNK GROUP CHANNEL NORMALIZE PACKED BLOCK_S PRECISION")
Inputs = namedtuple("Inputs", "q k gate beta")
Prepared = namedtuple("Prepared", "attention inverse read_q read_k write whole")
ChunkSizes = namedtuple("ChunkSizes", "n_tokens n_all_tokens n_slots n_heads n_sequences")
# By token and by head.
QueryKeyStrides = namedtuple("QueryKeyStrides", "q q_head k k_head")


@triton.jit
def prepare_kernel(inputs, prepared, cu_seqlens, sizes, strides, scale, FORM: tl.constexpr, BLOCK: tl.constexpr):
    """The parts of `prepared` for one chunk of one value head."""
    K: tl.constexpr = FORM.K
    BLOCK_K: tl.constexpr = FORM.BLOCK_K
    CHUNK: tl.constexpr = FORM.CHUNK
    CHANNEL: tl.constexpr = FORM.CHANNEL
    PRECISION: tl.constexpr = FORM.PRECISION
    attention, inverse, read_q, read_k, write, whole = prepared
    n_tokens, n_all_tokens, n_slots, n_heads, n_sequences = sizes
    slot, head, _, token0, n_rows = place_chunk(
        cu_seqlens, tl.program_id(0), n_tokens, n_sequences, n_heads, CHUNK, FORM.BLOCK_S, FORM.PACKED
    )
    if n_rows <= 0:
        return
    rows = tl.arange(0, CHUNK)
    inside = rows < n_rows
    q = inputs.q + (token0 * strides.q + head // FORM.GROUP * strides.q_head)
    k = inputs.k + (token0 * strides.k + head // FORM.GROUP * strides.k_head)
    row_k = (token0 * n_heads + head) * K
    b = tl.load(inputs.beta + (token0 + rows) * n_heads + head, mask=inside, other=0.0).to(tl.float32)
    q_factor = normalization(q, rows, strides.q, inside, K, BLOCK_K, CHUNK, FORM.NORMALIZE) * scale
    k_factor = normalization(k, rows, strides.k, inside, K, BLOCK_K, CHUNK, FORM.NORMALIZE)

    # Channels never meet before the sums over them: a few at a time where all would not stay within the registers.
    COLUMNS: tl.constexpr = BLOCK if BLOCK < BLOCK_K else BLOCK_K
    f_q = tl.zeros([CHUNK, CHUNK], tl.float32)
    f_k = tl.zeros([CHUNK, CHUNK], tl.float32)
    for column0 in range(0, K, COLUMNS):
        columns = column0 + tl.arange(0, COLUMNS)
        q_tile = load_tile(q, rows, strides.q, columns, inside, K)
        k_tile = load_tile(k, rows, strides.k, columns, inside, K)
        if CHANNEL:
            q_tile, k_tile = q_tile.to(tl.float32), k_tile.to(tl.float32)
            c, c_last = channel_decays(inputs.gate + row_k, rows, n_heads * K, columns, inside, K)
            tile = row_k + rows[:, None] * (n_heads * K) + columns[None, :]
            mask = inside[:, None] & (columns < K)[None, :]
            from_start = tl.exp2(c)
            tl.store(read_q + tile, q_tile * from_start * q_factor[:, None], mask=mask)
            tl.store(read_k + tile, k_tile * from_start * k_factor[:, None], mask=mask)
            tl.store(write + tile, k_tile * tl.exp2(c_last[None, :] - c) * (k_factor * b)[:, None], mask=mask)
            tl.store(whole + (head * n_slots + slot) * K + columns, tl.exp2(c_last), mask=columns < K)
            f_q, f_k = channel_scores(f_q, f_k, q_tile, k_tile, c, rows, q.dtype.element_ty, CHUNK, PRECISION)
        else:
            k_transposed = tl.trans(k_tile)
            f_q = tl.dot(q_tile, k_transposed, f_q, input_precision=PRECISION)
            f_k = tl.dot(k_tile, k_transposed, f_k, input_precision=PRECISION)
    weight = (b * k_factor)[None, :]
    at = head * n_all_tokens + token0 + rows
    if not CHANNEL:
        gate = None if inputs.gate is None else inputs.gate + token0 * n_heads + head
        c, c_last = chunk_decays(gate, rows, n_heads, inside, CHUNK)
        weight *= decay_within(c, rows, 1)
        f_k = tl.where(rows[:, None] > rows[None, :], f_k, 0.0)
        from_start = tl.exp2(c)
        tl.store(read_q + at, from_start * q_factor, mask=inside)
        tl.store(read_k + at, from_start * k_factor, mask=inside)
        tl.store(write + at, tl.exp2(c_last - c) * b * k_factor, mask=inside)
        tl.store(whole + head * n_slots + slot, tl.exp2(c_last))
    tile = at[:, None] * CHUNK + rows[None, :]
    tl.store(attention + tile, f_q * weight * q_factor[:, None], mask=inside[:, None])
    tl.store(
        inverse + tile, invert_unit_lower(f_k * weight * k_factor[:, None], CHUNK, PRECISION), mask=inside[:, None]
    )

"""What the kernels of the delta rules share: where a chunk lies, its tiles, and the inverse of its correction matrix.

Per-chunk tensors (states, decays) have one slot per chunk. Unpacked, the chunks of sequence b follow those of b - 1; packed, those of a sequence that
starts at token f start at slot f // CHUNK + its number, which needs no look at the other lengths. Offsets to tokens and slots are int64.
"""

# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false
# fmt: off
import triton
import triton.language as tl


@triton.jit
def place_sequence(cu_seqlens, sequence, n_tokens, n_chunks, CHUNK: tl.constexpr, PACKED: tl.constexpr):
    """(first token, rows, first slot) of a sequence."""
    if PACKED:
        first = tl.load(cu_seqlens + sequence)
        return first, tl.load(cu_seqlens + sequence + 1) - first, first // CHUNK + sequence
    return sequence * n_tokens, n_tokens, sequence * n_chunks


@triton.jit
def place_chunk(cu_seqlens, slot, n_tokens, n_chunks, n_sequences, CHUNK: tl.constexpr, BLOCK_S: tl.constexpr, PACKED: tl.constexpr):
    """(first token of the chunk, its rows) of a slot; rows <= 0 where no chunk lies."""
    if PACKED:
        sequences = tl.arange(0, BLOCK_S)
        starts = tl.load(cu_seqlens + sequences, mask=sequences < n_sequences, other=0)
        began = (sequences < n_sequences) & (starts // CHUNK + sequences <= slot)
        sequence = tl.sum(began.to(tl.int64), 0) - 1
    else:
        sequence = slot // n_chunks
    first, n_rows, slot0 = place_sequence(cu_seqlens, sequence, n_tokens, n_chunks, CHUNK, PACKED)
    row0 = (slot - slot0) * CHUNK
    return first + row0, n_rows - row0


@triton.jit
def load_tile(base, rows, stride, columns, inside, WIDTH: tl.constexpr):
    """[rows, columns] of a matrix of the given width, zeros outside."""
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=inside[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def inverse_length(x):
    """1 / length of each row, finite for rows of zeros."""
    return tl.rsqrt(tl.sum(x * x, 1) + 1e-6)


@triton.jit
def invert_unit_lower(a, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """(I + a)^-1 of a strictly lower triangular [CHUNK, CHUNK] fp32 matrix.

    2 x 2 diagonal blocks invert by a sign. Then neighbours merge, [[P, 0], [R, Q]]^-1 = [[P^-1, 0], [-Q^-1 R P^-1, Q^-1]], all blocks of a level in
    two products of whole matrices: block forward substitution, as stable as the row-by-row one and without its chain of CHUNK steps.
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

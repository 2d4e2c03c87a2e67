"""What the kernels of linear attention share: where sequences and chunks lie, tiles, and what a gate means inside a
chunk.

Per-chunk tensors (states, decays) have one slot per chunk. Unpacked, the chunks of sequence b follow those of b - 1;
packed, those of a sequence that starts at token f start at slot f // CHUNK + its number, which needs no look at the
other lengths. Offsets to tokens and slots are int64.

Log-decays are turned into base 2 as they are loaded (exp2 is one instruction) and summed inside the chunk only; every
decay is the exponential of a difference that is <= 0, masked before the exponential, so nothing overflows and no 0 *
inf arises.

A decay per key channel (CHANNEL) stands inside the dot product, and e^{c_i} e^{-c_j} would overflow. So the triangle is
cut by halving: at each level the later half of a pair of sub-chunks meets the earlier half, both measured from the
anchor, the later half's first row. Both exponents are then at most 0, whatever the gate, and no row sees the decays of
its future. A level is a product of whole matrices with the other pairs masked out.
"""

# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportArgumentType=false
from collections import namedtuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# A log2-decay below this (-100 nats) is a zero, and is bounded here: a reset by -1e4 would leave the sums behind it, of
# which ordinary decays are differences, without the digits that tell them apart.
STRONGEST = tl.constexpr(-100 * 1.4426950408889634)

# What a launch over chunks (or larger slots) is told of their number.
SlotSizes = namedtuple("SlotSizes", "n_slots n_heads n_sequences")
# Rows of a matrix: its pointer, the stride from row to row, which rows, and which of them exist.
Matrix = namedtuple("Matrix", "ptr stride rows inside")


@triton.jit
def place_sequence(cu_seqlens, sequence, n_tokens, PACKED: tl.constexpr):
    """(first token, rows) of a sequence, both int64 as its number is."""
    if PACKED:
        first = tl.load(cu_seqlens + sequence)
        return first, tl.load(cu_seqlens + sequence + 1) - first
    else:
        return sequence * n_tokens, sequence * 0 + n_tokens


@triton.jit
def first_slot(first, sequence, n_rows, CHUNK: tl.constexpr, PACKED: tl.constexpr):
    return first // CHUNK + sequence if PACKED else sequence * tl.cdiv(n_rows, CHUNK)


@triton.jit
def place_chunk(
    cu_seqlens,
    program,
    n_tokens,
    n_sequences,
    n_heads,
    CHUNK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Slots, each with all heads: (slot, head, sequence, first token of the chunk, rows from there to the sequence's
    end, <= 0 where none lies)."""
    slot, head = (program // n_heads).to(tl.int64), (program % n_heads).to(tl.int64)
    if PACKED:
        # The last sequence whose slots start no later.
        sequences = tl.arange(0, BLOCK_S)
        starts = tl.load(cu_seqlens + sequences, mask=sequences < n_sequences, other=0) // CHUNK + sequences
        sequence = tl.sum(((sequences < n_sequences) & (starts <= slot)).to(tl.int64), 0) - 1
    else:
        sequence = slot // tl.cdiv(n_tokens, CHUNK)
    first, n_rows = place_sequence(cu_seqlens, sequence, n_tokens, PACKED)
    row0 = (slot - first_slot(first, sequence, n_rows, CHUNK, PACKED)) * CHUNK
    return slot, head, sequence, first + row0, n_rows - row0


@triton.jit
def tile_mask(inside, columns, width, EXACT: tl.constexpr = False):
    """Rows of the sequence, columns of the matrix; EXACT widths, which the blocks divide, need no test."""
    mask = inside[:, None]
    if not EXACT:
        mask = mask & (columns < width)[None, :]
    return mask


@triton.jit
def load_tile(base, rows, stride, columns, inside, width, EXACT: tl.constexpr = False):
    """[rows, columns] of a matrix of the given width, zeros outside."""
    return tl.load(
        base + (rows[:, None] * stride + columns[None, :]), mask=tile_mask(inside, columns, width, EXACT), other=0.0
    )


@triton.jit
def normalization(
    x, rows, stride, inside, K: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, NORMALIZE: tl.constexpr
):
    """What the rows of q or k are multiplied by [CHUNK]: 1 / their length, finite for rows of zeros, or ones."""
    if NORMALIZE:
        tile = load_tile(x, rows, stride, tl.arange(0, BLOCK_K), inside, K).to(tl.float32)
        return tl.rsqrt(tl.sum(tile * tile, 1) + 1e-6)
    else:
        return tl.zeros([CHUNK], tl.float32) + 1.0


@triton.jit
def bounded(g):
    """Natural log-decays in base 2, none stronger than a zero; NaN stays NaN."""
    g = g.to(tl.float32) * LOG2_E
    return tl.where(g < STRONGEST, STRONGEST, g)


@triton.jit
def chunk_decays(gate, rows, stride, inside, CHUNK: tl.constexpr):
    """Inclusive cumulative log2-decay c [CHUNK] of the chunk's rows, and its total; zeros without a gate. `gate` points
    at the chunk's first row of one head."""
    if gate is None:
        return tl.zeros([CHUNK], tl.float32), tl.zeros([], tl.float32)
    else:
        g = bounded(tl.load(gate + rows * stride, mask=inside, other=0.0))
        return tl.cumsum(g, 0), tl.sum(g, 0)


@triton.jit
def channel_decays(gate, rows, stride, k_columns, inside, K: tl.constexpr):
    """The same for a decay per key channel: c [CHUNK, K] and its total [K]."""
    g = bounded(load_tile(gate, rows, stride, k_columns, inside, K))
    return tl.cumsum(g, 0), tl.sum(g, 0)


@triton.jit
def decay_within(c, position, sign, STRICT: tl.constexpr = False):
    """[CHUNK, CHUNK] decay from row j to row i: 2^(c_i - c_j) where j is not after i (sign 1), 2^(c_j - c_i) where it
    is not before (-1), else 0. STRICT: 0 where j is i, too."""
    c *= sign
    position *= sign
    seen = position[:, None] > position[None, :] if STRICT else position[:, None] >= position[None, :]
    return tl.exp2(tl.where(seen, c[:, None] - c[None, :], float("-inf")))


@triton.jit
def level_decays(c, rows, size):
    """For sub-chunks of `size` rows: the decay between each row and its pair's anchor [CHUNK, K], whether a row is in
    the later half [CHUNK], and whether a row and a column lie in the same pair [CHUNK, CHUNK]."""
    anchor_row = (rows & -(2 * size)) + size
    anchor = tl.gather(c, tl.broadcast_to(anchor_row[:, None], c.shape), 0)
    late = (rows & size) != 0
    return tl.exp2(tl.where(late[:, None], c - anchor, anchor - c)), late, (rows[:, None] ^ rows[None, :]) < 2 * size

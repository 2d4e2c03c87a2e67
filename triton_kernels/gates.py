"""What a gate means inside a chunk: small helpers the chunk kernels are parameterised by.

Log-decays are turned into base 2 as they are loaded (exp2 is one instruction) and summed inside the chunk only; every decay is the exponential of a
difference that is <= 0, masked before the exponential, so nothing overflows and no 0 * inf arises.

A decay per key channel stands inside the dot product, and e^{c_i} e^{-c_j} would overflow. So the triangle is cut by halving: at each level the later
half of a pair of sub-chunks meets the earlier half, both measured from the anchor, the later half's first row. Both exponents are then at most 0,
whatever the gate, and no row sees the decays of its future. A level is a product of whole matrices with the other pairs masked out.
"""

# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false
# fmt: off
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def scalar_decays(gate, rows, stride, inside, CHUNK: tl.constexpr, HAS_GATE: tl.constexpr):
    """Inclusive cumulative log2-decay c [CHUNK] of the chunk's rows, and its total. `gate` points at the chunk's first row of one head."""
    if HAS_GATE:
        g = tl.load(gate + rows * stride, mask=inside, other=0.0).to(tl.float32) * LOG2_E
        return tl.cumsum(g, 0), tl.sum(g, 0)
    return tl.zeros([CHUNK], tl.float32), tl.zeros([], tl.float32)


@triton.jit
def decay_within(c, row0, rows, sign):
    """[CHUNK, CHUNK] decay from row j to row i: 2^(c_i - c_j) where j is not after i (sign 1), 2^(c_j - c_i) where it is not before (-1), else 0."""
    # Comparing positions that move with the chunk, rather than rows, keeps the compiler from holding CHUNK^2 loop-invariant flags in registers.
    position = (row0.to(tl.int32) + rows) * sign
    signed_c = c * sign
    return tl.exp2(tl.where(position[:, None] >= position[None, :], signed_c[:, None] - signed_c[None, :], float("-inf")))


@triton.jit
def decay_to(c, rows, STRICT: tl.constexpr):
    """[CHUNK, CHUNK] decay 2^(c_i - c_j) from key j to row i, 0 where j is after i (or i itself, if STRICT)."""
    seen = rows[:, None] > rows[None, :] if STRICT else rows[:, None] >= rows[None, :]
    return tl.exp2(tl.where(seen, c[:, None] - c[None, :], float("-inf")))


@triton.jit
def decay_from(c, rows, STRICT: tl.constexpr):
    """Its transpose: from key i to row j."""
    seen = rows[:, None] < rows[None, :] if STRICT else rows[:, None] <= rows[None, :]
    return tl.exp2(tl.where(seen, c[None, :] - c[:, None], float("-inf")))


@triton.jit
def channel_decays(gate, rows, stride, k_columns, inside, K: tl.constexpr):
    """Inclusive cumulative log2-decay c [CHUNK, K] of the chunk's rows, and its total [K]."""
    mask = inside[:, None] & (k_columns < K)[None, :]
    g = tl.load(gate + rows[:, None] * stride + k_columns[None, :], mask=mask, other=0.0).to(tl.float32) * LOG2_E
    return tl.cumsum(g, 0), tl.sum(g, 0)


@triton.jit
def level_decays(c, rows, level):
    """For sub-chunks of 2^level rows: the decay between each row and its pair's anchor [CHUNK, K], and whether a row is in the later half [CHUNK]."""
    anchor_row = ((rows >> (level + 1)) << (level + 1)) + (1 << level)
    anchor = tl.gather(c, tl.broadcast_to(anchor_row[:, None], c.shape), 0)
    late = ((rows >> level) & 1) == 1
    return tl.exp2(tl.where(late[:, None], c - anchor, anchor - c)), late


@triton.jit
def same_pair(rows, level):
    """[CHUNK, CHUNK]: row and column lie in the same pair of sub-chunks."""
    return (rows >> (level + 1))[:, None] == (rows >> (level + 1))[None, :]

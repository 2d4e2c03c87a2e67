"""Decays per key channel inside a chunk, for products on tensor cores.

e^{c_i - c_j} stands inside the dot product, and e^{c_i} e^{-c_j} would overflow. So the triangle is cut by halving: at each level the later half of
a pair of sub-chunks meets the earlier half, both measured from the anchor, the later half's first row. Both exponents are then at most 0, whatever
the gate, and no row sees the decays of its future. A level is a product of whole matrices with the other pairs masked out.
"""

# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false
# fmt: off
import triton
import triton.language as tl

from triton_kernels.delta_tiles import LOG2_E, load_tile


@triton.jit
def channel_decays(gate, rows, stride, k_columns, inside, K: tl.constexpr):
    """Cumulative log2-decay c [CHUNK, K] from the chunk's first row on, and its total [K]."""
    g = load_tile(gate, rows, stride, k_columns, inside, K).to(tl.float32) * LOG2_E
    return tl.cumsum(g, 0), tl.sum(g, 0)


@triton.jit
def level_decays(c, rows, size, PRECISION: tl.constexpr):
    """For sub-chunks of `size` rows: the decay between each row and its pair's anchor [CHUNK, K], and whether the row is in the later half [CHUNK].

    The anchor's row is picked by a product with a matrix of zeros and ones. That may round it, but both halves of a pair see the same rounding, and
    it cancels."""
    anchor_row = rows // (2 * size) * (2 * size) + size
    anchor = tl.dot(tl.where(rows[None, :] == anchor_row[:, None], 1.0, 0.0), c, input_precision=PRECISION)
    late = (rows // size) % 2 == 1
    return tl.exp2(tl.where(late[:, None], c - anchor, anchor - c)), late


@triton.jit
def same_pair(rows, size):
    """[CHUNK, CHUNK]: row and column lie in the same pair of sub-chunks."""
    return rows[:, None] // (2 * size) == rows[None, :] // (2 * size)

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

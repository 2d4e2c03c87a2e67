"""What a scalar gate means inside a chunk: small helpers the chunk kernels are parameterised by.

Log-decays are turned into base 2 as they are loaded (exp2 is one instruction) and summed inside the chunk only; every decay is the exponential of a
difference that is <= 0, masked before the exponential, so nothing overflows and no 0 * inf arises.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def chunk_log_decay(gate, row0, rows, gate_stride, inside, CHUNK: tl.constexpr, HAS_GATE: tl.constexpr):
    """Inclusive cumulative log2-decay [CHUNK] of the rows from `row0`, and its total. `gate` points at the sequence's first row of one head."""
    if HAS_GATE:
        g = tl.load((gate + row0 * gate_stride) + rows * gate_stride, mask=inside, other=0.0).to(tl.float32) * LOG2_E
        return tl.cumsum(g, 0), tl.sum(g, 0)
    return tl.zeros([CHUNK], tl.float32), tl.zeros([], tl.float32)


@triton.jit
def decay_within(c, row0, rows, sign):
    """[CHUNK, CHUNK] decay from row j to row i: 2^(c_i - c_j) where j is not after i (sign 1), 2^(c_j - c_i) where it is not before (-1), else 0."""
    # Comparing positions that move with the chunk, rather than rows, keeps the compiler from holding CHUNK^2 loop-invariant flags in registers.
    position = (row0.to(tl.int32) + rows) * sign
    signed_c = c * sign
    return tl.exp2(tl.where(position[:, None] >= position[None, :], signed_c[:, None] - signed_c[None, :], float("-inf")))

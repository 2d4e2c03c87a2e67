"""First launch of the gated delta rule: everything of a chunk that does not depend on the state, one program per chunk and value head.

Letters as in `chunk_rule.py`. Outputs, indexed [H, tokens]: attention F_q and inverse (I + G)^-1 as rows of CHUNK, and the row factors with which
the scan reads and writes the state, so that the scan knows neither gate nor normalisation:
read_q = scale e^c / |q|, read_k = e^c / |k|, write = b e^{c_C - c} / |k|; and whole = e^{c_C} per slot.
"""

# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false
# fmt: off
import triton
import triton.language as tl

from triton_kernels.delta_tiles import inverse_length, invert_unit_lower, load_tile, place_chunk
from triton_kernels.gates import decay_to, scalar_decays


@triton.jit
def prepare_kernel(
    q, k, gate, beta, attention, inverse, read_q, read_k, write, whole, cu_seqlens,
    n_tokens: tl.int64, n_all_tokens: tl.int64, n_chunks, n_slots, n_sequences, n_heads, q_stride, q_head, k_stride, k_head, scale,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, HAS_GATE: tl.constexpr,
    NORMALIZE: tl.constexpr, PACKED: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):
    slot = (tl.program_id(0) // n_heads).to(tl.int64)
    head = (tl.program_id(0) % n_heads).to(tl.int64)
    token0, n_rows = place_chunk(cu_seqlens, slot, n_tokens, n_chunks, n_sequences, CHUNK, BLOCK_S, PACKED)
    if n_rows <= 0:
        return
    rows = tl.arange(0, CHUNK)
    inside = rows < n_rows
    q += token0 * q_stride + head // GROUP * q_head
    k += token0 * k_stride + head // GROUP * k_head
    b = tl.load(beta + (token0 + rows) * n_heads + head, mask=inside, other=0.0).to(tl.float32)
    c, c_last = scalar_decays(gate + token0 * n_heads + head if HAS_GATE else gate, rows, n_heads, inside, CHUNK, HAS_GATE)
    q_factor = tl.zeros([CHUNK], tl.float32) + scale
    k_factor = tl.zeros([CHUNK], tl.float32) + 1.0
    if NORMALIZE:
        q_factor *= inverse_length(load_tile(q, rows, q_stride, tl.arange(0, BLOCK_K), inside, K).to(tl.float32))
        k_factor *= inverse_length(load_tile(k, rows, k_stride, tl.arange(0, BLOCK_K), inside, K).to(tl.float32))

    # A few channels at a time in fp32, whose products hold whole rows of their operands in registers; all at once otherwise.
    COLUMNS: tl.constexpr = BLOCK if BLOCK < BLOCK_K else BLOCK_K
    f_q = tl.zeros([CHUNK, CHUNK], tl.float32)
    f_k = tl.zeros([CHUNK, CHUNK], tl.float32)
    for column0 in range(0, BLOCK_K, COLUMNS):
        columns = column0 + tl.arange(0, COLUMNS)
        k_tile = load_tile(k, rows, k_stride, columns, inside, K)
        k_transposed = tl.trans(k_tile)
        f_q = tl.dot(load_tile(q, rows, q_stride, columns, inside, K), k_transposed, f_q, input_precision=PRECISION)
        f_k = tl.dot(k_tile, k_transposed, f_k, input_precision=PRECISION)
    weight = decay_to(c, rows, False) * (b * k_factor)[None, :]
    f_q = f_q * weight * q_factor[:, None]
    f_k = f_k * weight * k_factor[:, None]
    g = tl.where(rows[:, None] > rows[None, :], f_k, 0.0)
    t = invert_unit_lower(g, CHUNK, PRECISION)

    at = head * n_all_tokens + token0
    tile = at * CHUNK + rows[:, None] * CHUNK + rows[None, :]
    tl.store(attention + tile, f_q, mask=inside[:, None])
    tl.store(inverse + tile, t, mask=inside[:, None])
    from_start = tl.exp2(c)
    tl.store(read_q + at + rows, from_start * q_factor, mask=inside)
    tl.store(read_k + at + rows, from_start * k_factor, mask=inside)
    tl.store(write + at + rows, tl.exp2(c_last - c) * b * k_factor, mask=inside)
    tl.store(whole + head * n_slots + slot, tl.exp2(c_last))

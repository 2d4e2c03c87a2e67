"""Forward kernels of grouped_mlp: gate and up with the gather fused in, a product of assigned rows, and the sum over a token's rows.

Which rows a program owns is found on the device: expert e has the program slots from expert_offsets[e] // BLOCK_M + e on, which are at least as many
as it has blocks of rows, so the grid needs nothing but N, a bound on the number of rows that the host knows.

Legend: M rows, N columns of a tile, K depth of a product, D model width, E experts, F expert width, S rows of a token.
"""

# A jitted helper that returns a tuple looks like a function that never returns to a type checker.
# pyright: reportGeneralTypeIssues=false
import triton
import triton.language as tl

from triton_kernels.flash_attention_blocks import product, wide


@triton.jit
def load_tile(pointers, mask, CHECK: tl.constexpr):
    """A tile with zeros outside the mask; a mask that can hide nothing is left out of the program altogether."""
    if CHECK:
        return tl.load(pointers, mask=mask, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def expert_tile(expert_offsets_ptr, slot, E, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """(expert, its first row in this slot (int64), how many rows of the tile are the expert's: none if 0 or less)."""
    e_E = tl.arange(0, BLOCK_E)
    slot_E = tl.load(expert_offsets_ptr + e_E, mask=e_E < E, other=0) // BLOCK_M + e_E
    expert = tl.sum(((slot_E <= slot) & (e_E < E)).to(tl.int32)) - 1
    begin, end = tl.load(expert_offsets_ptr + expert), tl.load(expert_offsets_ptr + expert + 1)
    first = begin + (slot - begin // BLOCK_M - expert) * BLOCK_M
    return expert, first, tl.minimum(tl.maximum(end - first, 0), BLOCK_M).to(tl.int32)


@triton.jit
def gate_up_kernel(
    x_ptr, w_ptr, token_ptr, expert_offsets_ptr, h_ptr, a_ptr, E,
    D: tl.constexpr, F: tl.constexpr, KEEP_H: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h = x[token] @ w, kept for backward only; a = silu(gate half of h) * up half. Tiles of one expert run side by side, to share it in L2."""
    TILES: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    expert, first, n_rows = expert_tile(expert_offsets_ptr, tl.program_id(0) // TILES, E, BLOCK_E, BLOCK_M)
    if n_rows <= 0:
        return
    m_M, k_K = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    n_N = tl.program_id(0) % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, columns = (m_M < n_rows)[:, None], (n_N < F)[None, :]
    # Rows past the expert's last read token 0, whose result is not stored.
    token_M = tl.load(token_ptr + first + m_M, mask=m_M < n_rows, other=0)
    x_tile = x_ptr + token_M[:, None] * D + k_K[None, :]
    w_tile = w_ptr + wide(expert) * (2 * D * F) + k_K[:, None] * (2 * F) + n_N[None, :]
    gate_MN, up_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    RAGGED: tl.constexpr = D % BLOCK_K != 0 or F % BLOCK_N != 0
    for k in range(0, D, BLOCK_K):
        w_mask = (k + k_K < D)[:, None] & columns
        x_MK = load_tile(x_tile + k, (k + k_K < D)[None, :], D % BLOCK_K != 0)
        gate_KN = load_tile(w_tile + k * 2 * F, w_mask, RAGGED)
        up_KN = load_tile(w_tile + k * 2 * F + F, w_mask, RAGGED)
        gate_MN = product(x_MK, gate_KN, gate_MN)
        up_MN = product(x_MK, up_KN, up_MN)
    if KEEP_H:
        h_tile = h_ptr + first * (2 * F) + m_M[:, None] * (2 * F) + n_N[None, :]
        tl.store(h_tile, gate_MN.to(h_ptr.dtype.element_ty), mask=rows & columns)
        tl.store(h_tile + F, up_MN.to(h_ptr.dtype.element_ty), mask=rows & columns)
    a_MN = gate_MN * tl.sigmoid(gate_MN) * up_MN
    tl.store(a_ptr + first * F + m_M[:, None] * F + n_N[None, :], a_MN.to(a_ptr.dtype.element_ty), mask=rows & columns)


@triton.jit
def row_product_kernel(
    rows_ptr, w_ptr, expert_offsets_ptr, out_ptr, E,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [N, WIDTH] = rows [N, DEPTH] @ w[expert], w being [E, DEPTH, WIDTH], or [E, WIDTH, DEPTH] if TRANSPOSED."""
    TILES: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    expert, first, n_rows = expert_tile(expert_offsets_ptr, tl.program_id(0) // TILES, E, BLOCK_E, BLOCK_M)
    if n_rows <= 0:
        return
    m_M, k_K = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    n_N = tl.program_id(0) % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, columns = (m_M < n_rows)[:, None], (n_N < WIDTH)[None, :]
    # The expert's last row stands in for those past it, which may not exist.
    row_tile = rows_ptr + first * DEPTH + tl.minimum(m_M, n_rows - 1)[:, None] * DEPTH + k_K[None, :]
    K_STRIDE: tl.constexpr = 1 if TRANSPOSED else WIDTH
    w_tile = w_ptr + wide(expert) * (DEPTH * WIDTH) + k_K[:, None] * K_STRIDE + n_N[None, :] * (DEPTH if TRANSPOSED else 1)
    out_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    RAGGED: tl.constexpr = DEPTH % BLOCK_K != 0 or WIDTH % BLOCK_N != 0
    for k in range(0, DEPTH, BLOCK_K):
        row_MK = load_tile(row_tile + k, (k + k_K < DEPTH)[None, :], DEPTH % BLOCK_K != 0)
        w_KN = load_tile(w_tile + k * K_STRIDE, (k + k_K < DEPTH)[:, None] & columns, RAGGED)
        out_MN = product(row_MK, w_KN, out_MN)
    out_tile = out_ptr + first * WIDTH + m_M[:, None] * WIDTH + n_N[None, :]
    tl.store(out_tile, out_MN.to(out_ptr.dtype.element_ty), mask=rows & columns)


@triton.jit
def combine_kernel(
    rows_ptr, weight_ptr, token_offsets_ptr, row_of_slot_ptr, y_ptr,
    D: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y [T, D]: the sum of each token's rows, in the order of its slots, times the rows' weights if WEIGHTED."""
    token = wide(tl.program_id(0))
    d_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin, end = tl.load(token_offsets_ptr + token), tl.load(token_offsets_ptr + token + 1)
    y_D = tl.zeros([BLOCK_D], tl.float32)
    for slot in range(begin, end, BLOCK_S):
        slot_S = slot + tl.arange(0, BLOCK_S)
        row_S = tl.load(row_of_slot_ptr + slot_S, mask=slot_S < end, other=0)
        row_SD = tl.load(rows_ptr + row_S[:, None] * D + d_D[None, :], mask=(slot_S < end)[:, None] & (d_D < D)[None, :], other=0.0).to(tl.float32)
        if WEIGHTED:
            row_SD *= tl.load(weight_ptr + row_S, mask=slot_S < end, other=0.0).to(tl.float32)[:, None]
        y_D += tl.sum(row_SD, 0)
    tl.store(y_ptr + token * D + d_D, y_D.to(y_ptr.dtype.element_ty), mask=d_D < D)

"""Kernels of grouped_mlp: three launches forward, five backward.

Forward: H = [G U] = x[token] W_gate_up with A = silu(G) * U in its epilogue, A W_down, and the weighted sum of each
token's rows. Backward from x and H alone, with dA' = W_down dy (not yet weighted) and w the row's weight:
    dw = <dA', A>,   dU = w dA' * silu(G),   dG = w dA' * U * silu'(G),   dW_down = (w A)^T dy,   dW_gate_up = x^T [dG
    dU]
so the experts' outputs are needed nowhere, and A is made again from H. x and dy are gathered inside the products.

Nothing here waits for the device. Which rows a program owns is found there: expert e has the program slots from
expert_offsets[e] // BLOCK_M + e on, which are at least as many as it has blocks of rows, so the grid needs nothing but
N, a bound on the number of rows that the shapes give.

Legend: T tokens, N assigned rows, M rows and N columns of a tile, K depth of a product, D model width, E experts, F
expert width, S rows of a token.
"""

# Jitted helpers that return tuples are beyond a type checker.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportReturnType=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false
from collections import namedtuple

import triton
import triton.language as tl

from triton_kernels.common.tiles import product, wide


@triton.jit
def store_tile(base, x_MN, n_rows, n_N, WIDTH: tl.constexpr, STRIDE: tl.constexpr):
    """The first n_rows rows, and of the columns n those below WIDTH."""
    m_M = tl.arange(0, x_MN.shape[0])
    tl.store(
        base + m_M[:, None] * STRIDE + n_N[None, :],
        x_MN.to(base.dtype.element_ty),
        mask=(m_M < n_rows)[:, None] & (n_N < WIDTH)[None, :],
    )


@triton.jit
def expert_tile(
    expert_offsets_ptr, E, WIDTH: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """(expert, its first row here (int64), how many rows of the tile are the expert's, the tile's place among those of
    WIDTH columns). Tiles of one expert run side by side, to share it in L2."""
    TILES: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    slot = tl.program_id(0) // TILES
    e_E = tl.arange(0, BLOCK_E)
    slot_E = tl.load(expert_offsets_ptr + e_E, mask=e_E < E, other=0) // BLOCK_M + e_E
    expert = tl.sum(((slot_E <= slot) & (e_E < E)).to(tl.int32)) - 1
    begin, end = tl.load(expert_offsets_ptr + expert), tl.load(expert_offsets_ptr + expert + 1)
    first = begin + (slot - begin // BLOCK_M - expert) * BLOCK_M
    return expert, first, tl.minimum(tl.maximum(end - first, 0), BLOCK_M).to(tl.int32), tl.program_id(0) % TILES


@triton.jit
def expert_product(
    left_ptr,
    row_M,
    w_ptr,
    expert,
    n_N,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIR: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """left[row_M] @ w[expert] at the columns n in fp32, and if PAIR at the columns WIDTH + n too. w is [E, DEPTH,
    WIDTH], or [E, DEPTH, 2 WIDTH] if PAIR, or [E, WIDTH, DEPTH] if TRANSPOSED."""
    W_WIDTH: tl.constexpr = 2 * WIDTH if PAIR else WIDTH
    K_STRIDE: tl.constexpr = 1 if TRANSPOSED else W_WIDTH
    # A mask that can hide nothing is left out of the program altogether.
    CUT: tl.constexpr = DEPTH % BLOCK_K != 0
    RAGGED: tl.constexpr = CUT or WIDTH % BLOCK_N != 0
    k_K = tl.arange(0, BLOCK_K)
    left_tile = left_ptr + row_M[:, None] * DEPTH + k_K[None, :]
    w_tile = (
        w_ptr + wide(expert) * (DEPTH * W_WIDTH) + k_K[:, None] * K_STRIDE + n_N[None, :] * (DEPTH if TRANSPOSED else 1)
    )
    out_MN, second_MN = tl.zeros([row_M.shape[0], BLOCK_N], tl.float32), tl.zeros([row_M.shape[0], BLOCK_N], tl.float32)
    for k in range(0, DEPTH, BLOCK_K):
        left_MK = tl.load(left_tile + k, mask=(k + k_K < DEPTH)[None, :] if CUT else None, other=0.0 if CUT else None)
        w_mask = (k + k_K < DEPTH)[:, None] & (n_N < WIDTH)[None, :] if RAGGED else None
        out_MN = product(left_MK, tl.load(w_tile + k * K_STRIDE, mask=w_mask, other=0.0 if RAGGED else None), out_MN)
        if PAIR:
            second_MN = product(
                left_MK, tl.load(w_tile + k * K_STRIDE + WIDTH, mask=w_mask, other=0.0 if RAGGED else None), second_MN
            )
    return out_MN, second_MN


# Of each kernel: its tensors, and its constants besides the sizes of its tiles. BLOCK_E is the number of experts,
# padded.
GateUpTensors = namedtuple("GateUpTensors", "x w token expert_offsets h a")
GateUpForm = namedtuple("GateUpForm", "D F KEEP_H BLOCK_E")
RowTensors = namedtuple("RowTensors", "rows w expert_offsets out")
RowForm = namedtuple("RowForm", "DEPTH WIDTH TRANSPOSED BLOCK_E")
ActivationTensors = namedtuple("ActivationTensors", "dy w h token weight expert_offsets dh aw partial")
ActivationForm = namedtuple("ActivationForm", "D F BLOCK_E")
WeightTensors = namedtuple("WeightTensors", "left right token expert_offsets dw")
WeightForm = namedtuple("WeightForm", "HEIGHT WIDTH GATHER_LEFT")


@triton.jit
def gate_up_kernel(tensors, E, FORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """h = x[token] @ w, kept for backward only; a = silu(gate half of h) * up half."""
    D: tl.constexpr = FORM.D
    F: tl.constexpr = FORM.F
    x_ptr, w_ptr, token_ptr, expert_offsets_ptr, h_ptr, a_ptr = tensors
    expert, first, n_rows, tile = expert_tile(expert_offsets_ptr, E, F, FORM.BLOCK_E, BLOCK_M, BLOCK_N)
    if n_rows <= 0:
        return
    m_M, n_N = tl.arange(0, BLOCK_M), tile * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the expert's last read token 0, whose result is not stored.
    token_M = tl.load(token_ptr + first + m_M, mask=m_M < n_rows, other=0)
    gate_MN, up_MN = expert_product(x_ptr, token_M, w_ptr, expert, n_N, D, F, True, False, BLOCK_N, BLOCK_K)
    if FORM.KEEP_H:
        store_tile(h_ptr + first * (2 * F), gate_MN, n_rows, n_N, F, 2 * F)
        store_tile(h_ptr + first * (2 * F) + F, up_MN, n_rows, n_N, F, 2 * F)
    store_tile(a_ptr + first * F, gate_MN * tl.sigmoid(gate_MN) * up_MN, n_rows, n_N, F, F)


@triton.jit
def row_product_kernel(
    tensors, E, FORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """out [N, WIDTH] = rows [N, DEPTH] @ w[expert], w being [E, DEPTH, WIDTH], or [E, WIDTH, DEPTH] if TRANSPOSED."""
    DEPTH: tl.constexpr = FORM.DEPTH
    WIDTH: tl.constexpr = FORM.WIDTH
    rows_ptr, w_ptr, expert_offsets_ptr, out_ptr = tensors
    expert, first, n_rows, tile = expert_tile(expert_offsets_ptr, E, WIDTH, FORM.BLOCK_E, BLOCK_M, BLOCK_N)
    if n_rows <= 0:
        return
    n_N = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    # The expert's last row stands in for those past it, which may not exist.
    row_M = tl.minimum(tl.arange(0, BLOCK_M), n_rows - 1)
    out_MN, _ = expert_product(
        rows_ptr + first * DEPTH, row_M, w_ptr, expert, n_N, DEPTH, WIDTH, False, FORM.TRANSPOSED, BLOCK_N, BLOCK_K
    )
    store_tile(out_ptr + first * WIDTH, out_MN, n_rows, n_N, WIDTH, WIDTH)


@triton.jit
def combine_kernel(
    rows_ptr,
    weight_ptr,
    token_offsets_ptr,
    row_of_slot_ptr,
    y_ptr,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y [T, D]: the sum of each token's rows, in the order of its slots, times the rows' weights where there are
    any."""
    token = wide(tl.program_id(0))
    d_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin, end = tl.load(token_offsets_ptr + token), tl.load(token_offsets_ptr + token + 1)
    y_D = tl.zeros([BLOCK_D], tl.float32)
    for slot in range(begin, end, BLOCK_S):
        slot_S = slot + tl.arange(0, BLOCK_S)
        row_S = tl.load(row_of_slot_ptr + slot_S, mask=slot_S < end, other=0)
        row_SD = tl.load(
            rows_ptr + row_S[:, None] * D + d_D[None, :], mask=(slot_S < end)[:, None] & (d_D < D)[None, :], other=0.0
        ).to(tl.float32)
        if weight_ptr is not None:
            row_SD *= tl.load(weight_ptr + row_S, mask=slot_S < end, other=0.0).to(tl.float32)[:, None]
        y_D += tl.sum(row_SD, 0)
    tl.store(y_ptr + token * D + d_D, y_D.to(y_ptr.dtype.element_ty), mask=d_D < D)


@triton.jit
def swiglu_gradient(da_MN, h_base, weight_M, dh_base, aw_base, n_rows, n_N, F: tl.constexpr):
    """Store dh and w A of the columns n; returns the rows' sums of dA' * A over them."""
    m_M = tl.arange(0, da_MN.shape[0])
    mask = (m_M < n_rows)[:, None] & (n_N < F)[None, :]
    h_tile = h_base + m_M[:, None] * (2 * F) + n_N[None, :]
    gate_MN = tl.load(h_tile, mask=mask, other=0.0).to(tl.float32)
    up_MN = tl.load(h_tile + F, mask=mask, other=0.0).to(tl.float32)
    sigmoid_MN = tl.sigmoid(gate_MN)
    silu_MN = gate_MN * sigmoid_MN
    a_MN = silu_MN * up_MN
    store_tile(aw_base, weight_M[:, None] * a_MN, n_rows, n_N, F, F)
    store_tile(
        dh_base, weight_M[:, None] * da_MN * up_MN * (sigmoid_MN + silu_MN * (1 - sigmoid_MN)), n_rows, n_N, F, 2 * F
    )
    store_tile(dh_base + F, weight_M[:, None] * da_MN * silu_MN, n_rows, n_N, F, 2 * F)
    return tl.sum(da_MN * a_MN, 1)


@triton.jit
def activation_gradient_kernel(
    tensors,
    n_all_rows,
    E,
    FORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dh [N, 2F], aw = w A [N, F], and this tile's share of the rows' weight gradients, partial [tiles of F, N] in
    fp32. w_down is [E, F, D]."""
    D: tl.constexpr = FORM.D
    F: tl.constexpr = FORM.F
    dy_ptr, w_ptr, h_ptr, token_ptr, weight_ptr, expert_offsets_ptr, dh_ptr, aw_ptr, partial_ptr = tensors
    expert, first, n_rows, tile = expert_tile(expert_offsets_ptr, E, F, FORM.BLOCK_E, BLOCK_M, BLOCK_N)
    if n_rows <= 0:
        return
    m_M = tl.arange(0, BLOCK_M)
    token_M = tl.load(token_ptr + first + m_M, mask=m_M < n_rows, other=0)
    da_MN, _ = expert_product(
        dy_ptr, token_M, w_ptr, expert, tile * BLOCK_N + tl.arange(0, BLOCK_N), D, F, False, True, BLOCK_N, BLOCK_K
    )
    h_base, dh_base, aw_base = h_ptr + first * (2 * F), dh_ptr + first * (2 * F), aw_ptr + first * F
    weight_M = tl.load(weight_ptr + first + m_M, mask=m_M < n_rows, other=0.0).to(tl.float32)
    # Two halves, one after the other: all columns at once do not fit into the registers.
    low_MN, high_MN = tl.split(tl.permute(tl.reshape(da_MN, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1]))
    n_N = tile * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    dweight_M = swiglu_gradient(low_MN, h_base, weight_M, dh_base, aw_base, n_rows, n_N, F)
    dweight_M += swiglu_gradient(high_MN, h_base, weight_M, dh_base, aw_base, n_rows, n_N + BLOCK_N // 2, F)
    tl.store(partial_ptr + wide(tile) * n_all_rows + first + m_M, dweight_M, mask=m_M < n_rows)


@triton.jit
def weight_gradient_kernel(
    tensors, FORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """dw [E, HEIGHT, WIDTH] = left^T @ right over each expert's rows, zero without any. One side has a row per assigned
    row, the other (left if GATHER_LEFT) a row per token."""
    HEIGHT: tl.constexpr = FORM.HEIGHT
    WIDTH: tl.constexpr = FORM.WIDTH
    GATHER_LEFT: tl.constexpr = FORM.GATHER_LEFT
    left_ptr, right_ptr, token_ptr, expert_offsets_ptr, dw_ptr = tensors
    UPRIGHT: tl.constexpr = (HEIGHT + BLOCK_M - 1) // BLOCK_M
    ACROSS: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    expert, first = program // (UPRIGHT * ACROSS), program // ACROSS % UPRIGHT * BLOCK_M
    m_M, n_N, k_K = (
        first + tl.arange(0, BLOCK_M),
        program % ACROSS * BLOCK_N + tl.arange(0, BLOCK_N),
        tl.arange(0, BLOCK_K),
    )
    begin = tl.load(expert_offsets_ptr + expert)
    n_rows = (tl.load(expert_offsets_ptr + expert + 1) - begin).to(tl.int32)
    dw_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, n_rows, BLOCK_K):
        rows = (k + k_K < n_rows)[:, None]
        row_K = begin + k + k_K
        token_K = tl.load(token_ptr + row_K, mask=k + k_K < n_rows, other=0)
        left_tile = left_ptr + (token_K if GATHER_LEFT else row_K)[:, None] * HEIGHT + m_M[None, :]
        right_tile = right_ptr + (row_K if GATHER_LEFT else token_K)[:, None] * WIDTH + n_N[None, :]
        left_KM = tl.load(left_tile, mask=rows & (m_M < HEIGHT)[None, :], other=0.0)
        right_KN = tl.load(right_tile, mask=rows & (n_N < WIDTH)[None, :], other=0.0)
        dw_MN = product(tl.trans(left_KM), right_KN, dw_MN)
    store_tile(dw_ptr + wide(expert) * (HEIGHT * WIDTH) + first * WIDTH, dw_MN, HEIGHT - first, n_N, WIDTH, WIDTH)

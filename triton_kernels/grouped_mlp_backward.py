"""Backward kernels of grouped_mlp: the pre-activations' gradient from h alone, and the experts' gradients over their rows.

With dA' = W_down dy (not yet weighted), A = silu(G) * U and w the row's weight:
    dw = <dA', A>,   dU = w dA' * silu(G),   dG = w dA' * U * silu'(G),   dW_down = (w A)^T dy,   dW_gate_up = x^T [dG dU]
so the experts' outputs are needed nowhere, and A is made again from h. x and dy are gathered inside the products.

Legend: M rows, N columns of a tile, K depth of a product, D model width, E experts, F expert width.
"""

# pyright: reportGeneralTypeIssues=false
import triton
import triton.language as tl

from triton_kernels.flash_attention_blocks import product, wide
from triton_kernels.grouped_mlp_forward import expert_tile, load_tile


@triton.jit
def swiglu_gradient(da_MN, h_base, weight_M, dh_base, aw_base, n_rows, n_N, F: tl.constexpr):
    """Store dh and w A of the columns n; returns the rows' sums of dA' * A over them."""
    m_M = tl.arange(0, da_MN.shape[0])
    mask = (m_M < n_rows)[:, None] & (n_N < F)[None, :]
    offset_MN = m_M[:, None] * (2 * F) + n_N[None, :]
    gate_MN = tl.load(h_base + offset_MN, mask=mask, other=0.0).to(tl.float32)
    up_MN = tl.load(h_base + F + offset_MN, mask=mask, other=0.0).to(tl.float32)
    sigmoid_MN = tl.sigmoid(gate_MN)
    silu_MN = gate_MN * sigmoid_MN
    a_MN = silu_MN * up_MN
    tl.store(aw_base + m_M[:, None] * F + n_N[None, :], (weight_M[:, None] * a_MN).to(aw_base.dtype.element_ty), mask=mask)
    dgate_MN = weight_M[:, None] * da_MN * up_MN * (sigmoid_MN + silu_MN * (1 - sigmoid_MN))
    tl.store(dh_base + offset_MN, dgate_MN.to(dh_base.dtype.element_ty), mask=mask)
    tl.store(dh_base + F + offset_MN, (weight_M[:, None] * da_MN * silu_MN).to(dh_base.dtype.element_ty), mask=mask)
    return tl.sum(da_MN * a_MN, 1)


@triton.jit
def activation_gradient_kernel(
    dy_ptr, w_ptr, h_ptr, token_ptr, weight_ptr, expert_offsets_ptr, dh_ptr, aw_ptr, partial_ptr, N_ROWS, E,
    D: tl.constexpr, F: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dh [N, 2F], aw = w A [N, F], and this tile's share of the rows' weight gradients, partial [tiles of F, N] in fp32. w_down is [E, F, D]."""
    TILES: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) % TILES
    expert, first, n_rows = expert_tile(expert_offsets_ptr, tl.program_id(0) // TILES, E, BLOCK_E, BLOCK_M)
    if n_rows <= 0:
        return
    m_M, k_K = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    n_N = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = (n_N < F)[None, :]
    token_M = tl.load(token_ptr + first + m_M, mask=m_M < n_rows, other=0)
    dy_tile = dy_ptr + token_M[:, None] * D + k_K[None, :]
    w_tile = w_ptr + wide(expert) * (D * F) + k_K[:, None] + n_N[None, :] * D
    da_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    RAGGED: tl.constexpr = D % BLOCK_K != 0 or F % BLOCK_N != 0
    for k in range(0, D, BLOCK_K):
        dy_MK = load_tile(dy_tile + k, (k + k_K < D)[None, :], D % BLOCK_K != 0)
        w_KN = load_tile(w_tile + k, (k + k_K < D)[:, None] & columns, RAGGED)
        da_MN = product(dy_MK, w_KN, da_MN)
    h_base, dh_base, aw_base = h_ptr + first * (2 * F), dh_ptr + first * (2 * F), aw_ptr + first * F
    weight_M = tl.load(weight_ptr + first + m_M, mask=m_M < n_rows, other=0.0).to(tl.float32)
    # Two halves, one after the other: all columns at once do not fit into the registers.
    low_MN, high_MN = tl.split(tl.permute(tl.reshape(da_MN, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1]))
    n_N = tile * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    dweight_M = swiglu_gradient(low_MN, h_base, weight_M, dh_base, aw_base, n_rows, n_N, F)
    dweight_M += swiglu_gradient(high_MN, h_base, weight_M, dh_base, aw_base, n_rows, n_N + BLOCK_N // 2, F)
    tl.store(partial_ptr + wide(tile) * N_ROWS + first + m_M, dweight_M, mask=m_M < n_rows)


@triton.jit
def weight_gradient_kernel(
    left_ptr, right_ptr, token_ptr, expert_offsets_ptr, dw_ptr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, GATHER_LEFT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dw [E, HEIGHT, WIDTH] = left^T @ right over each expert's rows, zero without any. One side has a row per assigned row, the other (left if
    GATHER_LEFT) a row per token."""
    UPRIGHT: tl.constexpr = (HEIGHT + BLOCK_M - 1) // BLOCK_M
    ACROSS: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    expert = program // (UPRIGHT * ACROSS)
    m_M = program // ACROSS % UPRIGHT * BLOCK_M + tl.arange(0, BLOCK_M)
    n_N = program % ACROSS * BLOCK_N + tl.arange(0, BLOCK_N)
    k_K = tl.arange(0, BLOCK_K)
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
    dw_tile = dw_ptr + wide(expert) * (HEIGHT * WIDTH) + m_M[:, None] * WIDTH + n_N[None, :]
    tl.store(dw_tile, dw_MN.to(dw_ptr.dtype.element_ty), mask=(m_M < HEIGHT)[:, None] & (n_N < WIDTH)[None, :])

"""The rotation of a tile, which flash attention's kernels share, and the op that turns keys where they are written: one launch each way.

Legend: B batch, T tokens, H heads, K head width (padded to a power of two), P half of the rotated channels, R channels that do not turn, M tokens of
a block, F folds of the channels, of which the first one turns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.flash_attention_blocks import head_pointer, load_tile, store_tile, tile_offsets, wide

# Pairs of channels of a program.
BLOCK_ELEMENTS = 1024


@triton.jit
def rotate_tile(x_MK, cos_ptr, sin_ptr, row_M, rows_M, ROTARY: tl.constexpr, BACK: tl.constexpr):
    """x in fp32, its first ROTARY (a power of two) channels turned by table rows row_M (BACK: turned back, as gradients are).

    The channels are folded into halves that lie in the same registers of a tensor core's result, so that no channel has to be fetched.
    """
    M: tl.constexpr = x_MK.shape[0]
    HALF: tl.constexpr = ROTARY // 2
    FOLDS: tl.constexpr = x_MK.shape[1] // ROTARY
    first_MFP, second_MFP = tl.split(tl.permute(tl.reshape(x_MK.to(tl.float32), [M, FOLDS, 2, HALF]), (0, 1, 3, 2)))
    # Rows past the end read row 0 rather than nothing: a mask would cost registers.
    angle_MFP = tl.where(rows_M, row_M, 0)[:, None, None] * HALF + tl.arange(0, HALF)[None, None, :]
    if FOLDS == 1:
        cos_MFP, sin_MFP = tl.load(cos_ptr + angle_MFP), tl.load(sin_ptr + angle_MFP)
    else:
        turns_MFP = (tl.arange(0, FOLDS) == 0)[None, :, None]
        cos_MFP, sin_MFP = tl.load(cos_ptr + angle_MFP, mask=turns_MFP, other=1.0), tl.load(sin_ptr + angle_MFP, mask=turns_MFP, other=0.0)
    sin_MFP = -sin_MFP if BACK else sin_MFP
    turned_MFP2 = tl.join(first_MFP * cos_MFP - second_MFP * sin_MFP, second_MFP * cos_MFP + first_MFP * sin_MFP)
    return tl.reshape(tl.permute(turned_MFP2, (0, 1, 3, 2)), [M, FOLDS * ROTARY])


@triton.jit
def rotate_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr, x_stride_b, x_stride_t, x_stride_h, T, H, n_blocks,
    WIDTH: tl.constexpr, HALF: tl.constexpr, BACK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y [B, T, H, K], contiguous: a program turns a block of tokens of one head, and copies the channels that do not turn."""
    program = tl.program_id(0)
    head, block, batch = program % H, program // H % n_blocks, program // H // n_blocks
    t_M, p_P, r_R = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_R)
    rows_M = t_M < T
    x_base = head_pointer(x_ptr, x_stride_b, x_stride_t, x_stride_h, batch, block * BLOCK_M, head)
    y_base = y_ptr + ((wide(batch) * T + block * BLOCK_M) * H + head) * WIDTH
    x_tile, table_tile = tile_offsets(x_stride_t, p_P, BLOCK_M), tile_offsets(HALF, p_P, BLOCK_M) + block * BLOCK_M * HALF
    first_MP = load_tile(x_base + x_tile, rows_M, p_P, True, HALF).to(tl.float32)
    second_MP = load_tile(x_base + HALF + x_tile, rows_M, p_P, True, HALF).to(tl.float32)
    cos_MP = load_tile(cos_ptr + table_tile, rows_M, p_P, True, HALF)
    sin_MP = load_tile(sin_ptr + table_tile, rows_M, p_P, True, HALF) * (-1 if BACK else 1)
    store_tile(y_base, H * WIDTH, first_MP * cos_MP - second_MP * sin_MP, rows_M, p_P, HALF)
    store_tile(y_base + HALF, H * WIDTH, second_MP * cos_MP + first_MP * sin_MP, rows_M, p_P, HALF)
    if 2 * HALF < WIDTH:
        rest_MR = load_tile(x_base + 2 * HALF + tile_offsets(x_stride_t, r_R, BLOCK_M), rows_M, r_R, True, WIDTH - 2 * HALF)
        store_tile(y_base + 2 * HALF, H * WIDTH, rest_MR, rows_M, r_R, WIDTH - 2 * HALF)


@torch.library.custom_op("hybrid_attention::rotate", mutates_args=())
def rotate_op(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """x [B, T, H, K] turned by the tables [T, P2], or turned back."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel() > 0:
        B, T, H, K = x.shape
        x = x if x.stride(-1) == 1 else x.contiguous()
        half = cos.shape[1]
        block_p, block_r = (max(16, triton.next_power_of_2(n)) for n in (half, K - 2 * half))
        block_m = max(1, BLOCK_ELEMENTS // block_p)
        n_blocks = -(-T // block_m)
        sizes = (*x.stride()[:3], T, H, n_blocks)
        constants = {"WIDTH": K, "HALF": half, "BACK": back, "BLOCK_M": block_m, "BLOCK_P": block_p, "BLOCK_R": block_r}
        rotate_kernel[(B * n_blocks * H,)](x, *kernel_tables(cos, sin), y, *sizes, **constants)
    return y


@rotate_op.register_fake
def _(x, cos, sin, back):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    _, cos, sin, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, dy: Tensor):
    return rotate_op(dy, *ctx.saved_tensors, not ctx.back), None, None, None


rotate_op.register_autograd(_backward, setup_context=_save)


def kernel_tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The tables as the kernels read them."""
    return cos.float().contiguous(), sin.float().contiguous()

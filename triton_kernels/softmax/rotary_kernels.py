"""The kernel of `rotate`, which turns keys where they are written.

Legend: B batch, T tokens, H heads, K head width, M tokens of a block, P half of the rotated channels, W channels that
do not turn.
"""

# pyright: reportAttributeAccessIssue=false
from collections import namedtuple

import triton
import triton.language as tl

from triton_kernels.common.tiles import load_block, store_block

# Channels of a head, half of those that turn, whether they are turned back, and what a program takes: tokens, pairs of
# channels, channels that do not turn.
RotaryForm = namedtuple("RotaryForm", "WIDTH HALF BACK BLOCK_M BLOCK_P BLOCK_W")


@triton.jit
def rotate_kernel(x, cos, sin, y, T, H, n_blocks, FORM: tl.constexpr):
    """y [B, T, H, K]: a program turns a block of tokens of one head, and copies the channels that do not turn."""
    WIDTH: tl.constexpr = FORM.WIDTH
    HALF: tl.constexpr = FORM.HALF
    BLOCK_M: tl.constexpr = FORM.BLOCK_M
    BLOCK_P: tl.constexpr = FORM.BLOCK_P
    program = tl.program_id(0)
    head, t, batch = program % H, program // H % n_blocks * BLOCK_M, program // H // n_blocks
    inside_M = t + tl.arange(0, BLOCK_M) < T
    first_MP = load_block(x, batch, t, head, inside_M, HALF, BLOCK_P).to(tl.float32)
    second_MP = load_block(x, batch, t, head, inside_M, HALF, BLOCK_P, column=HALF).to(tl.float32)
    cos_MP = load_block(cos, 0, t, 0, inside_M, HALF, BLOCK_P)
    sin_MP = load_block(sin, 0, t, 0, inside_M, HALF, BLOCK_P) * (-1 if FORM.BACK else 1)
    store_block(y, batch, t, head, first_MP * cos_MP - second_MP * sin_MP, inside_M, HALF)
    store_block(y, batch, t, head, second_MP * cos_MP + first_MP * sin_MP, inside_M, HALF, column=HALF)
    if 2 * HALF < WIDTH:
        rest_MW = load_block(x, batch, t, head, inside_M, WIDTH - 2 * HALF, FORM.BLOCK_W, column=2 * HALF)
        store_block(y, batch, t, head, rest_MW, inside_M, WIDTH - 2 * HALF, column=2 * HALF)

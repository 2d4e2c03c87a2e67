"""Rotary position embedding (RoFormer, arXiv 2104.09864).

Channel c and channel c + P/2 of the P rotated channels form a pair that turns by position * base^(-2c/P), so that the product of a query and a
key depends on their distance only.

Legend: B batch, T tokens, H heads, K head width, P rotated channels.
"""

import torch
from torch import Tensor


def rotation(start: int, n_tokens: int, *, rotary_dim: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine [T, 1, P/2] of the angles at positions start .. start + T - 1, in fp64.

    Angles grow with the position: in fp32 those at 256K tokens would be off by about 0.01 radian.
    """
    position_T = torch.arange(start, start + n_tokens, device=device, dtype=torch.float64)
    frequency_P = base ** (-torch.arange(0, rotary_dim, 2, device=device, dtype=torch.float64) / rotary_dim)
    angle_T1P = (position_T[:, None] * frequency_P)[:, None, :]
    return angle_T1P.cos(), angle_T1P.sin()


def rotate(x_BTHK: Tensor, cos_T1P: Tensor, sin_T1P: Tensor) -> Tensor:
    """Turns the first P channels of every head; computed in fp32 (fp64 for fp64 inputs), returned in the dtype of x."""
    wide = torch.promote_types(x_BTHK.dtype, torch.float32)
    cos, sin = cos_T1P.to(wide), sin_T1P.to(wide)
    half = cos.shape[-1]
    first, second, rest = x_BTHK.split([half, half, x_BTHK.shape[-1] - 2 * half], dim=-1)
    first, second = first.to(wide), second.to(wide)
    turned = [(first * cos - second * sin).to(x_BTHK.dtype), (second * cos + first * sin).to(x_BTHK.dtype)]
    return torch.cat([*turned, rest] if rest.shape[-1] else turned, dim=-1)

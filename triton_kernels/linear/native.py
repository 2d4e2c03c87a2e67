"""One token of a linear layer on a CPU: `delta_decode` and `lightning_decode` in one call each.

Legend: B sequences, H heads, K key width, V value width, X channels, W convolution width.
"""

import torch
from torch import Tensor

from triton_kernels.native.library import call, threads


def delta_decode_native(
    *projections: Tensor,
    conv_XW: Tensor,
    A_log_H: Tensor,
    dt_bias: Tensor,
    norm_V: Tensor,
    state_BHKV: Tensor,
    tail_BXW: Tensor,
    eps: float,
    silu: bool,
) -> Tensor:
    """`delta_decode` on checked arguments; the projections are qkv, gate, a and b."""
    B, H, K, V = state_BHKV.shape
    y_BHV = torch.empty(B, H, V)
    rows = [x.flatten(1).to(torch.float32) for x in projections]
    rows = [x if x.stride(1) == 1 else x.contiguous() for x in rows]
    call(
        "delta_decode",
        *(*rows, *(x.stride(0) for x in rows)),
        *(conv_XW, A_log_H, dt_bias, norm_V, state_BHKV, tail_BXW),
        *(tail_BXW.dtype == torch.bfloat16, dt_bias.numel() == H * K, silu),
        *(eps, B, H, K, V, conv_XW.shape[1], y_BHV, threads()),
    )
    return y_BHV.to(projections[0].dtype)


def lightning_decode_native(qkv_BX: Tensor, log_decay_H: Tensor, *, state_BHKV: Tensor) -> Tensor:
    """`lightning_decode` on checked arguments."""
    B, H, K, V = state_BHKV.shape
    o_BHV, x_BX = torch.empty(B, H, V), qkv_BX.to(torch.float32)
    x_BX = x_BX if x_BX.stride(1) == 1 else x_BX.contiguous()
    call("lightning_decode", x_BX, x_BX.stride(0), log_decay_H, state_BHKV, o_BHV, B, H, K, V)
    return o_BHV.to(qkv_BX.dtype)

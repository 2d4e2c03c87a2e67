"""Torch reference of causal_conv1d: W shifted multiply-adds over the sequences with their tails in front, forward and backward.

Autograd of the same expression would allocate W padded gradients of the whole input; F.conv1d's CPU backward for depthwise weights is slower still.

Legend: B batch, T tokens, D channels, C rows of a piece, W convolution width, W1 = W - 1, L = T + W1 (or, packed, T + S * W1), S sequences.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE_ELEMENTS = 2**17


def causal_conv1d_torch(
    x_BTD: Tensor, weight_DW: Tensor, bias_D: Tensor | None, silu: bool, initial_tail_SDW: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(y_BTD, tail_SDW1); the arguments are those of `causal_conv1d`, already checked."""
    W1 = weight_DW.shape[1] - 1
    tail_SWD = initial_tail_SDW.transpose(1, 2)
    if cu_seqlens is None:
        x_BLD = torch.cat([tail_SWD, x_BTD], dim=1)
        y_BTD = _Convolution.apply(x_BLD, weight_DW, bias_D, silu)
        return y_BTD, x_BLD[:, x_BLD.shape[1] - W1 :].transpose(1, 2)
    # One row with every sequence's tail in front of it; what the tails' own rows give is left out of y.
    T, S = x_BTD.shape[1], cu_seqlens.numel() - 1
    token_T = torch.arange(T, device=x_BTD.device)
    sequence_T = torch.bucketize(token_T, cu_seqlens[1:], right=True)
    row_T = token_T + (sequence_T + 1) * W1
    offset_W = torch.arange(W1, device=x_BTD.device)
    tail_row_SW = (cu_seqlens[:-1] + torch.arange(S, device=x_BTD.device) * W1)[:, None] + offset_W
    x_LD = x_BTD.new_zeros(T + S * W1, x_BTD.shape[2])
    x_LD = x_LD.index_copy(0, row_T, x_BTD[0]).index_copy(0, tail_row_SW.flatten(), tail_SWD.flatten(0, 1))
    y_LD = _Convolution.apply(x_LD[None], weight_DW, bias_D, silu)[0]
    last_row_SW = (cu_seqlens[1:] + torch.arange(S, device=x_BTD.device) * W1)[:, None] + offset_W
    return y_LD.index_select(0, row_T - W1)[None], x_LD[last_row_SW].transpose(1, 2)


class _Convolution(torch.autograd.Function):
    """y[t] = act(bias + sum_w weight[w] x[t + w]) for the rows t that have all their W inputs. Keeps x only; the backward recomputes z."""

    @staticmethod
    def forward(ctx, x_BLD: Tensor, weight_DW: Tensor, bias_D: Tensor | None, silu: bool) -> Tensor:
        ctx.save_for_backward(x_BLD, weight_DW, bias_D)
        ctx.silu = silu
        B, L, D = x_BLD.shape
        W = weight_DW.shape[1]
        weight_WD = _accumulated(weight_DW).T.contiguous()
        y_BTD = x_BLD.new_empty(B, L - W + 1, D)
        for b, rows in _pieces(y_BTD):
            z_CD = _shifted_sum(x_BLD[b, rows.start : rows.stop + W - 1], weight_WD, bias_D)
            y_BTD[b, rows] = F.silu(z_CD) if silu else z_CD
        return y_BTD

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        (dy_BTD,) = grad_outputs
        x_BLD, weight_DW, bias_D = ctx.saved_tensors
        W = weight_DW.shape[1]
        weight_WD = _accumulated(weight_DW).T.contiguous()
        dx_BLD = torch.zeros_like(x_BLD, dtype=torch.promote_types(x_BLD.dtype, torch.float32))
        dweight_WD, dbias_D = torch.zeros_like(weight_WD), torch.zeros_like(weight_WD[0])
        for b, rows in _pieces(dy_BTD):
            dz_CD = _accumulated(dy_BTD[b, rows])
            if ctx.silu:
                z_CD = _shifted_sum(x_BLD[b, rows.start : rows.stop + W - 1], weight_WD, bias_D)
                dz_CD = torch.ops.aten.silu_backward(dz_CD, z_CD)
            dbias_D += dz_CD.sum(0)
            for w in range(W):
                shifted = slice(rows.start + w, rows.stop + w)
                dx_BLD[b, shifted].addcmul_(dz_CD, weight_WD[w])
                dweight_WD[w] += (dz_CD * x_BLD[b, shifted]).sum(0)
        return dx_BLD.to(x_BLD.dtype), dweight_WD.T.to(weight_DW.dtype), None if bias_D is None else dbias_D.to(bias_D.dtype), None


def _pieces(x_BTD: Tensor) -> Iterator[tuple[int, slice]]:
    """(b, rows) whose working set stays in a core's cache, which makes the W passes over it nearly free."""
    B, T, D = x_BTD.shape
    size = max(1, PIECE_ELEMENTS // max(1, D))
    return ((b, slice(start, min(start + size, T))) for b in range(B) for start in range(0, T, size))


def _accumulated(x: Tensor) -> Tensor:
    """x in the dtype of the sums: fp32, or fp64 for fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _shifted_sum(x_LD: Tensor, weight_WD: Tensor, bias_D: Tensor | None) -> Tensor:
    """z_CD, C = L - W + 1, in the dtype of the sums."""
    W = weight_WD.shape[0]
    C = x_LD.shape[0] - W + 1
    z_CD = x_LD[:C] * weight_WD[0]
    for w in range(1, W):
        z_CD.addcmul_(x_LD[w : w + C], weight_WD[w])
    return z_CD if bias_D is None else z_CD.add_(bias_D)

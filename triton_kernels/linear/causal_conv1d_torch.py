"""causal_conv1d in torch: W shifted multiply-adds over the sequences with their tails in front.

Autograd of that would allocate W padded gradients of the whole input, and F.conv1d's CPU backward for depthwise weights
is slower still, so the backward is written out.

Legend: B batch, T tokens, D channels, W convolution width, R = W - 1 entries of a tail, S sequences (B of them, or
those packed by `cu_seqlens`), L = rows with the tails in front, C rows of a piece.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# What stays in a core's cache, which makes the W passes over a piece nearly free.
PIECE_ELEMENTS = 2**17


def causal_conv1d_torch(
    x_BTD: Tensor, weight_DW: Tensor, bias_D: Tensor | None, tail_SRD: Tensor, cu_seqlens: Tensor | None, silu: bool
) -> Tensor:
    if cu_seqlens is None:
        return Convolution.apply(torch.cat([tail_SRD, x_BTD], 1), weight_DW, bias_D, silu)
    # One row with every sequence's tail in front of it; what the tails' own rows give is left out of y.
    (T, D), (S, R) = x_BTD.shape[1:], tail_SRD.shape[:2]
    token_T, sequence_S, entry_R = (torch.arange(n, device=x_BTD.device) for n in (T, S, R))
    row_T = token_T + (torch.bucketize(token_T, cu_seqlens[1:], right=True) + 1) * R
    row_SR = (cu_seqlens[:-1] + sequence_S * R)[:, None] + entry_R
    x_LD = (
        x_BTD.new_zeros(T + S * R, D)
        .index_copy(0, row_T, x_BTD[0])
        .index_copy(0, row_SR.flatten(), tail_SRD.flatten(0, 1))
    )
    return Convolution.apply(x_LD[None], weight_DW, bias_D, silu).index_select(1, row_T - R)


class Convolution(torch.autograd.Function):
    """y[t] = act(bias + sum_w weight[w] x[t + w]) for the rows t that have all their W inputs. Keeps x only; the
    backward computes z again."""

    @staticmethod
    def forward(ctx, x_BLD: Tensor, weight_DW: Tensor, bias_D: Tensor | None, silu: bool) -> Tensor:
        ctx.save_for_backward(x_BLD, weight_DW, bias_D)
        ctx.silu = silu
        B, L, D = x_BLD.shape
        y_BTD = x_BLD.new_empty(B, L - weight_DW.shape[1] + 1, D)
        weight_WD = in_sums(weight_DW).T.contiguous()
        for b, rows_W in pieces(y_BTD, len(weight_WD)):
            z_CD = shifted_sum(x_BLD[b], rows_W, weight_WD, bias_D)
            y_BTD[b, rows_W[0]] = F.silu(z_CD) if silu else z_CD
        return y_BTD

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        (dy_BTD,), (x_BLD, weight_DW, bias_D) = grad_outputs, ctx.saved_tensors
        weight_WD = in_sums(weight_DW).T.contiguous()
        dx_BLD, dweight_WD, dbias_D = (
            torch.zeros_like(in_sums(x_BLD)),
            torch.zeros_like(weight_WD),
            torch.zeros_like(weight_WD[0]),
        )
        for b, rows_W in pieces(dy_BTD, len(weight_WD)):
            dz_CD = in_sums(dy_BTD[b, rows_W[0]])
            if ctx.silu:
                dz_CD = torch.ops.aten.silu_backward(dz_CD, shifted_sum(x_BLD[b], rows_W, weight_WD, bias_D))
            dbias_D += dz_CD.sum(0)
            for w, rows in enumerate(rows_W):
                dx_BLD[b, rows].addcmul_(dz_CD, weight_WD[w])
                dweight_WD[w] += (dz_CD * x_BLD[b, rows]).sum(0)
        return (
            dx_BLD.to(x_BLD.dtype),
            dweight_WD.T.to(weight_DW.dtype),
            None if bias_D is None else dbias_D.to(bias_D.dtype),
            None,
        )


def pieces(y_BTD: Tensor, W: int) -> Iterator[tuple[int, list[slice]]]:
    """(b, the rows of x that weight 0 .. W - 1 meets) of some rows of y, which are those of weight 0."""
    B, T, D = y_BTD.shape
    size = max(1, PIECE_ELEMENTS // max(1, D))
    return ((b, [slice(t + w, min(t + size, T) + w) for w in range(W)]) for b in range(B) for t in range(0, T, size))


def shifted_sum(x_LD: Tensor, rows_W: list[slice], weight_WD: Tensor, bias_D: Tensor | None) -> Tensor:
    """z_CD of a piece, in the dtype of the sums."""
    z_CD = x_LD[rows_W[0]] * weight_WD[0]
    for rows, weight_D in zip(rows_W[1:], weight_WD[1:]):
        z_CD.addcmul_(x_LD[rows], weight_D)
    return z_CD if bias_D is None else z_CD.add_(bias_D)


def in_sums(x: Tensor) -> Tensor:
    """x in the dtype of the sums: fp32, or fp64 for fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

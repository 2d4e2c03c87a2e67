"""Causal depthwise convolution of width 2 to 4 with SiLU, and the tail that lets a later call continue it.

    z_t = bias + sum_{w < W} weight[:, w] * x_{t - (W - 1) + w};  y = silu(z)

The short convolution before the linear-attention layers (Mamba, arXiv 2312.00752; gated DeltaNet, arXiv 2412.06464).

Legend: B batch, T tokens, D channels, W convolution width, W1 = W - 1, L = rows with the tails in front, S packed sequences (B without cu_seqlens).
"""

import torch
from torch import Tensor

from triton_kernels.causal_conv1d_torch import causal_conv1d_torch
from triton_kernels.checks import check_backend, check_cu_seqlens, check_dtype, check_shape

OP = "causal_conv1d"
WIDTHS = (2, 3, 4)


def causal_conv1d(
    x_BTD: Tensor,
    weight_DW: Tensor,
    *,
    bias_D: Tensor | None = None,
    activation: str | None = "silu",
    initial_tail: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Convolves every channel with its own W weights over the current and the W - 1 tokens before it.

    Args:
        x_BTD: inputs; the output has their dtype, sums are taken in fp32 (fp64 for fp64).
        weight_DW: weight_DW[:, W - 1] meets the current token. Any floating dtype, like bias_D and initial_tail.
        activation: "silu", or None for the bare convolution.
        initial_tail: [S, D, W - 1], the inputs before the first token of each sequence, oldest first; zeros by default.
        cu_seqlens: int64 [S + 1]: B = 1 holds S sequences end to end, each with its own tail, empty ones allowed.
        backend: "torch", "triton", or "auto": Triton on CUDA tensors.

    Returns:
        y_BTD and the tail [S, D, W - 1] in x's dtype: the last W - 1 inputs of each sequence, those of initial_tail included when it is shorter.
        Gradients flow to x, weight, bias and initial_tail, through both. Raises ValueError for shapes, dtypes and options that do not fit.
    """
    check_shape(OP, "x_BTD", x_BTD, {"B": None, "T": None, "D": None})
    B, T, D = x_BTD.shape
    check_shape(OP, "weight_DW", weight_DW, {"D": D, "W": None})
    W = weight_DW.shape[1]
    if W not in WIDTHS:
        raise ValueError(f"{OP}: weight_DW has width W={W}, legal are {', '.join(map(str, WIDTHS))}")
    if activation not in ("silu", None):
        raise ValueError(f"{OP}: activation={activation!r}, legal are 'silu' and None")
    check_dtype(OP, {"x_BTD": x_BTD})
    check_cu_seqlens(OP, cu_seqlens, B, T)
    n_sequences = B if cu_seqlens is None else cu_seqlens.numel() - 1
    if bias_D is not None:
        check_shape(OP, "bias_D", bias_D, {"D": D})
    if initial_tail is None:
        initial_tail = x_BTD.new_zeros(n_sequences, D, W - 1)
    check_shape(OP, "initial_tail", initial_tail, {"S": n_sequences, "D": D, "W-1": W - 1})
    initial_tail = initial_tail.to(x_BTD.dtype)
    arguments = (x_BTD, weight_DW, bias_D, activation == "silu", initial_tail, cu_seqlens)
    if check_backend(backend, x_BTD) == "torch":
        return causal_conv1d_torch(*arguments)
    if x_BTD.dtype == torch.float64:
        raise ValueError(f"{OP}: x_BTD is float64; the Triton kernels take float32, float16 and bfloat16")
    # Imported here because machines without Triton (macOS) still have the torch backend.
    from triton_kernels.causal_conv1d_triton import causal_conv1d_triton

    return causal_conv1d_triton(*arguments)


def causal_conv1d_step(
    x_BD: Tensor, weight_DW: Tensor, tail_BDW1: Tensor, *, bias_D: Tensor | None = None, activation: str | None = "silu"
) -> tuple[Tensor, Tensor]:
    """One token: (y_BD, the new tail), equal to `causal_conv1d` of that token after `tail_BDW1`."""
    y_B1D, tail_BDW1 = causal_conv1d(x_BD[:, None], weight_DW, bias_D=bias_D, activation=activation, initial_tail=tail_BDW1)
    return y_B1D[:, 0], tail_BDW1

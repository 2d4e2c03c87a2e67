"""Causal depthwise convolution of width 2 to 8 with SiLU, and the tail that lets a later call continue it.

    z_t = bias + sum_{w < W} weight[:, w] * x_{t - (W - 1) + w};  y = silu(z)

The short convolution before the linear-attention layers (Mamba, arXiv 2312.00752; gated DeltaNet, arXiv 2412.06464);
without SiLU it is a layer of its own between two gates (LFM2, arXiv 2511.23404).

Legend: B batch, T tokens, D channels, W convolution width, R = W - 1 entries of a tail, S sequences (B of them, or
those packed by `cu_seqlens`).
"""

import torch
from torch import Tensor

from triton_kernels.common.checks import (
    check_backend,
    check_cu_seqlens,
    check_dtype,
    check_placed,
    check_shape,
    check_tensors,
)
from triton_kernels.linear.causal_conv1d_torch import causal_conv1d_torch
from triton_kernels.linear.native_layer import causal_conv1d_native
from triton_kernels.native.library import UP_TO_FP32, takes_many_rows

OP = "causal_conv1d"
WIDTHS = tuple(range(2, 9))


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
    """Convolves every channel with its own W weights over the current token, which weight_DW[:, W - 1] meets, and the W
    - 1 before it.

    Args:
        x_BTD: inputs; sums are fp32 (fp64 for fp64), whatever the floating dtypes of the other tensors.
        weight_DW: W is 2 to 8.
        bias_D: added before the activation.
        activation: "silu" or None.
        initial_tail: [S, D, W - 1], the inputs before each sequence, oldest first; zeros by default.
        cu_seqlens: int64 [S + 1] from 0 to T: B = 1 packs S sequences, empty ones allowed.
        backend: "torch", "triton", "native" (in C, on a CPU without cu_seqlens), or "auto": Triton on CUDA
            tensors, C where it takes them.

    Returns:
        y_BTD, and the tail [S, D, W - 1], both in x's dtype: the last W - 1 inputs of each sequence, those of
        initial_tail included when it is shorter. Gradients flow to x, weight, bias and initial_tail, through both.

    Raises:
        ValueError: for shapes, dtypes, offsets and options that do not fit.
    """
    B, T, D, W = check_tensors(OP, x_BTD=x_BTD, weight_DW=weight_DW, bias_D=bias_D).values()
    if W not in WIDTHS:
        raise ValueError(f"{OP}: weight_DW has width W={W}, legal are 2 to {WIDTHS[-1]}")
    if activation not in ("silu", None):
        raise ValueError(f"{OP}: activation={activation!r}, legal are 'silu' and None")
    check_dtype(OP, {"x_BTD": x_BTD})
    check_placed(OP, x_BTD=x_BTD, weight_DW=weight_DW, bias_D=bias_D, initial_tail=initial_tail, cu_seqlens=cu_seqlens)
    check_cu_seqlens(OP, cu_seqlens, B, T)
    S = B if cu_seqlens is None else cu_seqlens.numel() - 1
    if initial_tail is None:
        tail_SRD = x_BTD.new_zeros(S, W - 1, D)
    else:
        check_shape(OP, "initial_tail", initial_tail, {"S": S, "D": D, "W-1": W - 1})
        tail_SRD = initial_tail.to(x_BTD.dtype).transpose(1, 2)
    tensors = [x for x in (x_BTD, weight_DW, bias_D, tail_SRD) if x is not None]
    native = cu_seqlens is None and x_BTD.numel() > 0 and takes_many_rows(*tensors, dtypes=UP_TO_FP32)
    chosen = check_backend(backend, x_BTD, native=native)
    if chosen == "native":
        y_BTD = causal_conv1d_native(x_BTD, weight_DW, bias_D, tail_SRD, silu=activation == "silu")
        return y_BTD, last_inputs(x_BTD, tail_SRD, None).transpose(1, 2)
    if chosen == "torch":
        convolve = causal_conv1d_torch
    elif x_BTD.dtype == torch.float64:
        raise ValueError(f"{OP}: x_BTD is float64; the Triton kernels take float32, float16 and bfloat16")
    else:
        # Imported here because machines without Triton (macOS) still have the torch backend.
        from triton_kernels.linear.causal_conv1d_launch import forward_op as convolve
    y_BTD = convolve(x_BTD, weight_DW, bias_D, tail_SRD, cu_seqlens=cu_seqlens, silu=activation == "silu")
    return y_BTD, last_inputs(x_BTD, tail_SRD, cu_seqlens).transpose(1, 2)


def last_inputs(x_BTD: Tensor, tail_SRD: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The last W - 1 inputs of each sequence [S, R, D], its tail counted as earlier inputs; nothing is read by the
    host."""
    T, R = x_BTD.shape[1], tail_SRD.shape[1]
    if cu_seqlens is None:
        return x_BTD[:, T - R :] if T >= R else torch.cat([tail_SRD, x_BTD], 1)[:, T:]
    if T == 0:
        return tail_SRD.clone()
    # Counted from the first entry of the sequence's tail: its own inputs are R and what follows.
    place_SR = cu_seqlens.diff()[:, None] + torch.arange(R, device=x_BTD.device)
    from_x_SRD = x_BTD[0][(cu_seqlens[:-1, None] + place_SR - R).clamp(min=0)]
    from_tail_SRD = tail_SRD.gather(1, place_SR.clamp(max=R - 1)[:, :, None].expand_as(tail_SRD))
    return torch.where((place_SR >= R)[:, :, None], from_x_SRD, from_tail_SRD)

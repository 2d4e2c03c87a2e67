"""RMS norm of the output of a linear-attention head, times an activated gate.

y = x * rsqrt(mean(x^2) + eps) * weight * act(gate),   act = silu (gated DeltaNet, arXiv 2412.06464) or sigmoid
(lightning, arXiv 2401.04658)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_kernels.common.checks import check_backend, check_dtype, check_number, check_placed, check_shape
from triton_kernels.linear.native_layer import gated_rms_norm_native
from triton_kernels.native.library import UP_TO_FP32, takes_many_rows

OP = "gated_rms_norm"
ACTIVATIONS = ("silu", "sigmoid")


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, *, eps: float, activation: str = "silu", backend: str = "auto"
) -> Tensor:
    """RMSNorm over the last dimension of x, scaled by weight and by the activated gate.

    Args:
        x, gate: [..., D] in one dtype, which is y's; statistics and products are fp32 (fp64 for fp64).
        weight: [D] in any floating dtype.
        eps: added to the mean of the squares.
        activation: "silu" or "sigmoid".
        backend: "torch", "triton", "native" (in C, on a CPU), or "auto": Triton on CUDA tensors, C where it
            takes them.

    Returns:
        y in the shape and dtype of x, differentiable in all three tensors.

    Raises:
        ValueError: for shapes, dtypes and options that do not fit.
    """
    if x.dim() == 0:
        raise ValueError(f"{OP}: x is a scalar, expected [..., D]")
    check_shape(OP, "gate", gate, {f"axis {i}": size for i, size in enumerate(x.shape)})
    check_shape(OP, "weight", weight, {"D": x.shape[-1]})
    check_dtype(OP, {"x": x, "gate": gate})
    check_placed(OP, x=x, gate=gate, weight=weight)
    check_number(OP, "eps", eps, least=0)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{OP}: activation={activation!r}, legal are {', '.join(map(repr, ACTIVATIONS))}")
    native = x.numel() > 0 and takes_many_rows(x, gate, weight, dtypes=UP_TO_FP32)
    chosen = check_backend(backend, x, native=native)
    if chosen == "native":
        return gated_rms_norm_native(x, gate, weight, eps=eps, silu=activation == "silu")
    if chosen == "torch":
        sums = torch.promote_types(x.dtype, torch.float32)
        normed = F.rms_norm(x.to(sums), (x.shape[-1],), weight.to(sums), eps)
        return (normed * (F.silu if activation == "silu" else torch.sigmoid)(gate.to(sums))).to(x.dtype)
    # Imported here because machines without Triton (macOS) still have the torch backend.
    from triton_kernels.linear.gated_rms_norm_launch import MAX_WIDTH, forward_op

    if x.dtype == torch.float64 or x.shape[-1] > MAX_WIDTH:
        raise ValueError(
            f"{OP}: {x.dtype} of width {x.shape[-1]}; the Triton kernels take float32, float16 and bfloat16 up to"
            f" {MAX_WIDTH}"
        )
    return forward_op(x, gate, weight, eps=eps, silu=activation == "silu")

"""Rotary position embedding (RoFormer, arXiv 2104.09864): every head's channels turned in pairs by an angle that grows
with the position.

Channel c and channel c + P/2 of the P rotated channels form a pair that turns by position * base^(-2c/P), so that the
product of a query and a key depends on their distance only. Keys are turned by this op, where they are written: once
for all the queries, layers and decode steps that read them. Queries are turned inside flash_attention, which is the
only one to read them.

Legend: B batch, T tokens, H heads, K head width, P half of the rotated channels.
"""

import torch
from torch import Tensor

from triton_kernels.common.checks import check_backend, check_dtype, check_placed, check_tensors
from triton_kernels.native.library import UP_TO_FP32, takes_many_rows
from triton_kernels.softmax.rotary_native import rotate_native

OP = "rotate"
Rotary = tuple[Tensor, Tensor]


def rotary_tables(position_T: Tensor, *, rotary_dim: int, base: float) -> Rotary:
    """Cosine and sine [T, rotary_dim / 2] of the angles at any positions (for packed sequences: those inside each
    sequence), in fp64.

    Angles grow with the position: in fp32 those at 256K tokens would be off by about 0.01 radian."""
    exponent_P = torch.arange(0, rotary_dim, 2, device=position_T.device, dtype=torch.float64) / max(1, rotary_dim)
    angle_TP = position_T.to(torch.float64)[:, None] * base**-exponent_P
    return angle_TP.cos(), angle_TP.sin()


def rotate(x_BTHK: Tensor, rotary: Rotary, *, backend: str = "auto") -> Tensor:
    """Turns the first 2 P channels of every head of x_BTHK (queries or keys), computing in fp32 (fp64 for fp64 inputs).

    Args:
        x_BTHK: queries or keys.
        rotary: cosine and sine [T, P] of each token's angles, 2 P <= K; without gradients.
        backend: "torch", "triton", "native" (C on a CPU, fp32 and bf16), or "auto": Triton on CUDA tensors, C where it
            takes them.

    Returns:
        [B, T, H, K] in the dtype of x, differentiable in x.

    Raises:
        ValueError: for shapes and dtypes that do not fit.
    """
    sizes = check_tensors(OP, x_BTHK=x_BTHK)
    check_dtype(OP, {"x_BTHK": x_BTHK})
    check_rotary(OP, rotary, sizes["T"], sizes["K"])
    check_placed(OP, x_BTHK=x_BTHK, rotary_cosines_TP=rotary[0], rotary_sines_TP=rotary[1])
    if rotary[0].shape[1] == 0:
        return x_BTHK
    in_c = takes_many_rows(x_BTHK, dtypes=UP_TO_FP32[:2]) and x_BTHK.stride(-1) == 1
    chosen = check_backend(backend, x_BTHK, native=in_c)
    if chosen == "torch":
        return rotate_torch(x_BTHK, rotary)
    if chosen == "native":
        return rotate_native(x_BTHK, *rotary)
    if x_BTHK.dtype == torch.float64:
        raise ValueError(f"{OP}: x_BTHK is float64; the Triton kernel takes float32, float16 and bfloat16")
    # Imported here because machines without Triton (macOS) still have the torch backend.
    from triton_kernels.softmax.rotary_launch import rotate_op

    return rotate_op(x_BTHK, *rotary, False)


def rotate_torch(x_BTHK: Tensor, rotary: Rotary) -> Tensor:
    wide = torch.promote_types(x_BTHK.dtype, torch.float32)
    cos, sin = (table_TP[:, None].to(wide) for table_TP in rotary)
    half = cos.shape[-1]
    first, second, rest = x_BTHK.split([half, half, x_BTHK.shape[-1] - 2 * half], dim=-1)
    first, second = first.to(wide), second.to(wide)
    turned = [(first * cos - second * sin).to(x_BTHK.dtype), (second * cos + first * sin).to(x_BTHK.dtype)]
    return torch.cat([*turned, rest] if rest.shape[-1] else turned, dim=-1)


def check_rotary(op: str, rotary: Rotary, T: int, K: int) -> None:
    """Raises ValueError, naming the table, its shape and what is legal."""
    tables = {"rotary_cosines_TP": rotary[0], "rotary_sines_TP": rotary[1]}
    half = check_tensors(op, {"T": T}, **tables)["P"]
    check_dtype(op, tables)
    if 2 * half > K:
        raise ValueError(f"{op}: rotary cosines of {half} columns turn {2 * half} channels, heads have K={K}")

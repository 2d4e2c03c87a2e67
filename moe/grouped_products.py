"""The experts on other libraries' grouped products: `torch.nn.functional.grouped_mm`, and `gmm` of the package
grouped_gemm.

Both multiply rows sorted by expert with the weights of each expert. The gathered inputs and the experts' outputs exist
as a whole, in memory and in autograd's graph. The sum over a token's rows is an index_add in fp32 or better: in fixed
order on the CPU, not on a GPU.

Legend: T tokens, D model width, E experts, F expert width, N assigned rows, n of them not padding.
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from routing.assignments import Assignments


def why_not_grouped_mm(x_TD: Tensor, w_down_EFD: Tensor) -> str | None:
    """Why grouped_mm cannot run on these tensors, or None."""
    if x_TD.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"grouped_mm does not take {x_TD.dtype}"
    if x_TD.device.type == "cuda" and x_TD.dtype != torch.bfloat16:
        return f"grouped_mm on CUDA takes bfloat16 only, not {x_TD.dtype}"
    per_16_bytes = 16 // x_TD.element_size()
    if any(width % per_16_bytes for width in w_down_EFD.shape[1:]):
        return (
            f"grouped_mm needs widths that are multiples of {per_16_bytes} in {x_TD.dtype}, got"
            f" {tuple(w_down_EFD.shape[1:])}"
        )
    return None


def experts_by_grouped_mm(x_TD: Tensor, w_gate_up_EDF2: Tensor, w_down_EFD: Tensor, rows: Assignments) -> Tensor:
    """`moe.backends.compute_experts` by torch's grouped_mm. Rows behind the last offset come back from it
    uninitialised, in forward and in backward alike, so padding rows are masked on both sides of the products (0 * NaN
    would be NaN)."""
    dtype, ends = x_TD.dtype, rows.expert_offsets[1:].to(torch.int32)
    padding_N1 = torch.arange(rows.token_N.shape[0], device=x_TD.device)[:, None] >= rows.expert_offsets[-1]
    x_ND = x_TD.index_select(0, rows.token_N).masked_fill(padding_N1, 0.0)
    gate_NF, up_NF = F.grouped_mm(x_ND, w_gate_up_EDF2.to(dtype), offs=ends).chunk(2, dim=-1)
    # Each masked on its own: the other factor of a product is garbage in padding rows, and would reach the weights'
    # gradient.
    a_NF = (
        F.silu(gate_NF.masked_fill(padding_N1, 0.0))
        * up_NF.masked_fill(padding_N1, 0.0)
        * rows.weight_N[:, None].to(dtype)
    )
    a_NF = a_NF.masked_fill(padding_N1, 0.0)
    out_ND = F.grouped_mm(a_NF, w_down_EFD.to(dtype), offs=ends).masked_fill(padding_N1, 0.0)
    return _sum_per_token(x_TD, rows.token_N, out_ND)


def why_not_gmm(x_TD: Tensor, w_down_EFD: Tensor) -> str | None:
    """Why gmm cannot run on these tensors, or None.

    grouped_gemm (https://github.com/tgale96/grouped_gemm, built from source against the torch that is installed) holds
    the grouped products that MegaBlocks uses. `megablocks` itself is not imported: its 0.10 requires torch < 2.7.1 and
    cannot be imported without CUDA, and its expert layer is these products around its own permutation."""
    if not x_TD.is_cuda or x_TD.dtype != torch.bfloat16:
        return f"grouped_gemm.ops.gmm takes bfloat16 on CUDA, not {x_TD.dtype} on {x_TD.device.type}"
    if importlib.util.find_spec("grouped_gemm") is None:
        return (
            "the package grouped_gemm is not installed (pip install git+https://github.com/tgale96/grouped_gemm, which"
            " compiles it)"
        )
    return None


def experts_by_gmm(x_TD: Tensor, w_gate_up_EDF2: Tensor, w_down_EFD: Tensor, rows: Assignments) -> Tensor:
    """`moe.backends.compute_experts` by grouped_gemm.

    The layout is that package's: gmm(a, b, batch_sizes, trans_b=False) with a [n, I], b [E, I, O] contiguous and
    batch_sizes int64 [E] on the CPU, so every call waits for the device once. n is their sum: padding rows are cut
    off."""
    from grouped_gemm import ops  # pyright: ignore[reportMissingImports]

    rows_E = rows.expert_offsets.diff().to("cpu", torch.int64)
    token_n, weight_n1 = rows.token_N[: int(rows_E.sum())], rows.weight_N[: int(rows_E.sum()), None]
    # What gmm leaves in the gradient of an expert without rows is not documented: where() lets zero through instead.
    used_E11 = (rows.expert_offsets.diff() > 0)[:, None, None]
    gate_up, down = (torch.where(used_E11, w.to(x_TD.dtype), 0.0).contiguous() for w in (w_gate_up_EDF2, w_down_EFD))
    gate_nF, up_nF = ops.gmm(x_TD.index_select(0, token_n), gate_up, rows_E).chunk(2, dim=-1)
    out_nD = ops.gmm(F.silu(gate_nF) * up_nF * weight_n1.to(x_TD.dtype), down, rows_E)
    return _sum_per_token(x_TD, token_n, out_nD)


def _sum_per_token(x_TD: Tensor, token_N: Tensor, out_ND: Tensor) -> Tensor:
    sum_dtype = torch.promote_types(x_TD.dtype, torch.float32)
    return torch.zeros_like(x_TD, dtype=sum_dtype).index_add(0, token_N, out_ND.to(sum_dtype)).to(x_TD.dtype)

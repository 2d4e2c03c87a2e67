"""Grouped gated MLP on `torch.nn.functional.grouped_mm`, guarded.

What has to be guarded: rows behind the last offset come back uninitialised, in forward and in backward alike, so padding rows are masked on
both sides of the products (0 * NaN would be NaN); fp64 and row strides that are no multiple of 16 bytes are not supported; offsets are not
checked (`grouped_mlp` does). The gathered inputs and the experts' outputs exist as a whole, in memory and in autograd's graph.

Legend: T tokens, D model width, E experts, F expert width, N assigned rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def why_not(x_TD: Tensor, w_down_EFD: Tensor) -> str | None:
    """Why grouped_mm cannot run on these tensors, or None."""
    if x_TD.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"grouped_mm does not take {x_TD.dtype}"
    if x_TD.device.type == "cuda" and x_TD.dtype != torch.bfloat16:
        return f"grouped_mm on CUDA takes bfloat16 only, not {x_TD.dtype}"
    per_16_bytes = 16 // x_TD.element_size()
    if any(width % per_16_bytes for width in w_down_EFD.shape[1:]):
        return f"grouped_mm needs widths that are multiples of {per_16_bytes} in {x_TD.dtype}, got {tuple(w_down_EFD.shape[1:])}"
    return None


def grouped_mlp_grouped_mm(
    x_TD: Tensor, w_gate_up_EDF2: Tensor, w_down_EFD: Tensor, token_N: Tensor, weight_N: Tensor, expert_offsets: Tensor
) -> Tensor:
    """As `grouped_mlp`. The sum over a token's rows is an index_add in fp32: in fixed order on the CPU, not on a GPU."""
    dtype, ends = x_TD.dtype, expert_offsets[1:].to(torch.int32)
    padding_N1 = torch.arange(token_N.shape[0], device=x_TD.device)[:, None] >= expert_offsets[-1]
    x_ND = x_TD.index_select(0, token_N).masked_fill(padding_N1, 0.0)
    gate_NF, up_NF = F.grouped_mm(x_ND, w_gate_up_EDF2.to(dtype), offs=ends).chunk(2, dim=-1)
    # Each masked on its own: the other factor of a product is garbage in padding rows, and would reach the weights' gradient.
    a_NF = F.silu(gate_NF.masked_fill(padding_N1, 0.0)) * up_NF.masked_fill(padding_N1, 0.0) * weight_N[:, None].to(dtype)
    a_NF = a_NF.masked_fill(padding_N1, 0.0)
    out_ND = F.grouped_mm(a_NF, w_down_EFD.to(dtype), offs=ends).masked_fill(padding_N1, 0.0)
    y_TD = torch.zeros_like(x_TD, dtype=torch.float32).index_add(0, token_N, out_ND.float())
    return y_TD.to(dtype)

"""Grouped gated MLP on the grouped products that MegaBlocks uses (`grouped_gemm.ops.gmm`), an optional peer.

What it needs: a CUDA device, bf16 tensors and the package `grouped_gemm` (https://github.com/tgale96/grouped_gemm, built from source against the
torch that is installed). `megablocks` itself is not imported: its 0.10 requires torch < 2.7.1 and cannot be imported without CUDA, and its expert
layer is these products around its own permutation.

The layout, as in that package: gmm(a, b, batch_sizes, trans_b=False) with a [n, I] and b [E, I, O] contiguous, the rows of a sorted by expert, and
batch_sizes int64 [E] on the CPU, so every call of this backend waits for the device once. n is the sum of the batch sizes: padding rows are cut off.

Legend: T tokens, D model width, E experts, F expert width, N assigned rows, n of them not padding.
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor


def why_not_megablocks(x_TD: Tensor) -> str | None:
    """Why gmm cannot run on this tensor, or None."""
    if not x_TD.is_cuda or x_TD.dtype != torch.bfloat16:
        return f"grouped_gemm.ops.gmm takes bfloat16 on CUDA, not {x_TD.dtype} on {x_TD.device.type}"
    if importlib.util.find_spec("grouped_gemm") is None:
        return "the package grouped_gemm is not installed (pip install git+https://github.com/tgale96/grouped_gemm, which compiles it)"
    return None


def grouped_mlp_megablocks(
    x_TD: Tensor, w_gate_up_EDF2: Tensor, w_down_EFD: Tensor, token_N: Tensor, weight_N: Tensor, expert_offsets: Tensor
) -> Tensor:
    """As `grouped_mlp`. The sum over a token's rows is an index_add in fp32, in no fixed order on a GPU."""
    from grouped_gemm import ops  # pyright: ignore[reportMissingImports]

    rows_E = expert_offsets.diff().to("cpu", torch.int64)
    token_n, weight_n1 = token_N[: int(rows_E.sum())], weight_N[: int(rows_E.sum()), None]
    # What gmm leaves in the gradient of an expert without rows is not documented: where() lets zero through instead.
    used_E11 = (expert_offsets.diff() > 0)[:, None, None]
    gate_up, down = (torch.where(used_E11, w.to(x_TD.dtype), 0.0).contiguous() for w in (w_gate_up_EDF2, w_down_EFD))
    gate_nF, up_nF = ops.gmm(x_TD.index_select(0, token_n), gate_up, rows_E).chunk(2, dim=-1)
    out_nD = ops.gmm(F.silu(gate_nF) * up_nF * weight_n1.to(x_TD.dtype), down, rows_E)
    sum_dtype = torch.promote_types(x_TD.dtype, torch.float32)
    y_TD = torch.zeros_like(x_TD, dtype=sum_dtype).index_add(0, token_n, out_nD.to(sum_dtype))
    return y_TD.to(x_TD.dtype)

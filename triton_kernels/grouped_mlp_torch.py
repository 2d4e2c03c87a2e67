"""Reference of the grouped gated MLP: a differentiable loop over experts that says what the operation is.

Legend: T tokens, D model width, E experts, F expert width, N assigned rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_mlp_reference(
    x_TD: Tensor, w_gate_up_EDF2: Tensor, w_down_EFD: Tensor, token_N: Tensor, weight_N: Tensor, expert_offsets: Tensor
) -> Tensor:
    """y_t = sum over rows n of token t of weight_n * W_down^T (SiLU(W_gate^T x_t) * (W_up^T x_t)). Arguments as in `grouped_mlp`.

    In any floating dtype, fp64 included; sums over a token's rows in fp32 or better.
    """
    bounds = expert_offsets.tolist()
    y_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
    # Unbound once: indexing the packed weights in the loop would make each backward step write a full-size gradient.
    for start, stop, w_gate_up_DF2, w_down_FD in zip(bounds, bounds[1:], w_gate_up_EDF2.unbind(), w_down_EFD.unbind()):
        rows = slice(start, stop)
        gate_up_NF2 = x_TD.index_select(0, token_N[rows]) @ w_gate_up_DF2.to(x_TD.dtype)
        gate_NF, up_NF = gate_up_NF2.chunk(2, dim=-1)
        out_ND = (F.silu(gate_NF) * up_NF) @ w_down_FD.to(x_TD.dtype)
        y_TD = y_TD.index_add(0, token_N[rows], out_ND * weight_N[rows, None].to(y_TD.dtype))
    return y_TD.to(x_TD.dtype)

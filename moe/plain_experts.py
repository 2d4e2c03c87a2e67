"""Experts with options that the grouped products do not know: biases, a clamped SwiGLU, no gate. Torch, expert by
expert.

Legend: T tokens, D model width, E experts, F expert width, N assigned rows, n rows of one expert.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.config import ClampedSwiGLU
from routing.assignments import Assignments


def plain_experts(
    x_TD: Tensor,
    w_gate_up_EDF2: Tensor,
    w_down_EFD: Tensor,
    rows: Assignments,
    *,
    b_gate_up_EF2: Tensor | None,
    b_down_ED: Tensor | None,
    clamped: ClampedSwiGLU | None,
    gated: bool,
) -> Tensor:
    """`moe.backends.compute_experts` with biases of both projections, each None for none, and another activation.

    Args:
        w_gate_up_EDF2: [E, D, 2F], the gate's columns first, or [E, D, F] without a gate.

    Returns:
        y_TD [T, D] in x's dtype; sums over a token's rows in fp32 or better. Differentiable in all tensors.
    """
    dtype, sum_dtype = x_TD.dtype, torch.promote_types(x_TD.dtype, torch.float32)
    offsets = rows.expert_offsets.tolist()
    # Taken apart once: indexing expert by expert would make a gradient of all experts for each of them.
    w_gate_ups, w_downs = w_gate_up_EDF2.unbind(), w_down_EFD.unbind()
    b_gate_ups = None if b_gate_up_EF2 is None else b_gate_up_EF2.unbind()
    b_downs = None if b_down_ED is None else b_down_ED.unbind()
    y_TD = torch.zeros_like(x_TD, dtype=sum_dtype)
    for e, (first, last) in enumerate(itertools.pairwise(offsets)):
        if first == last:
            continue
        token_n = rows.token_N[first:last]
        h_nF2 = x_TD.index_select(0, token_n) @ w_gate_ups[e].to(dtype)
        if b_gate_ups is not None:
            h_nF2 = h_nF2 + b_gate_ups[e].to(dtype)
        out_nD = activation(h_nF2, clamped, gated=gated) @ w_downs[e].to(dtype)
        if b_downs is not None:
            out_nD = out_nD + b_downs[e].to(dtype)
        y_TD = y_TD.index_add(0, token_n, out_nD.to(sum_dtype) * rows.weight_N[first:last, None].to(sum_dtype))
    return y_TD.to(dtype)


def activation(h_nF2: Tensor, clamped: ClampedSwiGLU | None = None, *, gated: bool = True) -> Tensor:
    """What an expert makes of its first projection, see `MoEConfig`: [n, F]."""
    if not gated:
        return F.relu(h_nF2).square()
    gate_nF, up_nF = h_nF2.chunk(2, dim=-1)
    if clamped is None:
        return F.silu(gate_nF) * up_nF
    gate_nF = gate_nF.clamp(max=clamped.limit)
    up_nF = up_nF.clamp(-clamped.limit, clamped.limit)
    return gate_nF * (clamped.slope * gate_nF).sigmoid() * (up_nF + 1)

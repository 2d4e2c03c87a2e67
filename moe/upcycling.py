"""Upcycling: a dense model's MLP becomes the experts, and the first forward is unchanged (arXiv 2212.05055;
fine-grained: arXiv 2410.07524).

The dense hidden width H is cut into G = H / F segments of one expert's width F; the E experts are E / G copies of all
segments. The G experts of one copy share one router row, so top-k with k a multiple of G always chooses whole copies.
Chosen weights sum to one, thus each segment counts 1 / G in total, which G in the down projection makes up for. Copies
part ways in training because they see different tokens.

Legend: D model width, E experts, F expert width, H dense hidden width.
"""

import torch
from torch import Tensor

from moe.layer import MoE
from routing.top_k import TopK


@torch.no_grad()
def upcycle(moe: MoE, w_gate_up_DH2: Tensor, w_down_HD: Tensor, generator: torch.Generator) -> None:
    """Overwrite the experts and the router of `moe` so that it computes the dense SwiGLU network, up to rounding.

    w_gate_up_DH2  [D, 2H], the gate's columns first; w_down_HD [H, D]
    generator      draws one router row per copy

    A shared expert is silenced. Raises ValueError if the widths do not divide, or if the router would not choose whole
    copies with weights that sum to one: it takes top-k without groups, k a multiple of H / F, renormalised, and no
    selection bias.
    """
    n_experts, d_expert, d_model = moe.experts.w_down_EFD.shape
    d_dense = w_down_HD.shape[0]
    if tuple(w_gate_up_DH2.shape) != (d_model, 2 * d_dense) or w_down_HD.shape[1] != d_model:
        raise ValueError(
            f"dense weights {tuple(w_gate_up_DH2.shape)} and {tuple(w_down_HD.shape)} do not fit [D, 2H] and [H, D]"
            f" with D = {d_model}"
        )
    n_segments = d_dense // d_expert
    if d_dense % d_expert or n_experts % n_segments:
        raise ValueError(
            f"dense width {d_dense} in segments of d_expert = {d_expert} does not divide evenly over n_experts ="
            f" {n_experts}"
        )
    policy = moe.config.router.policy
    if not (isinstance(policy, TopK) and policy.n_groups == 1 and policy.k % n_segments == 0):
        raise ValueError(
            f"upcycling in {n_segments} segments starts from TopK without groups, k a multiple of {n_segments}; the"
            f" policy is {policy}"
        )
    if not moe.config.router.renormalise:
        raise ValueError("upcycling needs RouterConfig.renormalise = True: the chosen weights must sum to one")
    n_copies = n_experts // n_segments
    gate_DGF, up_DGF = (half_DH.unflatten(-1, (n_segments, d_expert)) for half_DH in w_gate_up_DH2.chunk(2, dim=-1))
    gate_up_GDF2 = torch.cat([gate_DGF, up_DGF], dim=-1).transpose(0, 1)
    moe.experts.w_gate_up_EDF2.copy_(gate_up_GDF2.repeat(n_copies, 1, 1))
    moe.experts.w_down_EFD.copy_(w_down_HD.unflatten(0, (n_segments, d_expert)).repeat(n_copies, 1, 1) * n_segments)
    row_CD = torch.randn(n_copies, d_model, generator=generator, device=generator.device) * d_model**-0.5
    moe.router.weight_ED.copy_(row_CD.repeat_interleave(n_segments, dim=0))
    moe.router.selection_bias_E.zero_()
    if moe.shared_expert is not None:
        moe.shared_expert.w_down_FD.zero_()

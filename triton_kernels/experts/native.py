"""Routing for few tokens on a CPU, without gradients: `router_scores`, `sort_slots` and `grouped_mlp` as a decode step
needs them.

Legend: T tokens, D model width, E experts, F expert width, F2 = 2F, K slots per token, N assigned rows.
"""

import torch
from torch import Tensor

from triton_kernels.native.library import call, wide


def router_scores_native(
    logits_TE: Tensor,
    bias_E: Tensor,
    threshold: Tensor,
    *,
    k: int,
    rule: int,
    score: str,
    renormalise: bool,
    floor: int,
) -> tuple[Tensor, ...]:
    """The fields of `router_scores`' `Slots` by the rule's number; equal scores: the lower expert first."""
    T, E = logits_TE.shape
    weight_TK, level_TK = torch.empty(2, T, k).unbind()
    expert_TK, keep_TK = torch.empty(T, k, dtype=torch.int64), torch.empty(T, k, dtype=torch.bool)
    call(
        "route",
        *(wide(logits_TE), wide(bias_E), float(threshold)),
        *(weight_TK, expert_TK, keep_TK, level_TK, torch.empty(3, E)),
        *(T, E, k, floor),
        *(rule, score == "sigmoid", renormalise),
    )
    return weight_TK, expert_TK, keep_TK, level_TK


def sort_slots_native(
    expert_TK: Tensor, weight_TK: Tensor, keep_TK: Tensor | None, *, n_experts: int
) -> tuple[Tensor, ...]:
    """The fields of `sort_slots`' `Rows`, dropped slots taken out."""
    T, K = expert_TK.shape
    weight_N = torch.empty(T * K)
    token_N, expert_N, row_of_slot_N = torch.empty(3, T * K, dtype=torch.int64).unbind()
    expert_offsets, token_offsets = torch.empty(n_experts + T + 2, dtype=torch.int64).split([n_experts + 1, T + 1])
    n = call(
        "sort_slots",
        *(expert_TK.contiguous(), wide(weight_TK), None if keep_TK is None else keep_TK.contiguous()),
        *(weight_N, token_N, expert_N, expert_offsets, token_offsets, row_of_slot_N),
        *(T, K, n_experts),
    )
    weight_N, token_N, expert_N, row_of_slot_N = (x_N[:n] for x_N in (weight_N, token_N, expert_N, row_of_slot_N))
    return weight_N, token_N, expert_N, expert_offsets, token_offsets, row_of_slot_N


def grouped_mlp_native(
    x_TD: Tensor,
    w_gate_up_EDF2: Tensor,
    w_down_EFD: Tensor,
    token_N: Tensor,
    weight_N: Tensor,
    expert_offsets: Tensor,
    token_offsets: Tensor,
    row_of_slot_N: Tensor,
) -> Tensor:
    """`grouped_mlp` on checked arguments, in x's dtype: computed in fp32, by weights that are read where they lie if
    they are fp32 and dense.

    Raises:
        ValueError: for rows that no sort made.
    """
    (T, D), (E, F, _) = x_TD.shape, w_down_EFD.shape
    y_TD = torch.empty(T, D)
    call(
        "experts",
        *(wide(x_TD), wide(w_gate_up_EDF2), wide(w_down_EFD), token_N.contiguous(), wide(weight_N)),
        *(expert_offsets.contiguous(), token_offsets.contiguous(), row_of_slot_N.contiguous(), y_TD),
        *(T, len(token_N), E, D, F, torch.get_num_threads()),
    )
    return y_TD.to(x_TD.dtype)

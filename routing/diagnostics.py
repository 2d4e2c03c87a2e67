"""What one layer's router did, read from the assignments that were dispatched.

Legend: T tokens, E experts.
"""

import dataclasses

import torch
from torch import Tensor

from routing.assignments import Assignments


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingStatistics:
    """All tensors stay on the device until somebody looks.

    mean_experts    scalar; experts per token, physical rows counted
    histogram       (E+1) int64; how many tokens used 0, 1, ... E experts
    rows_per_expert (E) int64
    dead_experts    scalar int64; experts without a row
    max_load        scalar; rows of the busiest expert over the mean, 1 at perfect balance, 0 without rows
    entropy         scalar; mean entropy of the router's probabilities, nats
    margin          scalar; mean over tokens of the lowest probability chosen minus the highest one left out: how far a decision is from being
                    another one. Below 0 where a selection bias, groups or chance overrule the order; NaN if no token has both kinds
    """

    mean_experts: Tensor
    histogram: Tensor
    rows_per_expert: Tensor
    dead_experts: Tensor
    max_load: Tensor
    entropy: Tensor
    margin: Tensor


def routing_statistics(assignments: Assignments, probs_TE: Tensor) -> RoutingStatistics:
    experts_T = assignments.experts_per_token_T()
    rows_E = assignments.rows_per_expert_E()
    n_experts, n_tokens = assignments.n_experts, max(assignments.n_tokens, 1)
    n_rows = rows_E.sum()
    # scatter_add of ones into integers: like bincount, but it never asks the device for its size.
    histogram = torch.zeros(n_experts + 1, dtype=torch.int64, device=experts_T.device).scatter_add_(0, experts_T, torch.ones_like(experts_T))
    probs_TE = probs_TE.detach()
    entropy_T = torch.special.entr(probs_TE).sum(dim=-1)
    return RoutingStatistics(
        mean_experts=n_rows / n_tokens,
        histogram=histogram,
        rows_per_expert=rows_E,
        dead_experts=(rows_E == 0).sum(),
        max_load=rows_E.max() * n_experts / n_rows.clamp_min(1),
        entropy=entropy_T.sum() / n_tokens,
        margin=_margin(assignments, probs_TE),
    )


def _margin(assignments: Assignments, probs_TE: Tensor) -> Tensor:
    # Padding rows are written to one expert more than there is, so that nothing here waits for the device.
    n_rows, n_experts = assignments.token_N.shape[0], assignments.n_experts
    real_N = torch.arange(n_rows, device=probs_TE.device) < assignments.expert_offsets[-1]
    chosen = torch.zeros(probs_TE.shape[0], n_experts + 1, dtype=torch.bool, device=probs_TE.device)
    chosen[assignments.token_N, torch.where(real_N, assignments.expert_N, n_experts)] = True
    chosen_TE = chosen[:, :n_experts]
    margin_T = probs_TE.masked_fill(~chosen_TE, torch.inf).amin(dim=-1) - probs_TE.masked_fill(chosen_TE, -torch.inf).amax(dim=-1)
    return margin_T.masked_fill(margin_T.isinf(), torch.nan).nanmean()

"""What one layer's router did, read from the assignments that were dispatched.

Legend: T tokens, E experts.
"""

import dataclasses

import torch
from torch import Tensor

from routing.assignments import Assignments


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingStatistics:
    """Counts and sums over tokens, so that those of parts of a batch add up to those of the whole; what is read off
    them are properties.

    All tensors stay on the device until somebody looks.

    Attributes:
        histogram: int64 [E+1]; how many tokens used 0, 1, ... E experts, physical rows counted.
        rows_per_expert: int64 [E].
        entropy_sum: scalar; entropy of the router's probabilities, nats.
        margin_sum: scalar; lowest probability chosen minus the highest one left out: how far a decision is from being
            another one. Below 0 where a selection bias, groups or chance overrule the order.
        margin_tokens: scalar int64; tokens that have both kinds.
    """

    histogram: Tensor
    rows_per_expert: Tensor
    entropy_sum: Tensor
    margin_sum: Tensor
    margin_tokens: Tensor

    @property
    def mean_experts(self) -> Tensor:
        """Experts per token."""
        return self.rows_per_expert.sum() / self.histogram.sum().clamp_min(1)

    @property
    def dead_experts(self) -> Tensor:
        """Experts without a row."""
        return (self.rows_per_expert == 0).sum()

    @property
    def max_load(self) -> Tensor:
        """Rows of the busiest expert over the mean, 1 at perfect balance, 0 without rows."""
        return self.rows_per_expert.max() * len(self.rows_per_expert) / self.rows_per_expert.sum().clamp_min(1)

    @property
    def entropy(self) -> Tensor:
        """Mean over tokens, nats."""
        return self.entropy_sum / self.histogram.sum().clamp_min(1)

    @property
    def margin(self) -> Tensor:
        """Mean over the tokens that have one; NaN if none has."""
        return self.margin_sum / self.margin_tokens

    def to_vector(self) -> Tensor:
        """All counts and sums, fp64 [2E + 4]: what can be added over processes in one message."""
        parts = (
            self.histogram,
            self.rows_per_expert,
            self.entropy_sum[None],
            self.margin_sum[None],
            self.margin_tokens[None],
        )
        return torch.cat([part.double() for part in parts])

    @classmethod
    def from_vector(cls, vector: Tensor) -> "RoutingStatistics":
        """Inverse of `to_vector`, in fp64."""
        n_experts = (len(vector) - 4) // 2
        histogram, rows_per_expert, rest = vector.split([n_experts + 1, n_experts, 3])
        entropy_sum, margin_sum, margin_tokens = rest.unbind()
        return cls(
            histogram=histogram,
            rows_per_expert=rows_per_expert,
            entropy_sum=entropy_sum,
            margin_sum=margin_sum,
            margin_tokens=margin_tokens,
        )


def routing_statistics(assignments: Assignments, probs_TE: Tensor) -> RoutingStatistics:
    """What one forward's assignments and probabilities (softmax over real experts) say; nothing waits for the
    device."""
    experts_T = assignments.experts_per_token_T()
    # scatter_add of ones into integers: like bincount, but it never asks the device for its size.
    histogram = torch.zeros(assignments.n_experts + 1, dtype=torch.int64, device=experts_T.device)
    probs_TE = probs_TE.detach()
    margin_T = _margin(assignments, probs_TE)
    return RoutingStatistics(
        histogram=histogram.scatter_add_(0, experts_T, torch.ones_like(experts_T)),
        rows_per_expert=assignments.rows_per_expert_E(),
        entropy_sum=torch.special.entr(probs_TE).sum(),
        margin_sum=margin_T.nansum(),
        margin_tokens=(~margin_T.isnan()).sum(),
    )


def _margin(assignments: Assignments, probs_TE: Tensor) -> Tensor:
    """margin_T; NaN for a token without experts, or with all of them."""
    # Padding rows are written to one expert more than there is, so that nothing here waits for the device.
    n_rows, n_experts = assignments.token_N.shape[0], assignments.n_experts
    real_N = torch.arange(n_rows, device=probs_TE.device) < assignments.expert_offsets[-1]
    chosen = torch.zeros(probs_TE.shape[0], n_experts + 1, dtype=torch.bool, device=probs_TE.device)
    chosen[assignments.token_N, torch.where(real_N, assignments.expert_N, n_experts)] = True
    chosen_TE = chosen[:, :n_experts]
    margin_T = probs_TE.masked_fill(~chosen_TE, torch.inf).amin(dim=-1) - probs_TE.masked_fill(
        chosen_TE, -torch.inf
    ).amax(dim=-1)
    return margin_T.masked_fill(margin_T.isinf(), torch.nan)

"""Assignments: the one data type between a router and the experts, for every routing method.

Legend: T tokens, K slots per token, E experts, N assigned rows (token-expert pairs).
"""

import dataclasses

import torch
from torch import Tensor

from triton_kernels.experts.expert_slots import sort_slots


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assignments:
    """Which experts compute which tokens, and how much each result weighs.

    Rows are sorted by expert, then token. Row n says: expert `expert_N[n]` computes token `token_N[n]`, whose output
    counts `weight_N[n]`. A token may have no row at all, and so may an expert.

    Rows from `expert_offsets[E]` on are padding, of weight zero, and belong to nobody. There are none on the CPU; on a
    GPU the number of kept slots is known to the device only, so N is its upper bound T * K and nothing here waits for
    the device.

    Attributes:
        token_N: int64; the token of each row.
        expert_N: int64; the expert of each row.
        weight_N: floating point, carries the router's gradient.
        expert_offsets: int64 [E+1]; the rows of expert e are [expert_offsets[e], expert_offsets[e + 1]).
        token_offsets: int64 [T+1]; the rows of token t are row_of_slot_N[token_offsets[t] : token_offsets[t + 1]], best
            slot first, so that the combine can add them in a fixed order without atomics.
        row_of_slot_N: int64.
    """

    token_N: Tensor
    expert_N: Tensor
    weight_N: Tensor
    expert_offsets: Tensor
    token_offsets: Tensor
    row_of_slot_N: Tensor

    @property
    def n_tokens(self) -> int:
        return self.token_offsets.shape[0] - 1

    @property
    def n_experts(self) -> int:
        return self.expert_offsets.shape[0] - 1

    def experts_per_token_T(self) -> Tensor:
        """Number of rows of each token, int64."""
        return self.token_offsets.diff()

    def rows_per_expert_E(self) -> Tensor:
        """Number of rows of each expert, int64."""
        return self.expert_offsets.diff()

    @staticmethod
    def from_rows(
        token_N: Tensor, expert_N: Tensor, weight_N: Tensor, *, n_tokens: int, n_experts: int
    ) -> "Assignments":
        """Sort rows that come in any order, each a different pair of token and expert. A token's slots are then in the
        order of its experts.

        Args:
            token_N: int64, in [0, n_tokens).
            expert_N: int64, in [0, n_experts).
            weight_N: floating point.
        """
        order_N = torch.argsort(token_N, stable=True)
        order_N = order_N[torch.argsort(expert_N[order_N], stable=True)]
        token_N, expert_N = token_N[order_N], expert_N[order_N]
        bounds_T = torch.arange(n_tokens + 1, device=token_N.device)
        sorted_token_N, row_of_slot_N = torch.sort(token_N, stable=True)
        return Assignments(
            token_N=token_N,
            expert_N=expert_N,
            weight_N=weight_N.index_select(0, order_N),
            expert_offsets=torch.searchsorted(expert_N, torch.arange(n_experts + 1, device=expert_N.device)),
            token_offsets=torch.searchsorted(sorted_token_N, bounds_T),
            row_of_slot_N=row_of_slot_N,
        )

    @staticmethod
    def from_slots(
        expert_TK: Tensor,
        weight_TK: Tensor,
        keep_TK: Tensor | None = None,
        *,
        n_experts: int,
        padded: bool | None = None,
    ) -> "Assignments":
        """Sort the slots that a routing policy filled.

        Args:
            expert_TK: integers in [0, n_experts); what a dropped slot holds does not matter.
            weight_TK: floating point.
            keep_TK: bool, or None to keep every slot.
            padded: leave dropped slots as padding rows behind the last expert (True; the default on a GPU, where
                counting them would make the host wait) or take them out (False; the default on the CPU).
        """
        rows = sort_slots(expert_TK, weight_TK, keep_TK, n_experts=n_experts, padded=padded)
        return Assignments(**rows._asdict())

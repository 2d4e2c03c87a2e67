"""Assignments: the one data type between a router and the experts, for every routing method.

Legend: T tokens, K slots per token, E experts, N assigned rows (token-expert pairs).
"""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assignments:
    """Which experts compute which tokens, and how much each result weighs.

    Rows are sorted by expert, then token. Row n says: expert `expert_N[n]` computes token `token_N[n]`, whose output counts `weight_N[n]`.
    A token may have no row at all, and so may an expert.

    token_N, expert_N      int64; the rows
    weight_N               floating point, carries the router's gradient
    expert_offsets (E+1)   int64; the rows of expert e are [expert_offsets[e], expert_offsets[e + 1])
    token_offsets (T+1)    int64; the rows of token t are row_of_slot_N[token_offsets[t] : token_offsets[t + 1]], best slot first,
                           so that the combine can add them in a fixed order without atomics
    row_of_slot_N          int64

    Rows from `expert_offsets[E]` on are padding, of weight zero, and belong to nobody. There are none on the CPU; on a GPU the number of kept
    slots is known to the device only, so N is its upper bound T * K and nothing here waits for the device.
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
    def from_rows(token_N: Tensor, expert_N: Tensor, weight_N: Tensor, *, n_tokens: int, n_experts: int) -> "Assignments":
        """Sort rows that come in any order, each a different pair of token and expert. A token's slots are then in the order of its experts.

        token_N, expert_N  int64; weight_N floating point
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
        expert_TK: Tensor, weight_TK: Tensor, keep_TK: Tensor | None = None, *, n_experts: int, padded: bool | None = None
    ) -> "Assignments":
        """Sort the slots that a routing policy filled.

        expert_TK  integers in [0, n_experts); what a dropped slot holds does not matter
        weight_TK  floating point
        keep_TK    bool, or None to keep every slot
        padded     leave dropped slots as padding rows behind the last expert (True; the default on a GPU, where counting them would make the
                   host wait) or take them out (False; the default on the CPU)
        """
        if expert_TK.shape != weight_TK.shape or (keep_TK is not None and keep_TK.shape != expert_TK.shape):
            shapes = f"experts {tuple(expert_TK.shape)}, weights {tuple(weight_TK.shape)}, keep {None if keep_TK is None else tuple(keep_TK.shape)}"
            raise ValueError(f"slots must have one shape [T, K], got {shapes}")
        n_tokens, n_slots = expert_TK.shape
        if padded is None:
            padded = expert_TK.device.type != "cpu"
        # Dropped slots sort behind every expert. A stable sort of slots that lie in token order leaves each expert's rows in token order.
        # int16 because torch's radix sort on the CPU is several times faster on narrow integers.
        bucket_TK = expert_TK if keep_TK is None else expert_TK.masked_fill(~keep_TK, n_experts)
        bucket_N = bucket_TK.reshape(-1).to(torch.int16 if n_experts < 2**15 else torch.int32)
        expert_N, slot_of_row_N = torch.sort(bucket_N, stable=True)
        row_of_slot_N = torch.empty_like(slot_of_row_N)
        row_of_slot_N[slot_of_row_N] = torch.arange(n_tokens * n_slots, device=slot_of_row_N.device)
        bounds = torch.arange(n_experts + 1, device=expert_N.device, dtype=expert_N.dtype)
        expert_offsets = torch.searchsorted(expert_N, bounds)
        if keep_TK is None:
            token_offsets = torch.arange(n_tokens + 1, device=expert_TK.device) * n_slots
        else:
            kept_N = keep_TK.reshape(-1)
            token_offsets = torch.nn.functional.pad(keep_TK.sum(dim=1).cumsum(dim=0), (1, 0))
            if padded:
                # Kept slots first, each group in its old order: a compaction whose size the host need not know.
                row_of_slot_N = row_of_slot_N[torch.sort((~kept_N).to(torch.uint8), stable=True)[1]]
                weight_TK = weight_TK.masked_fill(~keep_TK, 0.0)
            else:
                row_of_slot_N = row_of_slot_N[kept_N]
                n_rows = row_of_slot_N.shape[0]
                expert_N, slot_of_row_N = expert_N[:n_rows], slot_of_row_N[:n_rows]
        return Assignments(
            token_N=slot_of_row_N // max(n_slots, 1),
            expert_N=expert_N.to(torch.int64),
            weight_N=weight_TK.reshape(-1).index_select(0, slot_of_row_N),
            expert_offsets=expert_offsets,
            token_offsets=token_offsets,
            row_of_slot_N=row_of_slot_N,
        )

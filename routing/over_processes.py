"""Statistics over processes: what every router counted in a step becomes what all processes counted together.

Called between the optimizer's step and `Router.after_step`, it makes loads, selection biases, coefficients and
thresholds those of one process on the whole batch (balance over the global batch: Qiu et al., arXiv 2501.11873), on
every process alike. Counts are added in one message. A threshold is a quantile, which no sum of quantiles gives: the
k-th smallest level is found by its bits, eight at a time from the highest, from counts of the levels that share the
bits known so far. Four messages, exact, whatever the number of levels and wherever they lie.

Legend: E experts, L budgets.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from routing.router import Router

DIGIT_BITS, N_DIGITS = 8, 4


@torch.no_grad()
def count_over_processes(routers: Sequence[Router], group: dist.ProcessGroup) -> None:
    """Replaces the step's counts of `routers` by their sums over `group`, and gives budgets the exact threshold of all
    processes' levels.

    All processes of the group call it with the same layers.

    Args:
        routers: those of the layers that train. A process may have had no tokens, as long as another one had some.
        group: what the counts are added over.
    """
    counts = torch.cat([torch.cat([router.step_rows_E, router.step_tokens[None]]) for router in routers])
    dist.all_reduce(counts, group=group)
    for router, total in zip(routers, counts.split([router.n_experts + 1 for router in routers])):
        router.step_rows_E.copy_(total[:-1])
        router.step_tokens.copy_(total[-1])
    budgeted = [
        (router, budget)
        for router in routers
        if (budget := router.policy.budget) is not None and budget.target_mean is not None
    ]
    if not budgeted:
        return
    levels = [
        torch.cat([counts.new_empty(0), *(level_TK.flatten() for level_TK in budget.step_levels)])
        for _, budget in budgeted
    ]
    aims_L = torch.stack([budget.aim for _, budget in budgeted]).double()
    tokens_L = torch.stack([router.step_tokens for router, _ in budgeted])
    exact_L = kth_smallest_over_processes(levels, (aims_L * tokens_L).round().to(torch.int64), group)
    for (_, budget), exact in zip(budgeted, exact_L):
        budget.step_exact = exact


def kth_smallest_over_processes(values: Sequence[Tensor], k_L: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The k_L[l]-th smallest of all processes' values[l].

    Args:
        values: this process's, as many as it likes of each of the L kinds, read as fp32.
        k_L: int64, at most the number of all processes' values; the same on every process.

    Returns:
        fp32 [L]; -inf where k_L[l] is 0.
    """
    keys = [_ordered_bits(value) for value in values]
    prefix_L, rank_L = torch.zeros_like(k_L), k_L.clamp_min(1)
    for digit in reversed(range(N_DIGITS)):
        low = DIGIT_BITS * digit
        histogram_LB = torch.zeros(len(keys), 1 << DIGIT_BITS, dtype=torch.int64, device=k_L.device)
        for index, key in enumerate(keys):
            known = key >> low + DIGIT_BITS == prefix_L[index]
            histogram_LB[index].scatter_add_(0, key >> low & (1 << DIGIT_BITS) - 1, known.to(torch.int64))
        dist.all_reduce(histogram_LB, group=group)
        below_LB = histogram_LB.cumsum(dim=1) - histogram_LB
        # The last digit with fewer values below it than the rank asks for, among those that occur.
        found_L = ((below_LB < rank_L[:, None]) & (histogram_LB > 0)).int().cumsum(dim=1).argmax(dim=1)
        rank_L = rank_L - below_LB.gather(1, found_L[:, None])[:, 0]
        prefix_L = prefix_L << DIGIT_BITS | found_L
    return torch.where(k_L > 0, _from_ordered_bits(prefix_L), -torch.inf)


def _ordered_bits(values: Tensor) -> Tensor:
    """int64 in [0, 2^32) in the order of the values as fp32: sign bit flipped, and all others too in negative
    numbers."""
    bits = values.to(torch.float32).view(torch.int32).to(torch.int64)
    return torch.where(bits < 0, ~bits, bits + (1 << 31))


def _from_ordered_bits(key: Tensor) -> Tensor:
    bits = torch.where(key < 1 << 31, ~key, key - (1 << 31))
    return bits.to(torch.int32).view(torch.float32)

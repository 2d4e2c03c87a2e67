"""Balance and z losses, from the load of dispatched assignments.

The Switch loss multiplies each expert's share of the rows by its mean probability. Computed per micro-batch, that
product would change with the way a batch is cut up. So the router multiplies by the load of the *previous* step,
counted over all its forwards: the loss is then linear in the current probabilities, its mean over micro-batches (or
processes) equals its value on the whole batch exactly, and a forward that is recomputed for backward gives the same
number again. The price is a load that is one step old.

Legend: T tokens, E experts.
"""

import dataclasses

import torch
from torch import Tensor


def switch_balance_loss(rows_E: Tensor, probs_TE: Tensor) -> Tensor:
    """E * sum_e f_e P_e (Fedus et al., arXiv 2101.03961, eq. 4), with f_e = rows_E / sum(rows_E) and P_e the mean
    probability of expert e.

    Args:
        rows_E: rows dispatched to each expert, any real dtype, not differentiated; no rows at all count as an even
            load.
        probs_TE: softmax over experts. A softmax is unchanged when all logits shift together, so the loss cannot be
            lowered by shrinking scores, and its gradient E * f_e / T with respect to each probability is finite
            everywhere, perfect balance included.

    Returns:
        A scalar of probs_TE's dtype: 1 at an even load or even probabilities; at most E.
    """
    n_experts = rows_E.shape[0]
    total = rows_E.sum()
    share_E = torch.where(total > 0, rows_E / total.clamp_min(1), 1.0 / n_experts).to(probs_TE.dtype)
    return n_experts * (share_E * mean_over_tokens(probs_TE)).sum()


def z_loss(logits_TE: Tensor) -> Tensor:
    """mean_t logsumexp(logits)^2 (Zoph et al., arXiv 2202.08906, eq. 5): keeps router logits small. 0 for no tokens."""
    return mean_over_tokens(torch.logsumexp(logits_TE, dim=-1).square())


def mean_over_tokens(values: Tensor) -> Tensor:
    """Mean over the first dimension, 0 rather than NaN for an empty one."""
    return values.sum(dim=0) / max(values.shape[0], 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThreeLevelBalance:
    """Balance over experts, over groups of them, and over partitions of the groups.

    Attributes:
        n_groups: groups of consecutive experts, the devices of expert parallelism.
        n_partitions: parts of each group.
        expert_coefficient: of the loss over experts; this one and the next two default to Yi-Lightning's.
        group_coefficient: of the loss over groups.
        partition_coefficient: of the loss over partitions.
    """

    n_groups: int = 8
    n_partitions: int = 2
    expert_coefficient: float = 1e-6
    group_coefficient: float = 1e-4
    partition_coefficient: float = 1e-3


def three_level_balance_loss(config: ThreeLevelBalance, rows_E: Tensor, probs_TE: Tensor) -> Tensor:
    """Yi-Lightning's L_ST + L_EP + L_PEP (arXiv 2412.01253): coefficient * n * sum_i f_i P_i over the n experts, groups
    and partitions.

    f and P of a group are the sums over its experts.

    Args:
        rows_E: as for `switch_balance_loss`.
        probs_TE: likewise.

    Returns:
        A scalar; the sum of the coefficients at an even load.

    Raises:
        ValueError: if the experts cannot be divided evenly.
    """
    n_experts, n_groups, n_partitions = rows_E.shape[0], config.n_groups, config.n_partitions
    if n_groups < 1 or n_partitions < 1 or n_experts % (n_groups * n_partitions):
        raise ValueError(
            f"n_experts = {n_experts} cannot be divided into n_groups = {n_groups} groups of n_partitions ="
            f" {n_partitions} partitions"
        )
    loss = config.expert_coefficient * switch_balance_loss(rows_E, probs_TE)
    for coefficient, n_parts in (
        (config.group_coefficient, n_groups),
        (config.partition_coefficient, n_groups * n_partitions),
    ):
        rows_P, probs_TP = (
            rows_E.unflatten(0, (n_parts, -1)).sum(dim=-1),
            probs_TE.unflatten(-1, (n_parts, -1)).sum(dim=-1),
        )
        loss = loss + coefficient * switch_balance_loss(rows_P, probs_TP)
    return loss

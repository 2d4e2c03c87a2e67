"""Balance and z losses, from the load of dispatched assignments.

The Switch loss multiplies each expert's share of the rows by its mean probability. Computed per micro-batch, that product would change with
the way a batch is cut up. So the router multiplies by the load of the *previous* step, counted over all its forwards: the loss is then linear
in the current probabilities, its mean over micro-batches (or processes) equals its value on the whole batch exactly, and a forward that is
recomputed for backward gives the same number again. The price is a load that is one step old.

Legend: T tokens, E experts.
"""

import torch
from torch import Tensor


def switch_balance_loss(rows_E: Tensor, probs_TE: Tensor) -> Tensor:
    """E * sum_e f_e P_e (Fedus et al., arXiv 2101.03961, eq. 4), with f_e = rows_E / sum(rows_E) and P_e the mean probability of expert e.

    rows_E    rows dispatched to each expert, any real dtype, not differentiated; no rows at all count as an even load
    probs_TE  softmax over experts. A softmax is unchanged when all logits shift together, so the loss cannot be lowered by shrinking scores,
              and its gradient E * f_e / T with respect to each probability is finite everywhere, perfect balance included.

    1 at an even load or even probabilities; at most E.
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

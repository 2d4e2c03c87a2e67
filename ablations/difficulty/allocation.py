"""Allocation regret: what share of the possible gain a method's allocation takes, at the same total of experts.

From the losses of every token with k experts forced on all tokens, for a grid of k: 0 is what the same number for every
token gives, 1 what an oracle reaches that knows each token's losses, and shuffled allocations lie below 0. The oracle
also knows each token's luck, which nothing can learn; `by_difficulty` is therefore an allocation that only knows the
loss of another model: it gives each of `GROUPS` groups of tokens (by that loss) one number of experts, chosen on one
half of the documents and counted on the other.

Legend: N tokens, K forced numbers of experts, G groups.
"""

import numpy as np

GROUPS = 20


def loss_at(loss_NK: np.ndarray, ks: np.ndarray, experts_N: np.ndarray) -> np.ndarray:
    """Each token's loss at its own, possibly fractional, number of experts: linear between the forced ones, clipped to
    their range; [N]."""
    experts_N = np.clip(experts_N, ks[0], ks[-1])
    upper_N = np.clip(np.searchsorted(ks, experts_N), 1, len(ks) - 1)
    share_N = (experts_N - ks[upper_N - 1]) / (ks[upper_N] - ks[upper_N - 1])
    rows = np.arange(len(experts_N))
    return loss_NK[rows, upper_N - 1] * (1 - share_N) + loss_NK[rows, upper_N] * share_N


def best_allocation(loss_NK: np.ndarray, ks: np.ndarray, mean: float, weight_N: np.ndarray | None = None) -> np.ndarray:
    """The experts_N that minimise the weighted sum of losses at a mean of `mean` experts.

    Tokens trade at one price per expert: each takes the k that minimises its loss plus price x k, and the price is
    found by bisection. Between the two prices that enclose the budget the allocations are mixed, which is where a
    fractional number comes from.

    Raises:
        ValueError: where the mean lies outside the forced numbers.
    """
    if not ks[0] <= mean <= ks[-1]:
        raise ValueError(f"a mean of {mean} experts lies outside the forced numbers {ks[0]} to {ks[-1]}")
    weight_N = np.ones(len(loss_NK)) if weight_N is None else weight_N

    def at(price: float) -> np.ndarray:
        return ks[np.argmin(loss_NK + price * ks, axis=1)].astype(float)

    def mean_of(experts_N: np.ndarray) -> float:
        return float(np.average(experts_N, weights=weight_N))

    bound = float(np.ptp(loss_NK, axis=1).max()) / float(np.diff(ks).min()) + 1.0
    cheap, dear = -bound, bound
    for _ in range(100):
        middle = (cheap + dear) / 2
        if mean_of(at(middle)) > mean:
            cheap = middle
        else:
            dear = middle
    many_N, few_N = at(cheap), at(dear)
    share = (mean - mean_of(few_N)) / max(mean_of(many_N) - mean_of(few_N), 1e-12)
    # Mixing the two allocations by tokens would have to choose among tokens; mixing every token's number is the same to
    # first order.
    return few_N + np.clip(share, 0.0, 1.0) * (many_N - few_N)


def by_difficulty(
    loss_NK: np.ndarray, ks: np.ndarray, mean: float, difficulty_N: np.ndarray, document_N: np.ndarray
) -> np.ndarray:
    """Experts per token, chosen for groups of like difficulty on the other half of the documents; [N]."""
    edges = np.unique(np.quantile(difficulty_N, np.linspace(0, 1, GROUPS + 1)[1:-1]))
    _, group_N = np.unique(np.searchsorted(edges, difficulty_N), return_inverse=True)
    experts_N = np.zeros(len(loss_NK))
    for half in (0, 1):
        here_N = document_N % 2 == half
        size_G = np.bincount(group_N[~here_N], minlength=group_N.max() + 1)
        # A group that the other half lacks has nothing to choose by and nearly no tokens: a flat curve, hence few
        # experts.
        curve_GK = np.stack(
            [np.bincount(group_N[~here_N], weights=column[~here_N], minlength=len(size_G)) for column in loss_NK.T],
            axis=1,
        )
        curve_GK /= np.maximum(size_G, 1)[:, None]
        experts_N[here_N] = best_allocation(curve_GK, ks, mean, size_G.astype(float))[group_N[here_N]]
    return experts_N

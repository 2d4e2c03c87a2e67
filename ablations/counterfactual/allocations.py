"""Numbers of experts for every token and layer, all with the same total: what a policy's own choice is compared with.

`even` knows nothing of a token. Three shuffles keep the policy's histogram and destroy something else each. Allocations
by gains hand the experts out in the order of what each more of them gains, one grid step after the other.

Legend: N counted tokens, L layers, K numbers of experts of a grid, S = K - 1 steps between them.
"""

import numpy as np

# An allocation's numbers of experts, int64 [N, L].
Counts = np.ndarray


def even(n_tokens: int, totals_L: np.ndarray) -> Counts:
    """As nearly the same number for every token as whole numbers allow: what does not divide is spread over the text at
    equal distances, in each layer at other places.

    Args:
        totals_L: experts of each layer, over all tokens; int64.
    """
    columns = []
    for layer, total in enumerate(totals_L.tolist()):
        column_N = np.diff(np.arange(n_tokens + 1) * total // n_tokens)
        columns.append(np.roll(column_N, layer * n_tokens // len(totals_L)))
    return np.stack(columns, axis=1)


def same_in_every_layer(total: int, n_layers: int) -> np.ndarray:
    """A total split over layers as evenly as whole numbers allow, int64 [L]."""
    return np.diff(np.arange(n_layers + 1) * total // n_layers)


def shuffled_by_layer(counts_NL: Counts, seed: int) -> Counts:
    """Each layer's numbers dealt out among all tokens, layer by layer: keeps each layer's histogram, and not whether a
    token that gets many in one layer does in the others."""
    generator = np.random.default_rng(seed)
    return np.stack([generator.permutation(column_N) for column_N in counts_NL.T], axis=1)


def shuffled_by_token(counts_NL: Counts, seed: int) -> Counts:
    """Tokens exchange their numbers of all layers: keeps how layers go together, and not which token it is."""
    return np.random.default_rng(seed).permutation(counts_NL)


def shuffled_in_documents(counts_NL: Counts, document_N: np.ndarray, seed: int) -> Counts:
    """As `shuffled_by_token` among tokens of one document: keeps what each document gets."""
    generator = np.random.default_rng(seed)
    order_N = np.lexsort((generator.random(len(document_N)), document_N))
    place_N = np.argsort(document_N, kind="stable")
    dealt_NL = np.empty_like(counts_NL)
    dealt_NL[place_N] = counts_NL[order_N]
    return dealt_NL


def by_rank(counts_NL: Counts, value_N: np.ndarray) -> Counts:
    """The same numbers, layer by layer, the most to the tokens of the highest value (frequency: minus its logarithm);
    equal values in the order of the text."""
    order_N = np.argsort(-value_N, kind="stable")
    ranked_NL = np.empty_like(counts_NL)
    ranked_NL[order_N] = -np.sort(-counts_NL, axis=0)
    return ranked_NL


def greedy_priority(gain_IK: np.ndarray, ks: np.ndarray) -> np.ndarray:
    """The price per expert at which each step of the grid is bought by who looks one step ahead: behind a step that
    gains little, a step that gains much comes as late as the first; [I, S].

    Args:
        gain_IK: what each of I takers gains with each number, against any one number.
        ks: the numbers, ascending.
    """
    return np.minimum.accumulate(np.diff(gain_IK, axis=1) / np.diff(ks), axis=1)


def best_priority(gain_IK: np.ndarray, ks: np.ndarray) -> np.ndarray:
    """The price per expert at which each step is bought by who sees the whole curve: the slopes of its concave hull.
    Handing out by them is the optimum of the sum of gains at the total; arguments as there."""
    n_takers, n_ks = gain_IK.shape
    hull_IS = np.zeros((n_takers, n_ks - 1))
    at_I, rows = np.zeros(n_takers, dtype=np.int64), np.arange(n_takers)
    for _ in range(n_ks - 1):
        # From where each taker stands, the steepest way to any later number; the farthest where several are.
        width_IK = ks[None] - ks[at_I][:, None]
        ahead_IK = width_IK > 0
        slope_IK = np.where(
            ahead_IK, (gain_IK - gain_IK[rows, at_I][:, None]) / np.where(ahead_IK, width_IK, 1), -np.inf
        )
        slope_I = slope_IK.max(axis=1)
        next_I = n_ks - 1 - np.argmax(slope_IK[:, ::-1] == slope_I[:, None], axis=1)
        walking_I = at_I < n_ks - 1
        step = np.arange(n_ks - 1)
        covered_IS = walking_I[:, None] & (step >= at_I[:, None]) & (step < next_I[:, None])
        hull_IS[covered_IS] = np.broadcast_to(slope_I[:, None], hull_IS.shape)[covered_IS]
        at_I = np.where(walking_I, next_I, at_I)
    return hull_IS


def hand_out(priority_NLS: np.ndarray, ks: np.ndarray, total: int) -> Counts:
    """Everybody gets the least number; then steps are bought in the order of their priority until the total is spent,
    to the last expert: one taker may end between two numbers of the grid.

    Args:
        priority_NLS: not rising along the grid, see `best_priority`.

    Raises:
        ValueError: for a total that the grid cannot hold.
    """
    n_takers, widths_S = priority_NLS.shape[0] * priority_NLS.shape[1], np.diff(ks)
    if not n_takers * ks[0] <= total <= n_takers * ks[-1]:
        raise ValueError(
            f"{total / n_takers:g} experts per token and layer lie outside the numbers that are forced, {ks[0]} to"
            f" {ks[-1]}"
        )
    n_steps = len(widths_S)
    flat_I = priority_NLS.reshape(-1)
    taker_I = np.repeat(np.arange(n_takers), n_steps)
    # A taker's steps of one price stay together and in order.
    order_I = np.lexsort((np.tile(np.arange(n_steps), n_takers), taker_I, -flat_I))
    bought_I = np.cumsum(np.tile(widths_S, n_takers)[order_I])
    left = total - n_takers * int(ks[0])
    n_whole = int(np.searchsorted(bought_I, left, side="right"))
    counts = np.full(n_takers, ks[0], dtype=np.int64)
    np.add.at(counts, taker_I[order_I[:n_whole]], np.tile(widths_S, n_takers)[order_I[:n_whole]])
    if n_whole < len(order_I):
        counts[taker_I[order_I[n_whole]]] += left - (int(bought_I[n_whole - 1]) if n_whole else 0)
    return counts.reshape(priority_NLS.shape[:2])


def by_gains(gain_NLK: np.ndarray, ks: np.ndarray, total: int, *, greedy: bool = False) -> Counts:
    """The allocation that gains make: the best one, or that of who looks one step ahead.

    Args:
        gain_NLK: nats that each token gains with each number in each layer.
    """
    n_tokens, n_layers, n_ks = gain_NLK.shape
    priority = greedy_priority if greedy else best_priority
    return hand_out(priority(gain_NLK.reshape(-1, n_ks), ks).reshape(n_tokens, n_layers, n_ks - 1), ks, total)

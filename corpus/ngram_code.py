"""What an n-gram model makes of a sequence of symbols that it learns as it goes: the length of a real code.

Prediction by partial matching (Cleary and Witten 1984), interpolated: of a symbol that came c times behind the last k
symbols, which came n times with T different ones behind them,

    p_k = (max(c - d, 0) + d T p_(k-1)) / n,   p_(k-1) where n is 0,   p_(-1) = 1 / alphabet,

from k = `order` down; before the first symbol stand zeros. A shorter context counts a symbol only where it was new
behind the longer one, as Kneser and Ney (1995) count and as PPM updates. Probabilities depend on what came before alone
and sum to one, so an arithmetic coder takes -log2 p bits, and a decoder can follow.

All counts come from sorting, not from a table that grows: one sort an order, by context, symbol and time.

Legend: N symbols, M symbols with the padding before them.
"""

from dataclasses import dataclass

import numpy as np

DISCOUNT = 0.75


@dataclass(frozen=True)
class _Level:
    """Symbols in two orders, time within each: by context, and by context and symbol; and where these begin."""

    by_context_M: np.ndarray
    context_starts_M: np.ndarray
    by_pair_M: np.ndarray
    pair_starts_M: np.ndarray


def code_lengths(
    symbols_N: np.ndarray, *, alphabet: int, order: int, learnt_N: np.ndarray | None = None, discount: float = DISCOUNT
) -> np.ndarray:
    """-log2 p of every symbol, fp64 [N].

    Args:
        symbols_N: integers below `alphabet`.
        order: symbols of the longest context.
        learnt_N: bool, which symbols count once they have been seen; all unless told. Text that is only to be measured
            stands behind what was learnt.

    Raises:
        ValueError: for a sequence that is too long to be sorted in 64 bits.
    """
    M = len(symbols_N) + order
    time_bits = max(int(M).bit_length(), 1)
    if 2 * time_bits + (alphabet - 1).bit_length() > 64:
        raise ValueError(f"{len(symbols_N):,} symbols of an alphabet of {alphabet:,} are too many for an n-gram code")
    padded_M = np.concatenate((np.zeros(order, np.uint64), np.asarray(symbols_N, dtype=np.uint64)))
    counted_M = np.ones(M, bool)
    counted_M[order:] = True if learnt_N is None else learnt_N
    counted_M[:order] = False
    counts = []
    # What a longer context has seen, a shorter one does not count again.
    for level in reversed(_levels(padded_M, alphabet, order, time_bits)):
        c_M = _before(counted_M, level.by_pair_M, level.pair_starts_M)
        new_M = counted_M & (c_M == 0)
        n_M = _before(counted_M, level.by_context_M, level.context_starts_M)
        counts.append((c_M[order:], n_M[order:], _before(new_M, level.by_context_M, level.context_starts_M)[order:]))
        counted_M = new_M
    p_N = np.full(len(symbols_N), 1 / alphabet)
    for c_N, n_N, different_N in reversed(counts):
        seen_N = n_N > 0
        interpolated_N = np.maximum(c_N - discount, 0) + discount * different_N * p_N
        p_N = np.where(seen_N, interpolated_N / np.maximum(n_N, 1), p_N)
    return -np.log2(p_N)


def _levels(symbols_M: np.ndarray, alphabet: int, order: int, time_bits: int) -> list[_Level]:
    """From no context to the longest. The number of a context and a symbol is that of the next longer context, so that
    contexts are compared exactly and not by hashes."""
    M = len(symbols_M)
    time_M = np.arange(M, dtype=np.uint64)
    context_M, by_context_M = np.zeros(M, np.uint64), np.arange(M, dtype=np.int32 if M < 1 << 31 else np.int64)
    context_starts_M = np.arange(M) == 0
    levels: list[_Level] = []
    for _ in range(order + 1):
        key_M = ((context_M * np.uint64(alphabet) + symbols_M) << np.uint64(time_bits)) | time_M
        key_M.sort()
        by_pair_M = (key_M & np.uint64((1 << time_bits) - 1)).astype(by_context_M.dtype)
        pair_M = key_M >> np.uint64(time_bits)
        starts_M = np.concatenate(([True], pair_M[1:] != pair_M[:-1]))
        levels.append(_Level(by_context_M, context_starts_M, by_pair_M, starts_M))
        number_M = np.cumsum(starts_M)
        # The pair that ends at a symbol is the context of the next; before the first symbol there is none like it.
        context_M = np.zeros(M, np.uint64)
        inner = by_pair_M < M - 1
        context_M[by_pair_M[inner] + 1] = number_M[inner]
        by_context_M = np.concatenate((np.zeros(1, by_pair_M.dtype), by_pair_M[inner] + 1)).astype(by_pair_M.dtype)
        in_order_M = context_M[by_context_M]
        context_starts_M = np.concatenate(([True], in_order_M[1:] != in_order_M[:-1]))
    return levels


def _before(counted_M: np.ndarray, order_M: np.ndarray, starts_M: np.ndarray) -> np.ndarray:
    """How many of the counted ones of its group come before each symbol, int64."""
    own_M = counted_M[order_M]
    before_M = np.cumsum(own_M) - own_M
    found_M = np.empty(len(order_M), np.int64)
    found_M[order_M] = before_M - np.maximum.accumulate(np.where(starts_M, before_M, 0))
    return found_M

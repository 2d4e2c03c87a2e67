"""An n-gram model over characters whose counts lie in one hashed table: small, trained in seconds, read by numpy alone.

    p_n(x | context) = (count(context x) + k p_{n-1}(x)) / (count(context) + k)

down to a uniform distribution: a Dirichlet prior at every order (MacKay and Peto 1995). Counts of all orders share the
table; two n-grams that meet in a slot add up, which lifts rare ones a little.

Legend: C characters, S slots.
"""

from collections.abc import Iterable

import numpy as np

from corpus.refine import views
from corpus.refine.hashing import INVERSE, RunHashes, code_points, mix
from corpus.refine.page import CHINESE, CODE, ENGLISH

BITS = 24
SLOTS = 1 << BITS
ORDERS = {ENGLISH: 6, CHINESE: 3, CODE: 6}
PRIOR = 2.0
UNIFORM = 1 / (1 << 16)
# Of a longer text its beginning says enough.
LONGEST = 50_000


class NgramModel:
    """Counts of character n-grams.

    Attributes:
        counts_S: uint16, saturating.
        order: n of the longest n-grams.
        total: characters that were counted.
    """

    def __init__(self, counts_S: np.ndarray, order: int, total: int):
        self.counts_S = counts_S
        self.order = order
        self.total = total

    @classmethod
    def train(cls, texts: Iterable[str], order: int) -> "NgramModel":
        counts_S, total = np.zeros(SLOTS, np.uint32), 0
        for text in texts:
            for slots in _slots(text, order):
                np.add.at(counts_S, slots, 1)
            total += len(text)
        return cls(np.minimum(counts_S, 0xFFFF).astype(np.uint16), order, total)

    def bits_per_character(self, text: str) -> float:
        """Mean of -log2 p over the characters of a text; 0 for an empty one."""
        text = text[:LONGEST]
        if not text:
            return 0.0
        hashes = _hashes(text)
        shape, floats = (self.order, BITS), (self.total, PRIOR, UNIFORM)
        found_C = views.ngram_probabilities(hashes.sums, hashes.powers, self.counts_S, shape, floats)
        if found_C is not None:
            return float(-np.log2(found_C).mean())
        p_C = np.full(len(text), UNIFORM, np.float32)
        context_C = np.full(len(text), self.total, np.float32)
        for n, slots in enumerate(_slots(text, self.order), 1):
            found = self.counts_S[slots].astype(np.float32)
            own_C = p_C[n - 1 :]
            own_C *= np.float32(PRIOR)
            own_C += found
            own_C /= context_C[: len(found)] + np.float32(PRIOR)
            # This order's n-grams are the next one's contexts: that of character i ends at i - 1.
            context_C = found
        return float(-np.log2(p_C).mean())


def _slots(text: str, order: int) -> list[np.ndarray]:
    """Slots of the n-grams of each order, in order of their ends."""
    hashes = _hashes(text)
    # High bits of polynomials over mixed values need no more mixing; the order keeps equal runs of two orders apart.
    return [
        ((hashes.polynomials(n) * np.uint64(2 * n + 1)) >> np.uint64(64 - BITS)).astype(np.int64)
        for n in range(1, order + 1)
    ]


def _hashes(text: str) -> RunHashes:
    """Of the characters; all digits are one, as in CCNet: a price is not less likely than another."""
    codes_C = code_points(text)
    if (sums := views.character_sums(codes_C, INVERSE)) is not None:
        return RunHashes.of_sums(sums)
    codes_C = np.where((codes_C >= 48) & (codes_C < 58), 48, codes_C).astype(np.uint64)
    return RunHashes(mix(codes_C + np.uint64(1)))

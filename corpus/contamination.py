"""How much of a held-out text stands in a training text: n-grams of terms, compared by 64-bit hashes.

13-grams as GPT-3 (arXiv 2005.14165, appendix C) takes them; terms as `corpus.refine.page` has them: case, punctuation,
figures and line ends make no difference, a Han character is a term.

Legend: D held-out documents, G n-grams.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from corpus.refine.page import Page

NGRAM = 13


@dataclass(frozen=True)
class Overlap:
    """Attributes:
    ngrams_D, shared_D: n-grams of each held-out document, and how many of them are in the training text; int64.
    """

    ngrams_D: np.ndarray
    shared_D: np.ndarray

    @property
    def touched_D(self) -> np.ndarray:
        """Documents that share an n-gram, bool."""
        return self.shared_D > 0


def overlap(held_out: Sequence[str], train: Iterable[str], n: int = NGRAM) -> Overlap:
    """Compares texts. Training texts are seen one at a time; of the held-out ones every n-gram's hash is held, 8 bytes
    each.

    Args:
        n: terms of an n-gram; a document of fewer terms has none, and shares none.
    """
    hashes = [ngrams(text, n) for text in held_out]
    document_G = np.repeat(np.arange(len(hashes)), [len(found) for found in hashes])
    hash_G = np.concatenate(hashes) if hashes else np.empty(0, np.uint64)
    order = np.argsort(hash_G, kind="stable")
    sorted_G = hash_G[order]
    seen_G = np.zeros(len(hash_G), bool)
    for text in train:
        found = np.unique(ngrams(text, n))
        first, last = np.searchsorted(sorted_G, found, "left"), np.searchsorted(sorted_G, found, "right")
        # Most texts share nothing.
        for start, stop in zip(first[last > first], last[last > first]):
            seen_G[start:stop] = True
    shared_D = np.bincount(document_G[order[seen_G]], minlength=len(hashes))
    return Overlap(np.bincount(document_G, minlength=len(hashes)), shared_D)


def ngrams(text: str, n: int) -> np.ndarray:
    """Hashes of a text's n-grams of terms, uint64."""
    return Page(text).term_hashes.ngrams(n)

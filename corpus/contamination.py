"""How much of a held-out text stands in a training text: n-grams of terms, compared by 64-bit hashes.

13-grams as GPT-3 (arXiv 2005.14165, appendix C) takes them, and 30-grams, which are no phrase that many texts have;
terms as `corpus.refine.page` has them: case, punctuation, figures and line ends make no difference, a Han character is
a term.

Legend: D held-out documents, G n-grams.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from corpus.refine.page import Page

NGRAM, LONG_NGRAM = 13, 30


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
    """See `overlaps`, of one length."""
    return overlaps(held_out, train, (n,))[n]


def overlaps(held_out: Sequence[str], train: Iterable[str], lengths: Sequence[int]) -> dict[int, Overlap]:
    """Compares texts, by the length of n-grams. Training texts are seen once, one at a time; of the held-out ones every
    n-gram's hash is held, 8 bytes each.

    Args:
        lengths: terms of an n-gram; a document of fewer terms has none, and shares none.
    """
    searches = {n: _Search(held_out, n) for n in lengths}
    for text in train:
        terms = Page(text).term_hashes
        for n, search in searches.items():
            search.see(terms.ngrams(n))
    return {n: search.found() for n, search in searches.items()}


class _Search:
    """The n-grams of the held-out documents, sorted, and which of them have been seen."""

    def __init__(self, held_out: Sequence[str], n: int) -> None:
        hashes = [Page(text).term_hashes.ngrams(n) for text in held_out]
        self._n_documents = len(hashes)
        self._document_G = np.repeat(np.arange(len(hashes)), [len(found) for found in hashes])
        hash_G = np.concatenate(hashes) if hashes else np.empty(0, np.uint64)
        self._order_G = np.argsort(hash_G, kind="stable")
        self._sorted_G = hash_G[self._order_G]
        self._seen_G = np.zeros(len(hash_G), bool)

    def see(self, ngrams: np.ndarray) -> None:
        found = np.unique(ngrams)
        first, last = (np.searchsorted(self._sorted_G, found, side) for side in ("left", "right"))
        # Most texts share nothing.
        for start, stop in zip(first[last > first], last[last > first]):
            self._seen_G[start:stop] = True

    def found(self) -> Overlap:
        shared_D = np.bincount(self._document_G[self._order_G[self._seen_G]], minlength=self._n_documents)
        return Overlap(np.bincount(self._document_G, minlength=self._n_documents), shared_D)

"""Layer 12: no topic floods the corpus: documents are clustered by their terms, and a cluster that holds many times its
even share is sampled down to that.

Hashed tf-idf and spherical k-means. The cap is the largest number c of documents with c <= limit x (what is left) / K,
where what is left counts every cluster at c at most: after the cut the rule holds for what remains, so a second pass
removes nothing. Which documents of a cluster stay is decided by the hash of their text.

Legend: D documents, F features, K clusters.
"""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from corpus.refine.page import CHINESE, CODE, ENGLISH, Page

FEATURES = 1 << 11
CLUSTERS, DOCUMENTS_PER_CLUSTER = 64, 50
ROUNDS = 12
LIMIT = 4.0
SEED = 1
TERMS = 4000


class Clusters:
    """A layer that looks at all documents together: it has facts as the others, and no verdict on one page."""

    name = "clusters"
    source = (
        "Yi (arXiv 2403.04652, section 2.1): clusters and a topic model to down-sample what is too much; the cap is our"
        " own"
    )
    thresholds: ClassVar = {language: {"times the even share": LIMIT} for language in (ENGLISH, CHINESE, CODE)}


class Topics:
    """Attributes:
    idf_F: float32; weight of each feature.
    centres_KF: float32, unit rows.
    """

    def __init__(self, idf_F: np.ndarray, centres_KF: np.ndarray):
        self.idf_F = idf_F
        self.centres_KF = centres_KF

    def cluster(self, page: Page) -> int:
        return int((self.centres_KF @ _unit(term_counts(page) * self.idf_F)).argmax())

    @classmethod
    def train(cls, counts_D: Sequence[np.ndarray]) -> "Topics":
        """K-means++ and `ROUNDS` rounds of Lloyd's algorithm on unit vectors; always the same for the same documents.

        Args:
            counts_D: `term_counts` of each document.
        """
        n_documents, x_DF = len(counts_D), np.stack(counts_D)
        idf_F = np.log((1 + n_documents) / (1 + (x_DF > 0).sum(axis=0))).astype(np.float32)
        x_DF *= idf_F
        x_DF /= np.maximum(np.linalg.norm(x_DF, axis=1, keepdims=True), 1e-12)
        n_clusters = min(CLUSTERS, max(n_documents // DOCUMENTS_PER_CLUSTER, 1))
        generator = np.random.default_rng(SEED)
        centres_KF = x_DF[generator.integers(n_documents)][None]
        nearest_D = x_DF @ centres_KF[0]
        while len(centres_KF) < n_clusters:
            chance_D = np.maximum(1 - nearest_D, 1e-9).astype(np.float64)
            chosen = x_DF[generator.choice(n_documents, p=chance_D / chance_D.sum())]
            centres_KF = np.vstack((centres_KF, chosen))
            nearest_D = np.maximum(nearest_D, x_DF @ chosen)
        for _ in range(ROUNDS):
            own_D = (x_DF @ centres_KF.T).argmax(axis=1)
            for k in range(n_clusters):
                if (own_D == k).any():
                    centres_KF[k] = _unit(x_DF[own_D == k].sum(axis=0))
        return cls(idf_F, centres_KF)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"idf": self.idf_F, "centres": self.centres_KF}

    @classmethod
    def of_arrays(cls, arrays: dict[str, np.ndarray]) -> "Topics":
        return cls(arrays["idf"], arrays["centres"])


def term_counts(page: Page) -> np.ndarray:
    """Square roots of the counts of hashed terms, float32 [F]."""
    hashes = (page.terms.hashes[:TERMS] & np.uint64(FEATURES - 1)).astype(np.int64)
    return np.sqrt(np.bincount(hashes, minlength=FEATURES)).astype(np.float32)


def cap(sizes_K: np.ndarray, limit: float, n_clusters: int) -> int:
    """The number of documents that a cluster may hold."""
    found = int(sizes_K.max(initial=0))
    while True:
        allowed = max(int(limit * np.minimum(sizes_K, found).sum() / n_clusters), 1)
        if found <= allowed:
            return found
        found = allowed


def _unit(x_F: np.ndarray) -> np.ndarray:
    return x_F / max(float(np.linalg.norm(x_F)), 1e-12)

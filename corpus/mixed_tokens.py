"""A packed stream read as a mixture: whole documents, so that the tokens of every domain keep to its share all the way.

A domain's documents come in a new order in every pass over them. The document whose middle is token c of a domain of
share s stands at c / s, and all domains are merged by that. So a stream is a function of the packed one,
the shares and nothing else, any part of it can be read without what is before, and a longer one begins like a shorter.

Legend: D documents of the packed stream, N documents of the mixture in their order.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from corpus.packing import PackedTokens
from foundation.files import fingerprint
from foundation.permutations import permutation

# Of tokens whose bytes are counted at once.
CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class DomainUse:
    """What a mixture takes of one domain.

    Attributes:
        share: of the mixture's tokens.
        tokens: that it takes.
        passes: how often it reads the domain, in the mean of its tokens.
    """

    domain: str
    share: float
    tokens: int
    passes: float


class MixedTokens:
    """The mixture, with what a `PackedTokens` offers for reading.

    Args:
        packed: the stream whose documents are mixed.
        domain_D: number of each document's domain among the sorted names.
        shares: of all domains, by name; they sum to one.
        length: tokens of the mixture; its last document is cut there.
        n_bytes_V: UTF-8 bytes of each token.

    Attributes:
        document_offsets: int64 [documents + 1], as of a packed stream.
        use: by domain.
    """

    def __init__(
        self,
        packed: PackedTokens,
        domain_D: np.ndarray,
        shares: Mapping[str, float],
        *,
        length: int,
        n_bytes_V: np.ndarray,
    ) -> None:
        self.packed, self.shares = packed, dict(shares)
        starts_D = np.asarray(packed.document_offsets)
        lengths_D = np.diff(starts_D)
        order_N = mixed_order(lengths_D, domain_D, list(shares.values()), length)
        offsets_N = np.concatenate(([0], np.cumsum(lengths_D[order_N])))
        n = int(np.searchsorted(offsets_N, length))
        self._source_N = starts_D[order_N[:n]]
        self.document_offsets = np.minimum(offsets_N[: n + 1], length)
        self.n_documents, self._length = n, length
        self.n_bytes = sum(int(n_bytes_V[self[start : start + CHUNK]].sum()) for start in range(0, length, CHUNK))
        taken = np.bincount(domain_D[order_N[:n]], weights=np.diff(self.document_offsets), minlength=len(shares))
        has = np.bincount(domain_D, weights=lengths_D, minlength=len(shares))
        self.use = tuple(
            DomainUse(domain=domain, share=share, tokens=int(tokens), passes=float(tokens / own))
            for (domain, share), tokens, own in zip(shares.items(), taken, has)
        )

    @property
    def tokens(self) -> "MixedTokens":
        """The stream itself, as of a `PackedTokens`."""
        return self

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: slice) -> np.ndarray:
        start, stop, step = index.indices(self._length)
        if step != 1:
            raise ValueError(f"a slice of mixed tokens has step 1, got {step}")
        first = max(int(np.searchsorted(self.document_offsets, start, side="right")) - 1, 0)
        parts: list[np.ndarray] = []
        place = first
        while start < stop:
            end = min(int(self.document_offsets[place + 1]), stop)
            source = int(self._source_N[place]) + start - int(self.document_offsets[place])
            parts.append(self.packed.tokens[source : source + end - start])  # pyright: ignore[reportArgumentType]
            start, place = end, place + 1
        return np.concatenate(parts) if parts else np.empty(0, self.packed.tokens.dtype)

    def window(self, start: int, length: int) -> np.ndarray:
        """See `PackedTokens.window`."""
        if start < 0 or length < 1 or start + length > len(self):
            raise ValueError(f"no window of {length} tokens at position {start}: the mixture has {len(self)} tokens")
        return np.array(self[start : start + length], dtype=np.int64)

    def fingerprint(self) -> str:
        """Equal for equal tokens."""
        return fingerprint([self.packed.fingerprint(), self.shares, self._length])

    def verify(self) -> None:
        """See `PackedTokens.verify`."""
        self.packed.verify()

    def lines(self) -> list[str]:
        """What it takes of every domain, for people."""
        return [
            f"mixture {use.domain:<16} {use.share:>7.2%} {use.tokens:>14,} tokens {use.passes:>7.2f} passes"
            for use in self.use
        ]


def mixed_order(lengths_D: np.ndarray, domain_D: np.ndarray, shares: list[float], length: int) -> np.ndarray:
    """Numbers of the documents in the order of the mixture, int64; at least `length` tokens of them.

    Raises:
        ValueError: for a domain with a share and without tokens.
    """
    orders, keys = [], []
    # A document may stand as far behind where its place is as half of one of each domain is long.
    slack = sum(int(lengths_D[domain_D == domain].max(initial=0)) for domain in range(len(shares)))
    for domain, share in enumerate(shares):
        if share <= 0:
            continue
        own = np.flatnonzero(domain_D == domain)
        n_tokens = int(lengths_D[own].sum())
        if not n_tokens:
            raise ValueError(f"domain {domain} of the mixture has a share of {share} and no tokens")
        wanted = share * (length + slack)
        passes = int(wanted // n_tokens) + 1
        order = np.concatenate([own[permutation(len(own), domain, number)] for number in range(passes)])
        before = np.cumsum(lengths_D[order]) - lengths_D[order]
        kept = before < wanted
        orders.append(order[kept])
        keys.append((before[kept] + lengths_D[order[kept]] / 2) / share)
    # Stable: where two documents have one place, that of the first domain comes first.
    return np.concatenate(orders)[np.argsort(np.concatenate(keys), kind="stable")]

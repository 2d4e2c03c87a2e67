"""Small runs on many mixtures, as RegMix has them (arXiv 2407.01492): what they are trained on, and their losses.

Mixtures are drawn from Dirichlet distributions about the domains' sizes to the power 1/2, of strengths from a tenth to
five per domain: some are nearly one domain, some nearly the middle. What is over a domain's cap goes to the others.

Legend: N mixtures, D domains, T tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from corpus.mixture import Runs, read_runs
from corpus.ngram_code import code_lengths
from corpus.prepare import PreparedCorpus
from foundation.tables import write_table

MIXTURES, LOSSES = "mixtures.csv", "losses.csv"
STRENGTHS = (0.1, 5.0)
EXPONENT = 0.5
SAVE_EVERY = 8

Measure = Callable[[Mapping[str, float]], dict[str, float]]


def draw_mixtures(tokens: Mapping[str, int], n: int, seed: int, most_D: np.ndarray) -> np.ndarray:
    """Shares of the domains in their order, rows that sum to one, [N, D].

    Args:
        tokens: of each domain.
        most_D: largest share of each.
    """
    prior_D = np.array(list(tokens.values()), dtype=np.float64) ** EXPONENT
    prior_D *= len(prior_D) / prior_D.sum()
    # Each from a generator of its own, so that more mixtures begin like fewer.
    strength_N = np.exp(np.random.default_rng((seed, 0)).uniform(*np.log(STRENGTHS), n))
    # Gamma draws of tiny shapes may all be zero.
    raw_ND = np.maximum(np.random.default_rng((seed, 1)).gamma(strength_N[:, None] * prior_D), 1e-12)
    return within_caps(raw_ND / raw_ND.sum(axis=1, keepdims=True), most_D)


def within_caps(share_ND: np.ndarray, most_D: np.ndarray) -> np.ndarray:
    """Mixtures of which no share is above its largest, see `corpus.shares.capped`; all shares must be above 0."""
    full_ND = np.zeros(share_ND.shape, bool)
    for _ in most_D:
        left_N1 = 1 - np.where(full_ND, most_D, 0).sum(axis=1, keepdims=True)
        free_ND = np.where(full_ND, 0, share_ND)
        found_ND = np.where(full_ND, most_D, free_ND / np.maximum(free_ND.sum(axis=1, keepdims=True), 1e-300) * left_N1)
        full_ND |= found_ND > most_D
    return np.minimum(found_ND, most_D)


def run_proxies(domains: tuple[str, ...], mixture_ND: np.ndarray, measure: Measure, folder: Path) -> Runs:
    """The loss of each mixture in every domain, tried now or found in the folder, where two tables keep them in the
    form that `python -m corpus mixture fit` reads.

    Args:
        measure: of one mixture, bits per byte by domain.
    """
    losses: list[list[float]] = []
    if (folder / LOSSES).exists():
        found = read_runs(folder / MIXTURES, folder / LOSSES)
        if found.domains == domains and np.allclose(found.mixture_ND, mixture_ND[: len(found)], atol=1e-9):
            losses = found.loss_NV[: len(mixture_ND)].tolist()
            print(f"{len(losses)} of {len(mixture_ND)} mixtures were tried before: {folder / LOSSES}", flush=True)
    for number in range(len(losses), len(mixture_ND)):
        measured = measure(dict(zip(domains, mixture_ND[number].tolist())))
        losses.append([measured[domain] for domain in domains])
        if (number + 1) % SAVE_EVERY == 0 or number + 1 == len(mixture_ND):
            print(f"{number + 1} of {len(mixture_ND)} mixtures tried", flush=True)
            for name, rows in ((MIXTURES, mixture_ND[: number + 1].tolist()), (LOSSES, losses)):
                write_table(folder / name, ("run", *domains), [(place, *row) for place, row in enumerate(rows)])
    return Runs(domains, domains, mixture_ND, np.array(losses))


@dataclasses.dataclass(frozen=True, kw_only=True)
class NgramProxy:
    """An n-gram model of tokens that learns a mixture and is measured on held-out documents, which it does not learn.

    Attributes:
        order: tokens of its longest context.
        tokens: that it learns.
        valid: the most validation tokens of a domain.
    """

    corpus: PreparedCorpus
    order: int
    tokens: int
    valid: int

    def __call__(self, shares: Mapping[str, float]) -> dict[str, float]:
        """Bits per byte by domain."""
        train_T = self.corpus.mixed(shares, self.tokens).train.window(0, self.tokens)
        stretches = self._stretches
        symbols = np.concatenate((train_T, *stretches.values()))
        bits = code_lengths(
            symbols,
            alphabet=self.corpus.tokenizer.vocab_size,
            order=self.order,
            learnt_N=np.arange(len(symbols)) < len(train_T),
        )
        found, place = {}, len(train_T)
        for domain, tokens in stretches.items():
            n_bytes = int(self.corpus.tokenizer.n_bytes_V[tokens].sum())
            found[domain] = float(bits[place : place + len(tokens)].sum()) / n_bytes
            place += len(tokens)
        return found

    @functools.cached_property
    def _stretches(self) -> dict[str, np.ndarray]:
        """Of each domain its first validation documents, the last of them cut."""
        valid, domains = self.corpus.valid, np.array(self.corpus.valid_domains())
        found = {}
        for domain in sorted(set(domains.tolist())):
            own = np.flatnonzero(domains == domain)
            pieces = [valid.tokens[valid.document_offsets[d] : valid.document_offsets[d + 1]] for d in own]
            found[domain] = np.concatenate(pieces)[: self.valid]
        return found

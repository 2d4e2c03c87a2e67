"""Differences and shares with their noise: what an allocation gains over the even one in bits per byte, and its share
of what the cross-fitted oracle gains, 0 to 1.

A share is one ratio of sums over the text. Intervals of a single run resample documents. Those of several runs, the
training seeds of one method, hold the noise of seeds and text both, as comparisons do (`comparison.statistics`): for a
share by its linear form, gain - share x oracle's gain. Where the oracle's own gain cannot be told from zero there is
nothing to be a share of, and none is given.

Legend: U runs, D documents, R resamples, N counted tokens.
"""

import dataclasses
import functools

import numpy as np

from ablations.comparison.statistics import Text, paired_difference
from ablations.difficulty.correlations import Bounded, document_weights, ratio


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """What numbers of documents are turned into intervals with.

    Attributes:
        n_bytes_D: of each document, above 0.
        resamples, seed: of the documents, where there is a single run.
    """

    n_bytes_D: np.ndarray
    resamples: int
    seed: int

    def gain(self, bits_UD: np.ndarray) -> Bounded:
        """Mean of a gain over the runs, in bits per byte.

        Args:
            bits_UD: gained in each document.
        """
        if len(bits_UD) == 1:
            return ratio(bits_UD[0], self.n_bytes_D, self._weights_RD)
        interval, half = self._over_runs(bits_UD)
        return Bounded(value=interval, low=interval - half, high=interval + half)

    def share(self, bits_UD: np.ndarray, oracle_UD: np.ndarray) -> Bounded | None:
        """Of the oracle's gain; None where that is not separable from zero."""
        if not self.gain(oracle_UD).low > 0:
            return None
        if len(bits_UD) == 1:
            return ratio(bits_UD[0], oracle_UD[0], self._weights_RD)
        share = float(bits_UD.sum() / oracle_UD.sum())
        _, half = self._over_runs(bits_UD - share * oracle_UD)
        half /= oracle_UD.sum() / len(oracle_UD) / self.n_bytes_D.sum()
        return Bounded(value=share, low=share - half, high=share + half)

    def _over_runs(self, bits_UD: np.ndarray) -> tuple[float, float]:
        """Mean and half width in bits per byte."""
        text = Text(n_bytes_S=self.n_bytes_D, document_S=np.arange(len(self.n_bytes_D)))
        # One trunk's branches: each run is a unit of its own.
        runs = {(0, number): bits_D for number, bits_D in enumerate(bits_UD)}
        difference = paired_difference(runs, {key: np.zeros_like(bits_D) for key, bits_D in runs.items()}, text)
        return difference.mean, difference.half_width()

    @property
    def _weights_RD(self) -> np.ndarray:
        return _weights(len(self.n_bytes_D), self.resamples, self.seed)


# The same few are asked for again and again.
_weights = functools.lru_cache(maxsize=8)(document_weights)

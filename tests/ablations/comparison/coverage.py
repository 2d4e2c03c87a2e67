"""How often intervals hold the true difference, and how often a difference of the size that they say they would see is
told from zero: by simulation.

    python tests/ablations/comparison/coverage.py FILE.csv        1,000 comparisons of each kind, ten minutes

From the root of the checkout. Beside the interval that is used stand those that were not: the standard normal one of a
bootstrap over trunks, seeds and documents, and the t interval with Satterthwaite's degrees of freedom.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
from scipy import stats

if __name__ == "__main__":
    sys.path.insert(0, ".")

from ablations.comparison.statistics import Difference, Text, paired_difference
from foundation.tables import write_rows

# Sections of documents of very different lengths, as a held-out text has them.
LENGTHS = np.maximum(1, np.random.default_rng(0).lognormal(1.2, 1.0, 60).astype(int))
TEXT = Text(
    n_bytes_S=np.random.default_rng(1).integers(600, 1300, LENGTHS.sum()),
    document_S=np.repeat(np.arange(len(LENGTHS)), LENGTHS),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise:
    """Standard deviations of the mean difference that each kind of draw makes in one pair, as if it were alone.

    Attributes:
        runs: of a pair of runs, on any text.
        text: of the text, sections being independent.
        documents: of the text, its documents being independent and their sections alike.
        crossed: of what is peculiar to a section in a run.
        trunks: of a trunk.
    """

    runs: float = 0.0
    text: float = 0.0
    documents: float = 0.0
    crossed: float = 0.0
    trunks: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coverage:
    """Shares of simulated comparisons; `power` is of the difference that each said it would see."""

    trunks: int
    seeds: int
    runs: float
    text: float
    documents: float
    crossed: float
    trunk_noise: float
    comparisons: int
    covered: float
    power: float
    bootstrap_covered: float
    satterthwaite_covered: float


CASES = (
    Noise(runs=1.0),
    Noise(runs=1.0, text=0.3),
    Noise(runs=1.0, text=1.0),
    Noise(runs=0.3, text=1.0),
    Noise(text=1.0),
    Noise(documents=1.0),
    Noise(runs=1.0, documents=1.0),
    Noise(crossed=1.0),
    Noise(runs=0.3, text=0.3, crossed=1.0),
)


def differences(
    noise: Noise, rng: np.random.Generator, *, trunks: int, seeds: int, comparisons: int, effect: float = 0.0
) -> list[Difference]:
    """Comparisons of a method whose true difference is `effect`; with one seed on one trunk its noise of runs is
    rounding, which one twin measures."""
    share_S = TEXT.n_bytes_S / TEXT.n_bytes_S.sum()
    share_D = np.bincount(TEXT.document_S, weights=share_S)

    def per_section(scale: float) -> np.ndarray:
        return rng.normal(0, scale / np.sqrt((share_S**2).sum()), len(share_S))

    found = []
    for _ in range(comparisons):
        documents_D = rng.normal(0, noise.documents / np.sqrt((share_D**2).sum()), len(share_D))
        common_S = effect + per_section(noise.text) + documents_D[TEXT.document_S]
        pairs = {}
        for trunk in range(trunks):
            of_trunk = rng.normal(0, noise.trunks)
            for seed in range(seeds):
                own_S = common_S + of_trunk + rng.normal(0, noise.runs) + per_section(noise.crossed)
                pairs[trunk, seed] = own_S * TEXT.n_bytes_S
        baseline = dict.fromkeys(pairs, np.zeros(len(share_S)))
        twin_S = rng.normal(0, noise.runs) + per_section(noise.crossed)
        found.append(paired_difference(pairs, baseline, TEXT, {(0, 0): twin_S * TEXT.n_bytes_S}))
    return found


def coverage(noise: Noise, *, trunks: int, seeds: int, comparisons: int) -> Coverage:
    """Simulates comparisons without effect, and as many with the effect that they said they would see."""
    rng = np.random.default_rng(trunks * 100 + seeds)
    found = differences(noise, rng, trunks=trunks, seeds=seeds, comparisons=comparisons)
    covered = [abs(one.mean) <= one.half_width() for one in found]
    # Standard errors scatter from comparison to comparison; variances are right in the mean.
    effect = float(np.sqrt(np.mean([one.detectable() ** 2 for one in found[:200]])))
    with_effect = differences(noise, rng, trunks=trunks, seeds=seeds, comparisons=comparisons, effect=effect)
    bootstrap, satterthwaite = [], []
    for one in found:
        assert one.runs is not None
        naive = one.runs.variance * (one.n - 1) / one.n if one.n > 1 else 0.0
        bootstrap.append(abs(one.mean) <= 1.96 * np.sqrt(naive + one.text.variance))
        total = one.standard_error**2
        freedom = total**2 / sum(part.variance**2 / part.freedom for part in (one.runs, one.text))
        satterthwaite.append(abs(one.mean) <= stats.t.isf(0.025, freedom) * one.standard_error)
    return Coverage(
        trunks=trunks,
        seeds=seeds,
        runs=noise.runs,
        text=noise.text,
        documents=noise.documents,
        crossed=noise.crossed,
        trunk_noise=noise.trunks,
        comparisons=comparisons,
        covered=float(np.mean(covered)),
        power=float(np.mean([one.mean - one.half_width() > 0 for one in with_effect])),
        bootstrap_covered=float(np.mean(bootstrap)),
        satterthwaite_covered=float(np.mean(satterthwaite)),
    )


if __name__ == "__main__":
    rows = [coverage(noise, trunks=1, seeds=seeds, comparisons=1000) for seeds in (1, 2, 3, 5) for noise in CASES]
    nested = Noise(runs=0.5, text=0.5, trunks=1.0)
    rows += [coverage(nested, trunks=trunks, seeds=2, comparisons=1000) for trunks in (2, 3)]
    write_rows(Path(sys.argv[1]), Coverage, rows)
    for row in rows:
        print(row)

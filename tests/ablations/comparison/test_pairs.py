"""Runs that no comparison has trained are judged by the same statistics."""

import math
import re

import numpy as np
import pytest

from ablations.comparison.pairs import PairsConfig, pairs
from ablations.comparison.statistics import Text, paired_difference
from foundation.files import CorruptFileError, seal
from foundation.tables import write_rows
from staged_training.record import SECTIONS, SectionLoss

DOCUMENTS, SECTIONS_EACH = 12, 3


def finished(folder, bits_S, n_bytes_S):
    folder.mkdir()
    rows = [
        SectionLoss(document=place // SECTIONS_EACH, n_bytes=int(size), nats=float(bits) * math.log(2))
        for place, (bits, size) in enumerate(zip(bits_S, n_bytes_S))
    ]
    write_rows(folder / SECTIONS, SectionLoss, rows)
    seal(folder, [SECTIONS])
    return folder


@pytest.fixture
def runs(tmp_path):
    """Three pairs; the first of each has 0.05 bits per byte less, give or take."""
    draws = np.random.default_rng(0)
    n_bytes_S = draws.integers(200, 400, size=DOCUMENTS * SECTIONS_EACH)
    own, others = [], []
    for seed in range(3):
        other_S = n_bytes_S * draws.uniform(1.5, 2.5, size=len(n_bytes_S))
        own_S = other_S - n_bytes_S * draws.normal(0.05, 0.02, size=len(n_bytes_S))
        own.append(finished(tmp_path / f"own_{seed}", own_S, n_bytes_S))
        others.append(finished(tmp_path / f"other_{seed}", other_S, n_bytes_S))
    return own, others


def test_pairs_are_those_of_the_statistics(runs, capsys):
    own, others = runs
    said = pairs(PairsConfig(run=tuple(own), against=tuple(others)))
    assert capsys.readouterr().out == said + "\n"
    mean, low, high = map(float, re.search(r": (\S+) \[(\S+), (\S+)\], 3 pairs, 12 documents", said).groups())
    assert low < -0.05 < high < 0
    sides = []
    for folders in runs:
        lines = [np.loadtxt(folder / SECTIONS, delimiter=",", skiprows=1) for folder in folders]
        sides.append({(seed, 0): line[:, 2] / math.log(2) for seed, line in enumerate(lines)})
    expected = paired_difference(*sides, Text(n_bytes_S=lines[0][:, 1], document_S=lines[0][:, 0].astype(int)))
    np.testing.assert_allclose(
        [mean, low, high], [expected.mean, expected.interval.low, expected.interval.high], atol=6e-5
    )
    # Which seed meets which matters: runs of other seeds are further apart.
    width = high - low
    crossed = pairs(PairsConfig(run=tuple(own), against=(others[1], others[2], others[0])))
    low, high = map(float, re.search(r"\[(\S+), (\S+)\]", crossed).groups())
    assert high - low > 2 * width


def test_a_single_pair_has_the_noise_of_the_text(runs):
    own, others = runs
    assert "], 1 pair, 12 documents" in pairs(PairsConfig(run=(own[0],), against=(others[0],)))


def test_what_cannot_be_paired_is_refused_by_name(runs, tmp_path):
    own, others = runs
    with pytest.raises(ValueError, match="1 and 2 folders"):
        PairsConfig(run=(own[0],), against=tuple(others[:2]))
    with pytest.raises(ValueError, match="nothing holds no finished run"):
        pairs(PairsConfig(run=(own[0],), against=(tmp_path / "nothing",)))
    elsewhere = finished(tmp_path / "elsewhere", np.ones(36), np.full(36, 300))
    with pytest.raises(ValueError, match="elsewhere was measured on another text"):
        pairs(PairsConfig(run=(own[0],), against=(elsewhere,)))
    (others[0] / SECTIONS).write_text((others[0] / SECTIONS).read_text().replace("1", "2", 1))
    with pytest.raises(CorruptFileError, match="other_0"):
        pairs(PairsConfig(run=(own[0],), against=(others[0],)))

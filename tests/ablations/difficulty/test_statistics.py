"""Rank correlations against scipy and against relations that are planted."""

import numpy as np
import pytest
from scipy import stats

from ablations.difficulty.controls import control_basis
from ablations.difficulty.correlations import document_sums, document_weights, matched_shuffle, ratio, spearman


def documents(n, size=20):
    return np.arange(n) // size


def test_spearman_is_scipys():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=400), rng.integers(0, 5, size=400)
    weights = document_weights(20, 50)
    # Documents in any order: the moments belong to the document, not to the place.
    document = rng.permutation(documents(400))
    assert spearman(x, y + x, document, weights_RD=weights).value == pytest.approx(stats.spearmanr(x, y + x).statistic)
    assert np.isnan(spearman(x, np.ones(400), document, weights_RD=weights).value)


def test_partial_takes_out_what_the_covariate_explains():
    rng = np.random.default_rng(1)
    cause, noise = rng.normal(size=4000), rng.normal(size=(3, 4000))
    x, y, z = cause + 0.3 * noise[0], cause + 0.3 * noise[1], cause + 0.3 * noise[0] + noise[2]
    settings_ = {"weights_RD": document_weights(200, 200)}
    plain = spearman(x, y, documents(4000), **settings_)
    partial = spearman(x, y, documents(4000), basis_NP=control_basis((cause,)), **settings_)
    assert plain.low > 0.8
    assert abs(partial.value) < 0.05
    assert partial.low < 0 < partial.high
    # What x and z share beside the cause remains; a covariate given twice holds the same space fixed.
    once, twice = (
        spearman(x, z, documents(4000), basis_NP=control_basis(c), **settings_) for c in ((cause,), (cause,) * 2)
    )
    assert once.low > 0.1
    assert twice.value == pytest.approx(once.value, abs=0.02)
    # Nothing is left of what the covariate explains wholly.
    assert np.isnan(
        spearman(x, np.sign(cause), documents(4000), basis_NP=control_basis((np.sign(cause),)), **settings_).value
    )


@pytest.fixture
def planted():
    """Experts and difficulty that both depend on frequency, in opposite ways at its ends, on position and on the
    domain; what `effect` adds is all that they share beside."""

    def draw(seed, effect):
        rng, n = np.random.default_rng(seed), 6000
        document = documents(n, 60)
        # As token frequencies are: few values, most of them rare.
        frequency = np.log(rng.zipf(1.5, size=n).clip(max=3000))
        position, domain = np.arange(n) % 60, np.array(["prose", "code", "sums"])[document % 3]
        rank = stats.rankdata(frequency) / n
        # A hump: rare and very common tokens are easy and get few.
        hump = 3 * np.sin(np.pi * rank) + 0.3 * np.sqrt(position) + 1.5 * (domain == "code")
        shared = rng.normal(size=n)
        difficulty = hump + effect * shared + rng.normal(size=n) * (0.5 + rank)
        experts = np.round(6 + 2 * hump + effect * shared + rng.normal(size=n))
        return difficulty, experts, document, (frequency, position, domain)

    return draw


def test_a_planted_zero_comes_out_as_zero(planted):
    """Where frequency acts other than in a straight line, linear ranks find a relation that is not there."""
    weights, missed = document_weights(100, 200), 0
    for seed in range(20):
        difficulty, experts, document, (frequency, position, domain) = planted(seed, 0.0)
        ranks = [stats.rankdata(values) for values in (frequency, position)]
        columns = [np.ones(len(document)), *ranks, *(domain == name for name in ("prose", "code"))]
        straight = np.linalg.qr(np.column_stack(columns))[0]
        linear = spearman(difficulty, experts, document, basis_NP=straight, weights_RD=weights)
        found = spearman(
            difficulty, experts, document, basis_NP=control_basis((frequency, position, domain)), weights_RD=weights
        )
        assert linear.low > 0.2
        assert abs(found.value) < 0.05
        missed += not found.low <= 0 <= found.high
    assert missed <= 3


def test_a_planted_effect_is_found(planted):
    difficulty, experts, document, covariates = planted(0, 0.5)
    weights = document_weights(100, 200)
    found = spearman(difficulty, experts, document, basis_NP=control_basis(covariates), weights_RD=weights)
    assert found.low > 0.1
    # And what is shared by nothing but the pair of two covariates is taken out, too.
    rng = np.random.default_rng(5)
    first, second, noise = rng.random(6000), rng.random(6000), rng.normal(size=(2, 6000))
    both = 4 * (first - 0.5) * (second - 0.5)
    alone = spearman(both + 0.3 * noise[0], both + 0.3 * noise[1], documents(6000, 60), weights_RD=weights)
    held = spearman(
        both + 0.3 * noise[0],
        both + 0.3 * noise[1],
        documents(6000, 60),
        basis_NP=control_basis((first, second)),
        weights_RD=weights,
    )
    assert alone.value > 0.3
    assert abs(held.value) < 0.06


def test_intervals_are_as_wide_as_documents_differ():
    """Tokens that repeat their document's value carry no more than one observation each."""
    rng = np.random.default_rng(2)
    x, y = np.repeat(rng.normal(size=(2, 40)), 50, axis=1)
    clustered = spearman(x, y, documents(2000, 50), weights_RD=document_weights(40, 500))
    pretended = spearman(x, y, np.arange(2000), weights_RD=document_weights(2000, 500))
    assert clustered.high - clustered.low > 4 * (pretended.high - pretended.low)


def test_matched_shuffle_keeps_what_frequency_explains_and_nothing_else():
    rng = np.random.default_rng(3)
    frequency = rng.normal(size=5000)
    own = rng.normal(size=5000)
    by_frequency = matched_shuffle(frequency, frequency + own, frequency, shuffles=20)
    by_itself = matched_shuffle(own, own, frequency, shuffles=20)
    assert by_frequency.mean() > 0.6
    assert abs(by_itself.mean()) < 0.02


def test_ratio_of_sums():
    nats, size = document_sums(np.array([1.0, 2.0, 3.0]), np.array([0, 1, 1]), 2), np.array([2.0, 4.0])
    assert ratio(nats, size, document_weights(2, 100)).value == 1.0

"""Rank correlations against scipy and against a relation made by hand; allocations against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ablations.difficulty.allocation import best_allocation, by_difficulty, loss_at
from ablations.difficulty.correlations import document_sums, document_weights, matched_shuffle, ratio, spearman

KS = np.array([1, 2, 4])


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
    partial = spearman(x, y, documents(4000), given=(cause,), **settings_)
    assert plain.low > 0.8
    assert abs(partial.value) < 0.05
    assert partial.low < 0 < partial.high
    # What x and z share beside the cause remains, and residuals of ranks by least squares give the same number.
    ranks = np.column_stack([stats.rankdata(v) for v in (x, z, cause)])
    basis = np.column_stack([np.ones(4000), ranks[:, 2]])
    residuals = ranks[:, :2] - basis @ np.linalg.lstsq(basis, ranks[:, :2], rcond=None)[0]
    expected = np.corrcoef(residuals.T)[0, 1]
    shared = spearman(x, z, documents(4000), given=(cause, cause), **settings_)
    assert shared.value == pytest.approx(expected, abs=1e-6)
    assert shared.low > 0.1


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


@given(st.integers(0, 1000), st.floats(1.0, 4.0))
@settings(max_examples=40, deadline=None)
def test_best_allocation_is_the_best_at_its_total(seed, mean):
    """Where more experts help less and less, no assignment of the forced numbers with at most the same total has a
    lower loss."""
    gain_per_expert = np.sort(np.random.default_rng(seed).random((5, 2)), axis=1)[:, ::-1]
    loss = 9.0 - np.concatenate([np.zeros((5, 1)), np.cumsum(gain_per_expert * np.diff(KS), axis=1)], axis=1)
    chosen = best_allocation(loss, KS, mean)
    assert chosen.mean() == pytest.approx(mean, abs=1e-6)
    others = (np.array(each) for each in itertools.product(range(3), repeat=5))
    assert all(
        loss_at(loss, KS, chosen).sum() <= loss[np.arange(5), each].sum() + 1e-6
        for each in others
        if KS[each].mean() <= mean
    )


def test_best_allocation_gives_experts_where_they_pay():
    loss = np.array([[5.0, 3.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    assert best_allocation(loss, KS, 2.0).tolist() == [4.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="a mean of 5 experts lies outside the forced numbers 1 to 4"):
        best_allocation(loss, KS, 5)


def test_loss_between_forced_numbers_is_linear_and_clipped():
    loss = np.array([[4.0, 2.0, 1.0]])
    assert [loss_at(loss, KS, np.array([k]))[0] for k in (0.5, 1, 1.5, 2, 3, 4, 9)] == [
        4.0,
        4.0,
        3.0,
        2.0,
        1.5,
        1.0,
        1.0,
    ]


def test_allocation_by_difficulty_is_chosen_on_other_documents():
    rng = np.random.default_rng(4)
    document, difficulty = np.arange(4000) // 10, rng.random(4000)
    # Only the harder half gains from experts.
    loss = np.where(difficulty[:, None] > 0.5, 4.0 - KS, 1.0) + rng.normal(size=(4000, 3)) * 0.1
    experts = by_difficulty(loss, KS, 2.5, difficulty, document)
    assert experts.mean() == pytest.approx(2.5, abs=0.05)
    assert experts[difficulty > 0.6].mean() > 3.8
    assert experts[difficulty < 0.4].mean() < 1.2
    # Where difficulty says nothing, the noise of the measured half must not look like a gain on the other.
    even = rng.normal(size=(4000, 3))
    gained = (
        loss_at(even, KS, np.full(4000, 2.5)).mean()
        - loss_at(even, KS, by_difficulty(even, KS, 2.5, difficulty, document)).mean()
    )
    assert abs(gained) < 0.08

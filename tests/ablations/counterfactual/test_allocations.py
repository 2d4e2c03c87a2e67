"""Allocations against brute force, and what each of them keeps; predictions that know other documents only; shares and
their intervals where the truth is drawn."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ablations.counterfactual.allocations import (
    best_priority,
    by_gains,
    by_rank,
    even,
    greedy_priority,
    same_in_every_layer,
    shuffled_by_layer,
    shuffled_by_token,
    shuffled_in_documents,
)
from ablations.counterfactual.cross_fit import by_cross_fitted_gains, cross_fitted_gains, gain_at, predicted_gains
from ablations.difficulty.scale import Scale

KS = np.array([1, 2, 4])


@given(st.integers(0, 1000), st.integers(5, 20))
@settings(max_examples=60, deadline=None)
def test_the_best_allocation_is_the_best_at_its_total(seed, total):
    """Where more experts help less and less, no numbers of the grid with the same total gain more."""
    per_expert = -np.sort(-np.random.default_rng(seed).normal(size=(5, 2)), axis=1)
    gain = np.concatenate([np.zeros((5, 1)), np.cumsum(per_expert * np.diff(KS), axis=1)], axis=1)

    def value(experts):
        return sum(np.interp(k, KS, own) for k, own in zip(experts, gain))

    for greedy in (False, True):
        chosen = by_gains(gain[:, None], KS, total, greedy=greedy)[:, 0]
        assert chosen.sum() == total
        for each in itertools.product(range(3), repeat=5):
            if KS[list(each)].sum() == total:
                assert value(chosen) >= value(KS[list(each)]) - 1e-9


def test_who_looks_one_step_ahead_misses_what_pays_late():
    gain = np.array([[0.0, 0.0, 6.0], [0.0, 1.0, 1.5], [0.0, 1.0, 1.5]])
    assert by_gains(gain[:, None], KS, 6)[:, 0].tolist() == [4, 1, 1]
    assert by_gains(gain[:, None], KS, 6, greedy=True)[:, 0].tolist() == [1, 3, 2]
    assert best_priority(gain, KS)[0].tolist() == [2.0, 2.0]
    assert greedy_priority(gain, KS)[0].tolist() == [0.0, 0.0]


def test_experts_are_spent_even_where_they_harm():
    gain = -np.arange(12.0).reshape(4, 3)
    for total in (4, 7, 16):
        assert by_gains(gain[:, None], KS, total).sum() == total
    with pytest.raises(ValueError, match=r"5 experts per token and layer lie outside the numbers .* 1 to 4"):
        by_gains(gain[:, None], KS, 20)


@given(st.integers(0, 100), st.integers(1, 40), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_even_is_even_and_exact(seed, n_tokens, n_layers):
    total = int(np.random.default_rng(seed).integers(n_tokens * n_layers, 9 * n_tokens * n_layers))
    totals = same_in_every_layer(total, n_layers)
    assert totals.sum() == total
    assert np.ptp(totals) <= 1
    counts = even(n_tokens, totals)
    assert counts.sum(0).tolist() == totals.tolist()
    assert (np.ptp(counts, axis=0) <= 1).all()
    # Equal distances: any stretch has its share.
    half = counts[: n_tokens // 2].sum(0)
    assert (abs(half - totals * (n_tokens // 2) / n_tokens) <= 1.01).all()


def test_shuffles_keep_what_they_say():
    rng = np.random.default_rng(0)
    counts, document = rng.integers(1, 9, (200, 3)), np.sort(rng.integers(0, 7, 200))
    by_layer, by_token = shuffled_by_layer(counts, 1), shuffled_by_token(counts, 1)
    inside = shuffled_in_documents(counts, document, 1)
    for dealt in (by_layer, by_token, inside):
        assert (np.sort(dealt, axis=0) == np.sort(counts, axis=0)).all()
        assert (dealt != counts).mean() > 0.5
    assert sorted(map(tuple, by_token)) == sorted(map(tuple, counts))
    assert sorted(map(tuple, by_layer)) != sorted(map(tuple, counts))
    for number in range(7):
        here = document == number
        assert sorted(map(tuple, inside[here])) == sorted(map(tuple, counts[here]))
    value = rng.normal(size=200)
    ranked = by_rank(counts, value)
    assert (np.sort(ranked, axis=0) == np.sort(counts, axis=0)).all()
    assert (np.diff(ranked[np.argsort(-value)], axis=0) <= 0).all()


def test_predictions_know_other_documents_only():
    rng = np.random.default_rng(1)
    feature, document = rng.normal(size=(4000, 10)), np.arange(4000) // 20
    luck = rng.normal(size=(4000, 3))
    known = predicted_gains(feature, 0.3 * feature[:, :1] * [1, 2, 3] + luck, document)
    assert np.corrcoef(known[:, 2], feature[:, 0])[0, 1] > 0.9
    assert abs(np.corrcoef(known[:, 2], luck[:, 2])[0, 1]) < 0.05
    # Where nothing can be known, the mean curve is all that is predicted.
    blind = predicted_gains(feature, luck + np.arange(3.0), document)
    assert blind.mean(0) == pytest.approx([0, 1, 2], abs=0.08)
    assert (blind.std(0) < 0.06).all()


def test_predictions_part_tokens_as_far_as_that_pays_elsewhere():
    """Of luck alone nothing is left to part them by; what is known is kept."""
    rng, ks = np.random.default_rng(4), np.array([1, 2, 4])
    feature, document = rng.normal(size=(3000, 1, 12)), np.arange(3000) // 20
    curve = np.array([-0.5, -0.2, 0.0])
    luck = rng.normal(size=(3000, 1, 3)) * 0.5
    known = 0.4 * feature[:, :, :1] * (ks - 2)
    for gain, least, most in ((curve + luck, -0.002, 0.01), (curve + luck + known, 0.2, 1.0)):
        counts = by_cross_fitted_gains(cross_fitted_gains(feature, gain, document, ks, 2.0), ks, 6000, document)
        assert counts.sum() == 6000
        # Two for everyone gain what the curve says.
        gained = gain_at(gain - luck, ks, counts).mean() - curve[1]
        assert least <= gained <= most


def test_intervals_hold_the_share_that_was_drawn():
    """Four seeds, 60 documents: an allocation that takes 0.4 of what the oracle gains, with noise of the seed and of
    each document."""
    rng, n_bytes, held, covered = np.random.default_rng(2), np.full(60, 100.0), 0, 0
    for _ in range(100):
        oracle = 5 + rng.normal(size=(1, 60)) + 0.5 * rng.normal(size=(4, 1))
        gained = 0.4 * oracle + 0.3 * rng.normal(size=(4, 1)) + rng.normal(size=(1, 60)) * 0.8
        scale = Scale(n_bytes_D=n_bytes, resamples=50, seed=0)
        share = scale.share(gained, oracle)
        covered += share.low <= 0.4 <= share.high
        held += scale.share(gained[:1], oracle[:1]).low > 0
    assert covered >= 92
    assert held > 90


def test_no_share_of_what_is_not_there():
    rng = np.random.default_rng(3)
    scale = Scale(n_bytes_D=np.full(50, 80.0), resamples=100, seed=0)
    for n_runs in (1, 3):
        assert scale.share(np.ones((n_runs, 50)), rng.normal(size=(n_runs, 50))) is None

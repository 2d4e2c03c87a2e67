"""Agreement on made-up numbers whose answer is known."""

import math

import numpy as np
import pytest
from scipy import stats

from ablations.agreement.statistics import agreement, ceiling, measures, separable

RNG = np.random.default_rng(7)
# Eight arms 0.01 apart, three seeds whose own level cancels in pairs, and a little noise that does not.
MEANS_A = 2.0 + 0.01 * np.array([3, 0, 1, 2, 4, 5, 6, 7])
TRUTH_AS = MEANS_A[:, None] + RNG.normal(0, 0.05, 3)[None, :] + RNG.normal(0, 1e-5, (8, 3))


def test_perfect_agreement():
    # Any rising function of the truth orders as it does.
    found = agreement(TRUTH_AS, 3 * TRUTH_AS - 1, resamples=200)
    assert (found.pairs, found.agreeing) == (28, 28)
    assert (found.separable, found.separable_agreeing) == (28, 28)
    assert found.holm == found.holm_agreeing
    for estimate in (found.share, found.separable_share, found.tau, found.signs):
        assert (estimate.value, estimate.low, estimate.high) == pytest.approx((1, 1, 1))
    assert (found.regret.value, found.regret.high) == (0, 0)


def test_reversed():
    found = agreement(TRUTH_AS, -TRUTH_AS, resamples=200)
    assert (found.agreeing, found.separable_agreeing) == (0, 0)
    assert found.tau.value == pytest.approx(-1)
    assert found.signs.value == 0
    # The worst arm is put first.
    assert found.regret.value == pytest.approx(0.07, abs=1e-4)


@pytest.mark.long
def test_noise_agrees_in_half_of_the_pairs():
    rng = np.random.default_rng(0)
    found = [agreement(TRUTH_AS, rng.normal(0, 1, (8, 3)), resamples=100) for _ in range(60)]
    assert np.mean([each.share.value for each in found]) == pytest.approx(0.5, abs=0.06)
    assert np.mean([each.tau.value for each in found]) == pytest.approx(0, abs=0.12)
    # Seldom does an interval claim more than guessing.
    assert np.mean([each.separable_share.low > 0.5 for each in found]) < 0.15


def test_one_swapped_pair():
    cheap_AS = TRUTH_AS.copy()
    cheap_AS[[1, 2]] = cheap_AS[[2, 1]]
    found = agreement(TRUTH_AS, cheap_AS, resamples=300)
    assert (found.agreeing, found.separable_agreeing) == (27, 27)
    assert found.tau.value == pytest.approx(stats.kendalltau(TRUTH_AS.mean(1), cheap_AS.mean(1)).statistic)
    assert found.tau.value == pytest.approx(1 - 2 / 28)
    assert found.signs.value == 1
    # The second best is put first.
    assert found.regret.value == pytest.approx(0.01, abs=1e-4)
    assert found.share.low < found.share.value <= found.share.high


def test_differences_to_the_baseline_do_as_well_as_values():
    cheap_AS = TRUTH_AS + RNG.normal(0, 0.02, (8, 3))
    assert agreement(TRUTH_AS, cheap_AS, 50) == agreement(TRUTH_AS, cheap_AS - cheap_AS[:1], 50)


def test_the_same_numbers_give_the_same_intervals():
    cheap_AS = TRUTH_AS + RNG.normal(0, 0.02, (8, 3))
    assert agreement(TRUTH_AS, cheap_AS, 100) == agreement(TRUTH_AS, cheap_AS, 100)


def test_separable_is_the_paired_t_interval_and_holm_is_stricter():
    truth_AS = np.array([[0.0, 0.1, 0.2], [0.01, 0.111, 0.209], [0.05, 0.02, 0.3]])
    apart_AA, holm_AA = separable(truth_AS)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        p_value = stats.ttest_rel(truth_AS[i], truth_AS[j]).pvalue
        assert apart_AA[i, j] == apart_AA[j, i] == (p_value < 0.05)
        assert holm_AA[i, j] == (p_value < 0.05 / 3)
    assert apart_AA.sum() == 2
    assert not separable(truth_AS[:, :1])[0].any()


def test_a_pair_that_truth_does_not_tell_apart_counts_only_among_all():
    truth_AS = np.array([[0.0, 0.0, 0.0], [0.1, 0.1, 0.1], [-0.05, 0.08, -0.02]])
    found = agreement(truth_AS, truth_AS * np.array([[1], [1], [-1]]), resamples=20)
    assert (found.pairs, found.separable) == (3, 1)
    assert (found.agreeing, found.separable_agreeing) == (2, 1)


def test_an_arm_drawn_twice_is_no_pair_with_itself():
    everything_AA = np.ones((8, 8), dtype=bool)
    share, separable_share, *_ = measures(TRUTH_AS, TRUTH_AS, everything_AA, np.array([0, 3, 3, 3]))
    assert share == separable_share == 1


def test_nothing_separable_is_not_a_number():
    truth_AS = np.array([[0.0, 0.3], [0.2, 0.1], [0.1, 0.2]])
    found = agreement(truth_AS, truth_AS, resamples=20)
    assert found.separable == 0
    assert math.isnan(found.separable_share.value)
    assert math.isnan(found.separable_share.low)


def test_the_truths_own_noise():
    assert ceiling(TRUTH_AS) == 1
    assert math.isnan(ceiling(TRUTH_AS[:, :1]))
    assert ceiling(np.array([[0.0, 1.0], [1.0, 0.0], [2.0, -1.0]])) == 0


def test_too_few_arms_are_refused():
    with pytest.raises(ValueError, match="two arms beside the baseline"):
        agreement(TRUTH_AS[:2], TRUTH_AS[:2])

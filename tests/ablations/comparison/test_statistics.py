"""Statistics by simulation: intervals cover what they say under every mixture of noise, and pairs without effect earn
verdicts no more often than they should."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ablations.comparison.statistics import (
    Difference,
    Text,
    holm,
    mean_interval,
    paired_difference,
    t_interval,
    text_noise,
    units,
)
from ablations.comparison.statistics import Noise as Part
from tests.ablations.comparison.coverage import TEXT, Noise, differences

REPEATS = 3000
# Four standard errors of a proportion of 0.05 over REPEATS draws: a correct implementation fails less than once in ten
# thousand seeds.
TOLERANCE = 4 * math.sqrt(0.05 * 0.95 / REPEATS)


def runs(matrix):
    return {
        (trunk, branch): float(value)
        for trunk, row in enumerate(np.atleast_2d(matrix))
        for branch, value in enumerate(row)
    }


def test_t_interval_against_hand_computed_numbers():
    # mean 2, standard deviation 1, t(0.975, 2) = 4.302653: half width 4.302653 / sqrt(3).
    interval = t_interval([1.0, 2.0, 3.0])
    assert interval.n == 3
    assert interval.mean == pytest.approx(2.0)
    assert interval.half_width == pytest.approx(2.484138, abs=1e-5)
    assert (interval.low, interval.high) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-5)


@pytest.mark.parametrize("n", [2, 3, 8])
def test_interval_covers_the_true_mean_in_95_percent(n):
    rng = np.random.default_rng(n)
    covered = 0
    for _ in range(REPEATS):
        interval = mean_interval(runs(rng.normal(3.0, 0.2, n)))
        assert interval.low is not None
        assert interval.high is not None
        covered += interval.low <= 3.0 <= interval.high
    assert abs(covered / REPEATS - 0.95) < TOLERANCE


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "noise",
    [Noise(runs=1.0), Noise(text=1.0), Noise(documents=1.0), Noise(runs=1.0, text=0.3), Noise(runs=0.3, crossed=1.0)],
    ids=str,
)
def test_the_interval_covers_the_true_difference_whatever_the_noise(noise, seeds):
    found = differences(noise, np.random.default_rng(seeds), trunks=1, seeds=seeds, comparisons=250)
    covered = np.mean([abs(one.mean) <= one.half_width() for one in found])
    # Four standard errors of a share of 0.95 below it; a bootstrap over two seeds covers 0.6 to 0.75.
    assert covered > 0.95 - 4 * math.sqrt(0.95 * 0.05 / 250)


def test_trunk_noise_is_in_the_interval_of_several_trunks():
    noise = Noise(runs=0.3, text=0.3, trunks=1.0)
    found = differences(noise, np.random.default_rng(0), trunks=3, seeds=2, comparisons=250)
    assert {one.n for one in found} == {3}
    assert np.mean([abs(one.mean) <= one.half_width() for one in found]) > 0.95 - 4 * math.sqrt(0.95 * 0.05 / 250)


def test_a_difference_of_the_detectable_size_is_seen_in_80_percent():
    one_of = {"trunks": 1, "seeds": 5, "comparisons": 300}
    noise = Noise(runs=0.5, text=1.0)
    sizes = [one.detectable() for one in differences(noise, np.random.default_rng(1), **one_of)]
    effect = float(np.sqrt(np.mean(np.square(sizes))))
    found = differences(noise, np.random.default_rng(2), **one_of, effect=effect)
    assert np.mean([one.mean > one.half_width() for one in found]) == pytest.approx(0.8, abs=0.1)


def test_the_p_value_is_where_the_interval_reaches_zero():
    difference = Difference(mean=0.01, runs=Part(variance=1e-5, freedom=2), text=Part(variance=1e-6, freedom=40), n=3)
    assert difference.half_width(difference.p_value) == pytest.approx(0.01, rel=1e-6)
    assert difference.half_width() == pytest.approx(math.hypot(4.302653 * 1e-5**0.5, 2.021075 * 1e-3), rel=1e-5)
    # One part alone: Student's t. 0.01 / sqrt(1e-5) = 3.1623 on 2 degrees of freedom.
    alone = Difference(mean=0.01, runs=Part(variance=1e-5, freedom=2), text=Part(variance=0.0, freedom=1), n=3)
    assert alone.p_value == pytest.approx(0.0871, abs=1e-4)


def test_more_seeds_narrow_the_part_that_is_theirs():
    difference = Difference(mean=0.0, runs=Part(variance=4e-6, freedom=2), text=Part(variance=1e-6, freedom=40), n=3)
    more = difference.with_more(3)
    assert (more.runs, more.text, more.n) == (Part(variance=2e-6, freedom=5), difference.text, 6)
    assert more.detectable() < difference.detectable()
    with pytest.raises(ValueError, match="at least two units"):
        Difference(mean=0.0, runs=Part(variance=1.0, freedom=1), text=Part(variance=0.0, freedom=1), n=1).with_more(1)


def test_pairing_removes_what_both_arms_share():
    rng = np.random.default_rng(11)
    orders = rng.normal(2, 0.05, (5, 1)) * TEXT.n_bytes_S * rng.lognormal(0, 0.3, len(TEXT.n_bytes_S))
    baseline = {(0, seed): bits_S for seed, bits_S in enumerate(orders)}
    method = {key: bits_S - 0.001 * TEXT.n_bytes_S * (1 + key[1] / 50) for key, bits_S in baseline.items()}
    difference = paired_difference(method, baseline, TEXT)
    assert difference.mean == pytest.approx(-0.00104)
    assert difference.p_value < 1e-3


def test_text_noise_is_that_of_a_ratio():
    # Two groups of 100 and 300 bytes with 0.1 and 0.3 bits per byte more: the mean is 0.25, the deviations -15 and +15
    # bits; 2 / (2 - 1) * (15^2 + 15^2) / 400^2.
    found = text_noise(np.array([[10.0, 90.0]]), np.array([100, 300]), np.array([0, 1]))
    assert found.variance == pytest.approx(2 * 450 / 160_000)
    # What is peculiar to a run counts with the runs and not again: here all of it.
    runs = np.array([[10.0, 90.0], [40.0, 60.0], [25.0, 75.0]])
    assert text_noise(runs, np.array([100, 300]), np.array([0, 1])).variance == 0


def test_the_alike_sections_of_a_document_are_no_draws_of_their_own():
    document_S = np.repeat(np.arange(20), 15)
    bits_S = np.random.default_rng(0).normal(0, 1, 20)[document_S]
    text = Text(n_bytes_S=np.full(300, 1000), document_S=document_S)
    difference = paired_difference({(0, 0): bits_S}, {(0, 0): np.zeros(300)}, text)
    assert difference.text == text_noise(bits_S[None], text.n_bytes_S, document_S)
    assert difference.text.variance > 10 * text_noise(bits_S[None], text.n_bytes_S, np.arange(300)).variance


def test_one_pair_takes_the_twins_rounding_and_none_without_a_twin():
    zero_S, ones_S = np.zeros(len(TEXT.n_bytes_S)), 1.0 * TEXT.n_bytes_S
    twins = {(0, 0): 3e-4 * ones_S, (0, 1): -4e-4 * ones_S, (0, 2): ones_S}
    baseline = {(0, 0): zero_S, (0, 1): zero_S}
    difference = paired_difference({(0, 0): 0.1 * ones_S}, baseline, TEXT, twins)
    # The mean square of the two twins that have a pair.
    assert difference.runs == Part(variance=pytest.approx(12.5e-8), freedom=2)
    assert paired_difference({(0, 0): 0.1 * ones_S}, baseline, TEXT).runs is None
    # Two branches of each of one trunk are units, one branch of each of two trunks too; one run is not.
    assert len(units({(0, 0): 1.0, (0, 1): 2.0})) == len(units({(0, 0): 1.0, (1, 0): 2.0})) == 2


def test_identical_runs_differ_by_nothing():
    same = {(0, seed): 2.0 * TEXT.n_bytes_S for seed in range(3)}
    difference = paired_difference(same, same, TEXT)
    assert (difference.mean, difference.half_width(), difference.p_value, difference.detectable()) == (0, 0, 1, 0)


def test_holm_against_hand_computed_numbers():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.9}) == pytest.approx(
        {"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.9}
    )
    assert holm({}) == {}


def test_holm_keeps_false_verdicts_to_5_percent_of_tables():
    p_values = np.random.default_rng(5).uniform(size=(2000, 4))
    false = np.mean([min(holm(dict(enumerate(row))).values()) < 0.05 for row in p_values])
    assert false == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / 2000))


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=6), st.floats(-5, 5), st.floats(0.1, 8))
def test_interval_moves_and_scales_with_the_values(values, shift, scale):
    interval, moved = t_interval(values), t_interval([scale * value + shift for value in values])
    assert interval.half_width is not None
    assert moved.mean == pytest.approx(scale * interval.mean + shift, abs=1e-9)
    assert moved.half_width == pytest.approx(scale * interval.half_width, abs=1e-9)


def test_only_common_seeds_are_paired():
    bits = {value: value * TEXT.n_bytes_S for value in (1.0, 2.0, 3.0, 99.0)}
    difference = paired_difference(
        {(0, 0): bits[1.0], (0, 1): bits[2.0], (0, 9): bits[99.0]},
        {(0, 0): bits[2.0], (0, 1): bits[3.0], (0, 5): bits[99.0]},
        TEXT,
    )
    assert (difference.mean, difference.n) == (pytest.approx(-1.0), 2)
    with pytest.raises(ValueError, match="no common seeds"):
        paired_difference({(0, 0): bits[1.0]}, {(0, 1): bits[1.0]}, TEXT)


@pytest.mark.parametrize(("values", "confidence"), [([], 0.95), ([1.0, float("nan")], 0.95), ([1.0, 2.0], 1.0)])
def test_bad_input_is_refused(values, confidence):
    with pytest.raises(ValueError):
        t_interval(values, confidence)

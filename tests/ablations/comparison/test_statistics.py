"""Statistics by simulation: the interval covers what it says, and a no-op earns a verdict in about 5 % of
comparisons."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ablations.comparison.statistics import (
    BETTER,
    NO_VERDICT,
    NOT_SEPARABLE,
    WORSE,
    Interval,
    mean_interval,
    noise_statement,
    paired_difference,
    t_interval,
    units,
    verdict,
)

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


@pytest.mark.parametrize("n", [3, 5])
def test_a_no_op_earns_a_verdict_in_5_percent_half_on_each_side(n):
    rng = np.random.default_rng(100 + n)
    verdicts = [
        verdict(paired_difference(runs(rng.normal(2, 0.01, n)), runs(rng.normal(2, 0.01, n)))) for _ in range(REPEATS)
    ]
    better, worse = verdicts.count(BETTER) / REPEATS, verdicts.count(WORSE) / REPEATS
    assert abs(better + worse - 0.05) < TOLERANCE
    assert abs(better - worse) < TOLERANCE


def test_trunk_means_keep_the_false_positive_rate_where_pooled_runs_would_not():
    rng = np.random.default_rng(7)
    nested = pooled = 0
    for _ in range(REPEATS):
        # The method's effect differs from trunk to trunk with mean zero; each trunk has four branches.
        difference = rng.normal(0, 1, (3, 1)) + rng.normal(0, 0.3, (3, 4))
        nested += verdict(paired_difference(runs(difference), runs(np.zeros((3, 4))))) != NOT_SEPARABLE
        pooled += verdict(t_interval([float(value) for value in difference.ravel()])) != NOT_SEPARABLE
    assert abs(nested / REPEATS - 0.05) < TOLERANCE
    assert pooled / REPEATS > 0.2


def test_pairing_removes_what_both_arms_share():
    rng = np.random.default_rng(11)
    found = 0
    for _ in range(300):
        order = rng.normal(0, 0.05, 5)
        found += (
            verdict(paired_difference(runs(2.0 + order - 0.01 + rng.normal(0, 0.002, 5)), runs(2.0 + order))) == BETTER
        )
    assert found > 290


def test_one_seed_gives_neither_interval_nor_verdict():
    difference = paired_difference({(0, 0): 1.9}, {(0, 0): 2.0})
    assert difference == Interval(mean=pytest.approx(-0.1), half_width=None, n=1)
    assert verdict(difference) == NO_VERDICT
    # Two branches of each of one trunk are units, one branch of each of two trunks too; one run is not.
    assert len(units({(0, 0): 1.0, (0, 1): 2.0})) == len(units({(0, 0): 1.0, (1, 0): 2.0})) == 2


def test_identical_runs_are_not_separable():
    assert verdict(paired_difference(runs([2.0, 2.1, 2.2]), runs([2.0, 2.1, 2.2]))) == NOT_SEPARABLE


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=6), st.floats(-5, 5), st.floats(0.1, 8))
def test_interval_moves_and_scales_with_the_values(values, shift, scale):
    interval, moved = t_interval(values), t_interval([scale * value + shift for value in values])
    assert interval.half_width is not None
    assert moved.mean == pytest.approx(scale * interval.mean + shift, abs=1e-9)
    assert moved.half_width == pytest.approx(scale * interval.half_width, abs=1e-9)


def test_only_common_seeds_are_paired():
    difference = paired_difference({(0, 0): 1.0, (0, 1): 2.0, (0, 9): 99.0}, {(0, 0): 2.0, (0, 1): 3.0, (0, 5): -99.0})
    assert (difference.mean, difference.n) == (-1.0, 2)
    with pytest.raises(ValueError, match="no common seeds"):
        paired_difference({(0, 0): 1.0}, {(0, 1): 1.0})


@pytest.mark.parametrize(("values", "confidence"), [([], 0.95), ([1.0, float("nan")], 0.95), ([1.0, 2.0], 1.0)])
def test_bad_input_is_refused(values, confidence):
    with pytest.raises(ValueError):
        t_interval(values, confidence)


def test_the_statement_names_the_noise():
    assert "not trunk noise" in noise_statement(1, 3)
    assert "hold trunk noise" in noise_statement(4, 3)
    assert "no verdict" in noise_statement(1, 1)

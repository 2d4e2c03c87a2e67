"""A gate's answers on made-up differences whose truth is known, and how often it errs."""

import numpy as np
import pytest

from ablations.comparison.statistics import NO_NOISE, Difference, Noise, Text, paired_difference
from ablations.gate.decision import GateConfig, decide, error_of_look, judge, looks_of


def difference(mean, standard_error=0.001, freedom=7):
    return Difference(mean=mean, runs=Noise(variance=standard_error**2, freedom=freedom), text=NO_NOISE, n=freedom + 1)


def answer(mean, margin=0.0, shock=None):
    return judge(difference(mean), shock, seeds=8, margin=margin, error=0.01)


def test_answers_follow_the_side_of_the_margin_on_which_the_interval_lies():
    # Half a width of 3.5 standard errors: 0.0035.
    assert answer(-0.01).answer == "keep"
    assert answer(0.01).answer == "discard"
    assert answer(0.002).answer == answer(-0.002).answer == "unresolved"
    # Better, but not by so much; worse, but by no more than is accepted.
    assert answer(-0.01, margin=0.02).answer == "discard"
    assert answer(-0.01, margin=0.008).answer == "unresolved"
    assert answer(0.005, margin=-0.01).answer == "keep"
    look = answer(-0.01)
    assert look.level == pytest.approx(0.99)
    assert (look.low + look.high) / 2 == pytest.approx(-0.01)
    assert look.high - look.low == pytest.approx(2 * 3.4995 * 0.001, rel=1e-4)
    assert 0.0035 < look.detectable < 0.006


def test_a_fork_that_withholds_a_verdict_leaves_the_gate_unresolved_and_ends_it():
    assert answer(-0.01, shock=0.009).answer == "keep"
    look = answer(-0.01, shock=-0.02)
    assert (look.answer, look.withheld) == ("unresolved", True)
    assert look.words == "withheld: the fork itself moved the loss by -0.020"
    # What counts is whether the shock reaches the margin.
    assert answer(-0.01, margin=-0.02, shock=-0.02).answer == "keep"
    assert answer(-0.02, margin=0.01, shock=-0.015).withheld
    # An unclear difference is unresolved by itself, and more seeds may clear it.
    assert not answer(-0.001, shock=-0.02).withheld
    assert decide((3, 5), lambda _: look) == [look]


def test_looks_end_with_the_first_answer():
    made_up = {3: difference(-0.004, 0.003, 2), 5: difference(-0.005, 0.0005, 4), 8: difference(0.0)}

    def look(seeds):
        return judge(made_up[seeds], None, seeds=seeds, margin=0.0, error=0.01)

    taken = decide((3, 5, 8), look)
    assert [(one.seeds, one.answer) for one in taken] == [(3, "unresolved"), (5, "keep")]
    made_up[5] = made_up[3]
    assert [one.answer for one in decide((3, 5, 8), look)] == ["unresolved"] * 3


def test_looks_grow_to_what_may_be_trained():
    assert looks_of(8) == (3, 5, 8)
    assert looks_of(2) == (2,)
    assert looks_of(3) == (3,)
    assert looks_of(10) == (3, 5, 8, 10)
    with pytest.raises(ValueError, match="--seeds 1: a gate needs at least 2"):
        looks_of(1)


def test_errors_of_all_looks_of_all_tries_stay_below_their_sum():
    assert error_of_look(0.05, n_looks=1, number=1) == 0.025
    spent = [3 * error_of_look(0.05, n_looks=3, number=number) for number in range(1, 1000)]
    assert sorted(spent, reverse=True) == spent
    assert 0.0499 < sum(spent) < 0.05
    # However small, an interval and what it can see come of it.
    for freedom in (1, 2, 7):
        look = judge(difference(0.0, 1.0, freedom), None, seeds=2, margin=0.0, error=spent[500] / 3)
        assert 0 < look.high < np.inf
        assert look.high / 2 < look.detectable < 2 * look.high


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"margin": float("nan")}, "margin"),
        ({"error": 0.0}, "error"),
        ({"error": 1.0}, "error"),
        ({"error": float("inf")}, "error"),
    ],
)
def test_nonsense_is_refused_by_name(change, field):
    with pytest.raises(ValueError, match=rf"GateConfig\.{field}"):
        GateConfig(**change)


@pytest.mark.parametrize("margin", [0.0, 0.01])
def test_wrong_answers_over_all_looks_are_no_more_frequent_than_asked(margin):
    """The true difference is minus the margin: every answer is wrong. Noise of seeds and of documents, both large."""
    rng, n_trials, error, looks = np.random.default_rng(0), 400, 0.1, looks_of(5)
    text = Text(n_bytes_S=np.full(24, 100), document_S=np.arange(24) // 2)
    wrong = 0
    for _ in range(n_trials):
        bits_US = 100 * (rng.normal(-margin, 0.02, (looks[-1], 1)) + np.repeat(rng.normal(0, 0.05, (1, 12)), 2, axis=1))
        method = {(0, seed): bits_S for seed, bits_S in enumerate(bits_US)}
        zero = {key: np.zeros(24) for key in method}

        def look(seeds, method=method, zero=zero):
            pairs = {key: bits_S for key, bits_S in method.items() if key[1] < seeds}
            found = paired_difference(pairs, zero, text)
            return judge(found, None, seeds=seeds, margin=margin, error=error / len(looks))

        wrong += decide(looks, look)[-1].answer != "unresolved"
    assert wrong / n_trials <= error
    assert wrong / n_trials > error / 10

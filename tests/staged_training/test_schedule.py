import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from staged_training.schedule import DECAY_SHAPES, Schedule


def test_known_values():
    schedule = Schedule(peak=1.0, warmup_steps=4, decay_steps=4)
    assert [schedule.value(step, 12) for step in range(13)] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]
    root = Schedule(peak=2.0, decay_steps=4, decay_shape="1-sqrt")
    assert [root.value(step, 4) for step in range(5)] == pytest.approx(
        [2, 1, 2 * (1 - math.sqrt(0.5)), 2 * (1 - math.sqrt(0.75)), 0]
    )


@settings(deadline=None)
@given(
    warmup=st.integers(0, 20),
    stable=st.integers(0, 20),
    decay=st.integers(0, 20),
    shape=st.sampled_from(DECAY_SHAPES),
    peak=st.floats(1e-5, 1.0),
)
def test_rises_stays_falls(warmup, stable, decay, shape, peak):
    n_steps = warmup + stable + decay
    schedule = Schedule(peak=peak, warmup_steps=warmup, decay_steps=decay, decay_shape=shape)
    values = [schedule.value(step, n_steps) for step in range(n_steps)]
    assert all(0 < value <= peak for value in values)
    assert values[:warmup] == sorted(values[:warmup])
    assert all(value == peak for value in values[warmup : warmup + stable])
    assert values[warmup:] == sorted(values[warmup:], reverse=True)
    if decay:
        assert schedule.value(n_steps, n_steps) == 0
    if warmup:
        assert values[warmup - 1] == pytest.approx(peak)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"decay_shape": "linaer"}, "did you mean 'linear'"),
        ({"anneal": "merged"}, "did you mean 'merge'"),
        ({"peak": 0.0}, "peak: 0.0"),
        ({"peak": math.nan}, "nan"),
        ({"warmup_steps": -1}, "warmup_steps: -1"),
    ],
)
def test_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**wrong)


@pytest.mark.parametrize("shape", DECAY_SHAPES)
@pytest.mark.parametrize(("decay", "stable"), [(1, 0), (5, 3), (40, 0)])
def test_merging_counts_every_update_as_much_as_the_decay(shape, decay, stable):
    decayed = Schedule(peak=0.5, warmup_steps=2, decay_steps=decay, decay_shape=shape)
    merged, n_steps = dataclasses.replace(decayed, anneal="merge"), 2 + stable + decay
    shares = [merged.merged_share(done, n_steps) for done in range(n_steps + 1)]
    assert sum(shares) == pytest.approx(1)
    assert not any(shares[: n_steps - decay + 1])
    if shape == "linear":
        assert shares[-decay:] == pytest.approx([1 / decay] * decay)
    for step in range(2, n_steps):
        assert merged.value(step, n_steps) == 0.5
        # An update is in all weights behind it.
        assert 0.5 * sum(shares[step + 1 :]) == pytest.approx(decayed.value(step, n_steps))
    assert [merged.value(step, n_steps) for step in range(2)] == [0.25, 0.5]
    assert not any(decayed.merged_share(done, n_steps) for done in range(n_steps + 1))

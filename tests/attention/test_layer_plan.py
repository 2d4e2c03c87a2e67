import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.build import LAYERS
from attention.plan import LETTERS, OWNER, LayerPlan


def test_yi_lightning_plan_repeats_and_shares():
    plan = LayerPlan.parse("SSSFSSSR", 16)
    assert "".join(plan.letters) == "SSSFSSSR" * 2
    assert plan.source == (0, 1, 2, 3, 4, 5, 6, 3, 8, 9, 10, 11, 12, 13, 14, 11)


def test_pattern_is_cut_at_the_depth():
    assert LayerPlan.parse("SSSF", 6).letters == ("S", "S", "S", "F", "S", "S")


def test_window_layers_are_reused_by_r_and_full_ones_by_R():
    assert LayerPlan.parse("FSrRSr", 6).source == (0, 1, 1, 0, 4, 4)


@settings(deadline=None)
@given(st.text(alphabet="".join(LETTERS), min_size=1, max_size=8), st.integers(1, 20))
def test_source_is_the_nearest_owner_below(pattern, n_layers):
    letters = [pattern[index % len(pattern)] for index in range(n_layers)]
    expected = []
    for index, letter in enumerate(letters):
        owners = [below for below in range(index + 1) if letters[below] == OWNER.get(letter, letter)]
        expected.append(owners[-1] if owners else None)
    if None in expected:
        with pytest.raises(ValueError, match=f"at place {expected.index(None)} .*needs '[FS]' below it"):
            LayerPlan.parse(pattern, n_layers)
    else:
        assert LayerPlan.parse(pattern, n_layers).source == tuple(expected)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("SSXF", r"'X' at place 2.*F \(full.*K \(Kimi"),
        ("f", "'f' at place 0"),
        ("", "empty"),
        ("F F", "' ' at place 1"),
    ],
)
def test_wrong_letters_are_named_with_their_place(pattern, message):
    with pytest.raises(ValueError, match=message):
        LayerPlan.parse(pattern, 4)


def test_no_layers_is_refused():
    with pytest.raises(ValueError, match="n_layers=0"):
        LayerPlan.parse("F", 0)


def test_every_letter_can_be_built():
    assert set(LAYERS) == set(LETTERS)

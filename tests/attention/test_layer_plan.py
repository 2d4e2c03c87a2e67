import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import AttentionConfig
from attention.kinds import KINDS
from attention.plan import LayerPlan


def test_yi_lightning_plan_repeats_and_shares():
    plan = LayerPlan.parse("SSSFSSSR", 16)
    assert "".join(plan.letters) == "SSSFSSSR" * 2
    assert plan.source == (0, 1, 2, 3, 4, 5, 6, 3, 8, 9, 10, 11, 12, 13, 14, 11)


def test_pattern_is_cut_at_the_depth():
    assert LayerPlan.parse("SSSF", 6).letters == ("S", "S", "S", "F", "S", "S")


def test_window_layers_are_reused_by_r_and_full_ones_by_R():
    assert LayerPlan.parse("FSrRSr", 6).source == (0, 1, 1, 0, 4, 4)


@settings(deadline=None)
@given(st.text(alphabet="".join(KINDS), min_size=1, max_size=8), st.integers(1, 20))
def test_source_is_the_nearest_owner_below(pattern, n_layers):
    letters = [pattern[index % len(pattern)] for index in range(n_layers)]
    expected = []
    for index, letter in enumerate(letters):
        owners = [below for below in range(index + 1) if letters[below] == (KINDS[letter].reads or letter)]
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


SHARING = AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=16, window=8)


@pytest.mark.parametrize(
    ("pattern", "change", "message"),
    [
        (
            "FR",
            {"n_kv_heads": 4},
            r"layer 1 \(R\) reads .* of layer 0 \(F\), but n_kv_heads is 4, not 2; legal: the same",
        ),
        ("FR", {"head_dim": 8, "rope_base": 5e5}, r"head_dim is 8, not 16; rope_base is 500000.0, not 10000.0"),
        ("FR", {"rotary_fraction": 0.5}, r"rotary_fraction is 0.5, not 1.0"),
        ("FLR", {"rotary_fraction": 0.0}, r"layer 2 \(R\) reads the keys and values of layer 0 \(F\)"),
        ("Sr", {"window": 4}, r"layer 1 \(r\) reads .* of layer 0 \(S\), but window is 4, not 8"),
    ],
)
def test_a_layer_must_agree_with_the_one_whose_keys_and_values_it_reads(pattern, change, message):
    own = [SHARING] * (len(pattern) - 1)
    with pytest.raises(ValueError, match=message):
        LayerPlan.parse(pattern, len(pattern)).check([*own, dataclasses.replace(SHARING, **change)])


def test_what_a_layer_does_not_share_may_differ():
    other = dataclasses.replace(SHARING, n_heads=8, window=3, output_gate=True, sink_logits=True, qk_norm=False)
    LayerPlan.parse("FRS", 3).check([SHARING, other, dataclasses.replace(other, n_kv_heads=1, rotary_fraction=0.0)])


def test_one_configuration_per_layer():
    with pytest.raises(ValueError, match="1 attention configurations for 2 layers; legal: one each"):
        LayerPlan.parse("F", 2).check([SHARING])

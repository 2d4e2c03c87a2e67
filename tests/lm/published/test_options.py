"""Options that published models need: combinations that make no sense are refused by name."""

import pytest

from attention.config import AttentionConfig
from lm.config import ModelConfig
from moe.config import MoEConfig

LEGAL = {"qk_norm_whole": True, "unit_offset": True}


@pytest.mark.parametrize("option", LEGAL)
def test_options_of_the_norm_of_queries_need_it(option):
    with pytest.raises(ValueError, match=f"AttentionConfig.{option}: True without qk_norm"):
        AttentionConfig(qk_norm=False, **{option: True})


@pytest.mark.parametrize("option", LEGAL)
def test_a_mixed_layer_refuses_what_it_does_not_have(option):
    with pytest.raises(ValueError, match=rf"AttentionConfig.{option}: .*legal in a mixed layer \(M\)"):
        ModelConfig(layer_plan="M", attention=AttentionConfig(**{option: LEGAL[option]}))


def test_heads_of_keys_have_to_fit():
    with pytest.raises(ValueError, match="linear_key_heads: 3; legal: a divisor of the 4 linear heads"):
        AttentionConfig(linear_key_heads=3)
    with pytest.raises(ValueError, match="linear_key_heads: 2; legal in a layer of kind K"):
        ModelConfig(layer_plan="K", attention=AttentionConfig(linear_key_heads=2))


def test_a_gate_needs_a_shared_expert():
    with pytest.raises(ValueError, match=r"MoEConfig\.shared_gate"):
        MoEConfig(shared_gate=True)

"""Options that published models need: combinations that make no sense are refused by name."""

import pytest

from attention.config import AttentionConfig
from lm.config import ModelConfig


def refused(**attention):
    """What a mixed layer says to these options."""
    with pytest.raises(ValueError) as refusal:
        ModelConfig(layer_plan="M", attention=AttentionConfig(**attention))
    return str(refusal.value)


def test_illegal_combinations_are_refused_by_name():
    with pytest.raises(ValueError, match="qk_norm_whole: True without qk_norm"):
        AttentionConfig(qk_norm_whole=True, qk_norm=False)
    assert "qk_norm_whole: True; legal in a mixed layer (M): False" in refused(qk_norm_whole=True)

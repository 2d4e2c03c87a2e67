import pytest

from attention import AttentionConfig


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_heads": 6, "n_kv_heads": 4}, "n_kv_heads: 4; legal: a divisor of n_heads=6"),
        ({"head_dim": 15}, "head_dim: 15; legal: even"),
        ({"window": 0}, "window: 0, must be at least 1"),
        ({"linear_heads": 0}, "linear_heads: 0, must be at least 1"),
        ({"conv_width": 9}, "conv_width: 9; legal: 2 to 8"),
        ({"chunk_size": 48}, "chunk_size: 48; legal: a power of two"),
        ({"rotary_fraction": 1.5}, "rotary_fraction: 1.5; legal: from 0"),
        ({"head_dim": 32, "rotary_fraction": 0.3}, "turns 9.6 channels"),
        ({"rope_base": 0.0}, "rope_base: 0.0; legal: above 0"),
        ({"norm_eps": float("nan")}, "norm_eps: nan"),
        ({"decay_bound": 0.0}, "decay_bound: 0.0; legal: above 0"),
        ({"head_gate": True, "output_gate": True}, "head_gate: True beside output_gate; legal: one of them"),
    ],
)
def test_refusals_name_the_field_the_value_and_what_is_legal(change, message):
    with pytest.raises(ValueError, match=message):
        AttentionConfig(**change)


def test_linear_shape_follows_the_softmax_heads_unless_given():
    assert AttentionConfig(n_heads=6, n_kv_heads=2, head_dim=64).linear_shape == (6, 64, 64)
    assert AttentionConfig(n_heads=6, n_kv_heads=2, head_dim=64, linear_heads=3, linear_value_dim=128).linear_shape == (
        3,
        64,
        128,
    )


def test_rotary_share_survives_rounding():
    assert AttentionConfig(head_dim=40, rotary_fraction=0.55).rotary_dim == 22

"""The cache formula against published models, by hand, and against the memory that real caches hold."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import AttentionConfig, HybridCache, LayerPlan, cache_bytes
from attention.kinds import KINDS


def test_yi_lightning_saves_82_8125_percent_at_64k():
    config = AttentionConfig(n_heads=32, n_kv_heads=8, head_dim=128, window=4096)
    hybrid = sum(cache_bytes([config] * 48, LayerPlan.parse("SSSFSSSR", 48), 65_536))
    full = sum(cache_bytes([config] * 48, LayerPlan.parse("F", 48), 65_536))
    assert 100 * (1 - hybrid / full) == 82.8125


def test_jamba_52b_keeps_4_gib_at_256k():
    # 4 attention layers of 32; the others are Mamba layers, whose states are not keys and values. L stands in for them
    # here.
    config = AttentionConfig(n_heads=32, n_kv_heads=8, head_dim=128)
    plan = LayerPlan.parse("LLLFLLLL", 32)
    per_layer = cache_bytes([config] * 32, plan, 256 * 1024)
    assert sum(size for size, letter in zip(per_layer, plan.letters) if letter == "F") == 4 * 2**30


def test_each_letter_by_hand():
    config = AttentionConfig(
        n_heads=8,
        n_kv_heads=2,
        head_dim=16,
        window=10,
        linear_heads=3,
        linear_key_dim=4,
        linear_value_dim=5,
        conv_width=4,
    )
    plan, configs = LayerPlan.parse("FSRrLGK", 7), [config] * 7
    state, tail = 3 * 4 * 5 * 4, 3 * (4 + 4 + 5) * 3 * 2
    assert cache_bytes(configs, plan, 7) == [
        2 * 2 * 16 * 2 * 7,
        2 * 2 * 16 * 2 * 7,
        0,
        0,
        state,
        state + tail,
        state + tail,
    ]
    assert cache_bytes(configs, plan, 100, batch_size=3) == [
        3 * 12_800,
        3 * 1_280,
        0,
        0,
        3 * state,
        3 * (state + tail),
        3 * (state + tail),
    ]
    assert cache_bytes(configs, plan, 0) == [0, 0, 0, 0, state, state + tail, state + tail]
    assert cache_bytes(configs, plan, 7, element_size=4)[5] == state + 2 * tail


def test_the_later_letters_by_hand():
    config = AttentionConfig(
        n_heads=8,
        head_dim=16,
        latent_dim=50,
        latent_shared_dim=6,
        linear_heads=4,
        linear_key_dim=4,
        linear_value_dim=5,
        mamba_groups=2,
        short_conv_dim=30,
        conv_width=3,
    )
    plan, configs = LayerPlan.parse("ADC", 3), [config] * 3
    mamba, conv = 4 * 4 * 5 * 4 + (2 * 4 + 2 * 4 + 4 * 5) * 2 * 2, 30 * 2 * 2
    assert cache_bytes(configs, plan, 7) == [(50 + 6) * 2 * 7, mamba, conv]
    assert cache_bytes(configs, plan, 70, batch_size=3) == [3 * (50 + 6) * 2 * 70, 3 * mamba, 3 * conv]


@settings(deadline=None)
@given(
    pattern=st.text(alphabet="".join(KINDS), max_size=6),
    max_length=st.integers(1, 40),
    batch_size=st.integers(1, 3),
    window=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_real_bytes_equal_the_formula_for_any_plan_and_length(pattern, max_length, batch_size, window, dtype):
    config = AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=8, window=window, linear_heads=3, linear_value_dim=10)
    plan = LayerPlan.parse("FS" + pattern, 2 + len(pattern))
    configs = [config] * len(plan.letters)
    cache = HybridCache(configs, plan, batch_size, max_length, dtype)
    expected = cache_bytes(configs, plan, max_length, batch_size, dtype.itemsize)
    assert [layer.nbytes() for layer in cache.layers] == expected
    assert cache.nbytes() == sum(expected)
    cache.reorder(torch.zeros(batch_size, dtype=torch.int64))
    assert cache.nbytes() == sum(expected)


@pytest.mark.parametrize(
    "pattern", [*(kind.letter for kind in KINDS.values() if kind.reads is None), "SSSFSSSR", "SrGLKFRMADC"]
)
def test_bytes_do_not_move_while_decoding(make_stack, tiny, pattern):
    stack = make_stack(pattern, tiny)
    cache = stack.cache(2, 12)
    x_BTD = stack.input(2, 12)
    expected = sum(cache_bytes(stack.configs, stack.plan, 12, 2, element_size=4))
    with torch.no_grad():
        for begin, end in ((0, 7), (7, 8), (8, 12)):
            stack(x_BTD[:, begin:end], cache)
            assert cache.nbytes() == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [({"length": -1}, "length=-1"), ({"batch_size": 0}, "batch_size=0"), ({"element_size": 0}, "element_size=0")],
)
def test_refusals(tiny, change, message):
    with pytest.raises(ValueError, match=message):
        cache_bytes([tiny], LayerPlan.parse("F", 1), **({"length": 1} | change))

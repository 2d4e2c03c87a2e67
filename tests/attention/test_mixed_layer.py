"""The mixed layer: its definition written out head by head, its memory, its heads' shares, its decoding on the
kernels."""

import dataclasses

import pytest
import torch
from torch.nn import functional

import triton_kernels.mixed.mixed_attention
from attention import AttentionConfig, HybridCache, LayerPlan, build_attention, cache_bytes
from attention.kv_states import GrowingKV, RingKV
from attention.lightning import lightning_slopes
from attention.mixed import MixedState


def rms(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("window", [None, 4])
def test_layer_equals_its_definition(make_stack, tiny, window):
    """Without rotary positions, which test_softmax_attention proves; one softmax head and one linear head at a time."""
    config = dataclasses.replace(tiny, mixed_window=window, rotary_fraction=0.0, mixed_linear_heads=2)
    layer = make_stack("M", config, n_layers=3).double().layers[1]
    H, G, J = config.mixed_heads
    assert (H, G, J) == (2, 1, 2)
    T, K, linear_K, linear_V = 11, config.head_dim, *config.linear_shape[1:]
    x_BTD = torch.randn(2, T, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    widths = [H * K, H * K, G * K, G * K, J * linear_K, J * linear_K, J * linear_V, J * linear_V]
    q, gate, k, v, linear_q, linear_k, linear_v, linear_gate = (x_BTD @ layer.to_inner.weight.T).split(widths, -1)
    age_TT = torch.arange(T)[:, None] - torch.arange(T)[None, :]
    heads = []
    for h in range(H):
        q_BTK = rms(q[..., h * K : (h + 1) * K], layer.q_norm.weight, config.norm_eps)
        scores = (q_BTK @ rms(k, layer.k_norm.weight, config.norm_eps).mT / K**0.5).masked_fill(
            (age_TT < 0) | (age_TT >= (window or T)), -torch.inf
        )
        heads.append(scores.exp() / (scores.exp().sum(-1, keepdim=True) + layer.sink_H[h].exp()) @ v)
    softmax = torch.cat(heads, -1) * gate.sigmoid()
    slopes = lightning_slopes(J, 1, 3).double()
    linear = []
    for j in range(J):
        qj, kj = (functional.silu(y[..., j * linear_K : (j + 1) * linear_K]) for y in (linear_q, linear_k))
        vj = functional.silu(linear_v[..., j * linear_V : (j + 1) * linear_V])
        decay_TT = torch.exp(-slopes[j] * age_TT.clamp(min=0)) * (age_TT >= 0)
        linear.append((qj @ kj.mT * decay_TT) @ vj)
    normed = rms(torch.cat(linear, -1), layer.norm.weight, config.norm_eps) * linear_gate.sigmoid()
    expected_BTD = torch.cat([softmax, normed], -1) @ layer.to_out.weight.T
    torch.testing.assert_close(layer(x_BTD)[0], expected_BTD, rtol=0, atol=1e-6)


def test_memory_by_hand_and_its_kinds():
    config = AttentionConfig(
        n_heads=8, n_kv_heads=4, head_dim=16, mixed_linear_heads=6, linear_key_dim=4, linear_value_dim=5
    )
    plan, state = LayerPlan.parse("M", 1), 6 * 4 * 5 * 4
    assert config.mixed_heads == (2, 1, 6)
    assert cache_bytes([config], plan, 100) == [2 * 1 * 16 * 2 * 100 + state]
    ring = dataclasses.replace(config, mixed_window=10)
    assert cache_bytes([ring], plan, 100) == [2 * 1 * 16 * 2 * 10 + state]
    for options, kind in ((config, GrowingKV), (ring, RingKV)):
        cache = HybridCache([options], plan, 3, 100, torch.bfloat16)
        (memory,) = cache.layers
        assert isinstance(memory, MixedState)
        assert isinstance(memory.kv, kind)
        assert cache.nbytes() == 3 * sum(cache_bytes([options], plan, 100))


@pytest.mark.parametrize("window", [None, 4])
def test_decode_reorder_and_crop_keep_both_kinds_of_memory_together(make_stack, tiny, window):
    stack = make_stack("M", dataclasses.replace(tiny, mixed_window=window))
    x_BTD = stack.input(2, 9)
    cache = stack.cache(2, 9)
    with torch.no_grad():
        expected_BTD = stack(x_BTD)
        outputs = [stack(x_BTD[:, begin:end], cache) for begin, end in ((0, 5), (5, 6))]
        cache.reorder(torch.tensor([1, 0]))
        outputs.append(stack(x_BTD[:, 6:].flip(0), cache).flip(0))
        torch.testing.assert_close(torch.cat(outputs, 1), expected_BTD, rtol=0, atol=1e-5)
        with pytest.raises(ValueError, match=r"layer 0 cannot: a linear-attention state"):
            cache.crop(4)
        cache.crop(0)
        torch.testing.assert_close(stack(x_BTD, cache), expected_BTD, rtol=0, atol=1e-5)


def test_decode_on_the_kernels_equals_the_forward(make_stack, tiny, monkeypatch):
    stack = make_stack("M", tiny)
    x_BTD = stack.input(1, 7)
    cache = stack.cache(1, 7)
    with torch.no_grad():
        expected_BTD = stack(x_BTD)
        outputs = [stack(x_BTD[:, :5], cache)]
        monkeypatch.setattr(triton_kernels.mixed.mixed_attention, "check_backend", lambda backend, x: "triton")
        outputs += [stack(x_BTD[:, t : t + 1], cache) for t in (5, 6)]
    torch.testing.assert_close(torch.cat(outputs, 1), expected_BTD, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"n_heads": 1, "n_kv_heads": 1},
            "mixed_linear_heads: 0 of n_heads=1; legal: at least one head of either kind",
        ),
        ({"mixed_linear_heads": 4}, "mixed_linear_heads: 4 of n_heads=4"),
        ({"n_heads": 12, "n_kv_heads": 6, "mixed_linear_heads": 7}, "leaves 5 softmax heads for 2 of n_kv_heads=6"),
    ],
)
def test_shares_of_heads_that_cannot_be_are_refused(tiny, change, message):
    config = dataclasses.replace(tiny, **change)
    with pytest.raises(ValueError, match=message):
        build_attention("M", config, d_model=32, layer_index=0, n_layers=1)
    with pytest.raises(ValueError, match=message):
        LayerPlan.parse("FM", 2).check([tiny, config])
    # Only a mixed layer minds.
    LayerPlan.parse("FM", 2).check([config, tiny])

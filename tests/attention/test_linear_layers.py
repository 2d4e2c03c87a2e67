"""The linear layers and the short convolution against their definitions, written out token by token here."""

import dataclasses

import pytest
import torch
from torch.nn import functional

from attention import build_attention
from attention.lightning import lightning_slopes


def test_lightning_slopes_follow_the_formula():
    n_layers = 5
    for layer in range(n_layers):
        expected = [(2 ** (-8 / 6)) ** (h + 1) * (1 - layer / (n_layers - 1 + 1e-5) + 1e-5) for h in range(6)]
        torch.testing.assert_close(lightning_slopes(6, layer, n_layers), torch.tensor(expected))
    assert lightning_slopes(8, 0, 1).isfinite().all()
    # Even the top layer's states forget a little: a log-decay is never above 0.
    assert (lightning_slopes(8, n_layers - 1, n_layers) > 0).all()


@pytest.mark.parametrize("layer_index", [0, 2])
def test_lightning_layer_equals_its_definition(make_stack, tiny, layer_index):
    stack = make_stack("L", tiny, n_layers=4).double()
    layer = stack.layers[layer_index]
    x_BTD = stack.input(2, 11, dtype=torch.float64)
    H, K, V = tiny.linear_shape
    q_W, k_W, v_W, gate_W = layer.to_inner.weight.split([H * K, H * K, H * V, H * V])
    q, k, v = (functional.silu(x_BTD @ w.T).unflatten(-1, (H, -1)) for w in (q_W, k_W, v_W))
    decay_H = torch.exp(-lightning_slopes(H, layer_index, 4).double())
    state = torch.zeros(2, H, K, V, dtype=torch.float64)
    outputs = []
    for t in range(11):
        state = decay_H[:, None, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]).flatten(1))
    o = torch.stack(outputs, dim=1)
    normed = o / (o.square().mean(-1, keepdim=True) + tiny.norm_eps).sqrt() * layer.norm.weight
    expected_BTD = (torch.sigmoid(x_BTD @ gate_W.T) * normed) @ layer.to_out.weight.T
    torch.testing.assert_close(layer(x_BTD)[0], expected_BTD, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bound", [None, 0.7])
@pytest.mark.parametrize("letter", ["G", "K"])
def test_delta_rule_layers_equal_their_definition(make_stack, tiny, letter, bound):
    stack = make_stack(letter, dataclasses.replace(tiny, decay_bound=bound)).double()
    layer = stack.layers[0]
    x_BTD = stack.input(2, 11, dtype=torch.float64)
    H, K, V = tiny.linear_shape
    channels = H * (2 * K + V)
    if letter == "G":
        qkv_W, gate_W, a_W, b_W = layer.to_inner.weight.split([channels, H * V, H, H])
        # One decay per head, the same for all its key channels.
        a, gate = (x_BTD @ a_W.T)[..., None].expand(2, 11, H, K), functional.silu(x_BTD @ gate_W.T)
        bias = layer.decay_gate.dt_bias[:, None]
    else:
        qkv_W, gate_W, a_W, b_W = layer.to_inner.weight.split([channels, V, K, H])
        a, gate = (
            (x_BTD @ a_W.T @ layer.to_decay.weight.T).view(2, 11, H, K),
            torch.sigmoid(x_BTD @ gate_W.T @ layer.to_gate.weight.T),
        )
        bias = layer.decay_gate.dt_bias.view(H, K)
    padded = functional.pad(x_BTD @ qkv_W.T, (0, 0, tiny.conv_width - 1, 0))
    mixed = functional.silu(sum(layer.conv_XW[:, w] * padded[:, w : w + 11] for w in range(tiny.conv_width)))
    q, k, v = (x.unflatten(-1, (H, -1)) for x in mixed.split([H * K, H * K, H * V], dim=-1))
    # Unit length up to the 1e-6 that keeps an all-zero row finite.
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    rate = layer.decay_gate.A_log_H.exp()[:, None]
    decay = torch.exp(
        -rate * functional.softplus(a + bias) if bound is None else -bound * (rate * (a + bias)).sigmoid()
    )
    beta = torch.sigmoid(x_BTD @ b_W.T)
    state = torch.zeros(2, H, K, V, dtype=torch.float64)
    eye = torch.eye(K, dtype=torch.float64)
    outputs = []
    for t in range(11):
        kt, bt = k[:, t], beta[:, t, :, None, None]
        state = (eye - bt * kt[..., :, None] * kt[..., None, :]) @ (decay[:, t, :, :, None] * state) + bt * kt[
            ..., :, None
        ] * v[:, t, :, None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * K**-0.5)
    o = torch.stack(outputs, dim=1)
    normed = o / (o.square().mean(-1, keepdim=True) + tiny.norm_eps).sqrt() * layer.norm.weight
    torch.testing.assert_close(layer(x_BTD)[0], (normed.flatten(2) * gate) @ layer.to_out.weight.T, rtol=0, atol=1e-6)


@pytest.mark.parametrize("letter", ["G", "K"])
def test_delta_rule_layers_start_with_decays_in_the_documented_range(make_stack, tiny, letter):
    generator = torch.Generator().manual_seed(0)
    layer = make_stack(letter, tiny).layers[0]
    rates, steps = [], []
    for _ in range(100):
        layer.init_weights(generator)
        rates.append(layer.decay_gate.A_log_H.exp())
        steps.append(functional.softplus(layer.decay_gate.dt_bias))
    rates, steps = torch.cat(rates), torch.cat(steps)
    assert rates.min() >= 1
    assert rates.max() <= 16
    assert rates.mean().item() == pytest.approx(8.5, rel=0.1)
    assert steps.min() >= 0.999e-3
    assert steps.max() <= 1.001e-1
    # Log-uniform: half of them below the geometric mean of the range.
    assert (steps < 1e-2).float().mean().item() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("letter", ["G", "K"])
def test_bounded_decays_start_as_those_without_a_bound_and_stay_above_it(make_stack, tiny, letter):
    plain, bounded = (make_stack(letter, dataclasses.replace(tiny, decay_bound=b)).layers[0] for b in (None, 5.0))
    for layer in (plain, bounded):
        layer.init_weights(torch.Generator().manual_seed(0))
    zeros = torch.zeros(1, plain.decay_gate.dt_bias.numel())
    torch.testing.assert_close(bounded.decay_gate(zeros), plain.decay_gate(zeros), rtol=1e-4, atol=1e-7)
    far = bounded.decay_gate(zeros + 1e4)
    assert far.min() >= -5.0 > plain.decay_gate(zeros + 1e4).max()


def test_states_stay_fp32_when_the_model_computes_in_bf16(make_stack, tiny):
    stack = make_stack("LGKD", tiny)
    cache = stack.cache(1, 8, torch.bfloat16)
    with torch.no_grad():
        y_BTD = stack(stack.input(1, 5, dtype=torch.bfloat16), cache)
    assert y_BTD.dtype == torch.bfloat16
    assert [state.tensors["state"].dtype for state in cache.layers] == [torch.float32] * 4
    assert [state.tensors["tail"].dtype for state in cache.layers[1:]] == [torch.bfloat16] * 3


def test_mamba_2_equals_its_definition(make_stack, tiny):
    stack = make_stack("D", tiny).double()
    layer = stack.layers[0]
    x_BTD = stack.input(2, 11, dtype=torch.float64)
    (H, K, V), G = tiny.linear_shape, tiny.mamba_groups
    conv_W, gate_W, step_W = layer.to_inner.weight.split([2 * G * K + H * V, H * V, H])
    padded = functional.pad(x_BTD @ conv_W.T, (0, 0, tiny.conv_width - 1, 0))
    mixed = sum(layer.conv_XW[:, w] * padded[:, w : w + 11] for w in range(tiny.conv_width)) + layer.conv_bias_X
    q, k, v = (
        x.unflatten(-1, (n, -1)) for x, n in zip(functional.silu(mixed).split([G * K, G * K, H * V], -1), (G, G, H))
    )
    step = functional.softplus(x_BTD @ step_W.T + layer.decay_gate.dt_bias)
    outputs = torch.zeros(2, 11, H, V, dtype=torch.float64)
    for h in range(H):
        group, state = h * G // H, torch.zeros(2, K, V, dtype=torch.float64)
        for t in range(11):
            decay = torch.exp(-layer.decay_gate.A_log_H[h].exp() * step[:, t, h])
            state = decay[:, None, None] * state
            state = state + step[:, t, h, None, None] * k[:, t, group, :, None] * v[:, t, h, None]
            outputs[:, t, h] = torch.einsum("bkv,bk->bv", state, q[:, t, group]) + layer.skip_H[h] * v[:, t, h]
    gated = (outputs.flatten(2) * functional.silu(x_BTD @ gate_W.T)).unflatten(-1, (G, -1))
    normed = gated / (gated.square().mean(-1, keepdim=True) + tiny.norm_eps).sqrt()
    expected_BTD = (normed.flatten(2) * layer.norm_X) @ layer.to_out.weight.T
    torch.testing.assert_close(layer(x_BTD)[0], expected_BTD, rtol=0, atol=1e-6)


def test_a_mamba_2_layer_in_bf16_stays_within_bf16_of_fp32_over_a_long_text(make_stack, tiny):
    """Time steps, decays and the state are fp32: what they sum up does not drift."""
    stack = make_stack("D", tiny)
    layer, x_BTD = stack.layers[0], stack.input(1, 700)
    exact_BTD, rounded_BTD = layer(x_BTD)[0], layer(x_BTD.bfloat16())[0]
    error_T = (rounded_BTD.float() - exact_BTD).abs().amax((0, 2))
    assert error_T.max() <= 2**-4 * exact_BTD.abs().max()
    assert error_T[600:].mean() <= 1.5 * error_T[:100].mean()


@pytest.mark.parametrize("taps", [2, 3, 8])
def test_the_short_convolution_equals_its_definition(make_stack, tiny, taps):
    stack = make_stack("C", dataclasses.replace(tiny, conv_width=taps)).double()
    layer, x_BTD = stack.layers[0], stack.input(2, 11, dtype=torch.float64)
    before, behind, u = (x_BTD @ layer.to_inner.weight.T).chunk(3, dim=-1)
    padded = functional.pad(before * u, (0, 0, taps - 1, 0))
    mixed = sum(layer.conv_XW[:, w] * padded[:, w : w + 11] for w in range(taps))
    expected_BTD = (behind * mixed) @ layer.to_out.weight.T
    torch.testing.assert_close(layer(x_BTD)[0], expected_BTD, rtol=0, atol=1e-12)


def test_groups_of_a_mamba_2_layer_divide_its_heads(tiny):
    with pytest.raises(ValueError, match=r"mamba_groups: 2; legal: a divisor of the 3 heads of a linear layer"):
        build_attention("D", dataclasses.replace(tiny, mamba_groups=2), d_model=8, layer_index=0, n_layers=1)

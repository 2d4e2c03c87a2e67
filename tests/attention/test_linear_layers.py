"""Lightning, gated DeltaNet and Kimi delta attention layers against their definitions, written out token by token
here."""

import pytest
import torch
from torch.nn import functional

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


@pytest.mark.parametrize("letter", ["G", "K"])
def test_delta_rule_layers_equal_their_definition(make_stack, tiny, letter):
    stack = make_stack(letter, tiny).double()
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
    decay = torch.exp(-layer.decay_gate.A_log_H.exp()[:, None] * functional.softplus(a + bias))
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


def test_states_stay_fp32_when_the_model_computes_in_bf16(make_stack, tiny):
    stack = make_stack("LGK", tiny)
    cache = stack.cache(1, 8, torch.bfloat16)
    with torch.no_grad():
        y_BTD = stack(stack.input(1, 5, dtype=torch.bfloat16), cache)
    assert y_BTD.dtype == torch.bfloat16
    assert [state.tensors["state"].dtype for state in cache.layers] == [torch.float32] * 3
    assert [state.tensors["tail"].dtype for state in cache.layers[1:]] == [torch.bfloat16] * 2

"""Latent attention against its definition, written out head by head here; what its options leave out; refusals."""

import dataclasses

import pytest
import torch

from attention import build_attention
from attention.latent import latent_shape
from triton_kernels.softmax.rotary import rotary_tables, rotate


def normed(x, norm):
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


@pytest.mark.parametrize("query_dim", [None, 18])
@pytest.mark.parametrize("rotary_fraction", [0.0, 0.5, 1.0])
def test_it_equals_its_definition(make_stack, tiny, query_dim, rotary_fraction):
    config = dataclasses.replace(tiny, latent_query_dim=query_dim, rotary_fraction=rotary_fraction)
    stack = make_stack("A", config).double()
    layer, x_BTD = stack.layers[0], stack.input(2, 9, dtype=torch.float64)
    H, K, R, V, C, turned = latent_shape(config)
    assert (K, R, V, C, turned) == (8, 12, 14, 20, 12 * rotary_fraction)
    q, latent, shared = (x_BTD @ layer.to_inner.weight.T).split(layer.widths, dim=-1)
    if query_dim:
        q = normed(q, layer.q_norm) @ layer.to_query.weight.T
    tables = rotary_tables(torch.arange(9), rotary_dim=turned, base=config.rope_base)
    q, shared = rotate(q.view(2, 9, H, R + K), tables), rotate(shared[:, :, None], tables)[:, :, 0]
    heads = (normed(latent, layer.kv_norm) @ layer.to_heads.weight.T).split([H * K, H * V], dim=-1)
    keys, values = (x.unflatten(-1, (H, -1)) for x in heads)
    outputs = torch.zeros(2, 9, H, V, dtype=torch.float64)
    for h in range(H):
        for t in range(9):
            key = torch.cat([shared[:, : t + 1], keys[:, : t + 1, h]], dim=-1)
            weights = (torch.einsum("bk,bsk->bs", q[:, t, h], key) * (R + K) ** -0.5).softmax(-1)
            outputs[:, t, h] = torch.einsum("bs,bsv->bv", weights, values[:, : t + 1, h])
    torch.testing.assert_close(layer(x_BTD)[0], outputs.flatten(2) @ layer.to_out.weight.T, rtol=0, atol=1e-12)


def test_without_positions_only_the_set_of_earlier_tokens_matters(make_stack, tiny):
    stack = make_stack("A", dataclasses.replace(tiny, rotary_fraction=0.0))
    x_BTD = stack.input(1, 7)
    shuffled_BTD = x_BTD[:, [3, 1, 0, 5, 2, 4, 6]]
    layer = stack.layers[0]
    torch.testing.assert_close(layer(shuffled_BTD)[0][:, -1], layer(x_BTD)[0][:, -1])


def test_sizes_that_are_not_set_are_those_of_deepseek_v2(tiny):
    unset = {f"latent_{name}_dim": None for name in ("shared", "value", "query")}
    config = dataclasses.replace(tiny, head_dim=128, latent_dim=None, rotary_fraction=1.0, **unset)
    assert latent_shape(config) == (4, 128, 64, 128, 512, 64)


def test_an_odd_number_of_turned_channels_is_refused(tiny):
    with pytest.raises(ValueError, match=r"latent_shared_dim: 6, of which rotary_fraction=0.5 turns 3 channels; legal"):
        build_attention("A", dataclasses.replace(tiny, latent_shared_dim=6), d_model=8, layer_index=0, n_layers=1)


def test_a_decode_step_makes_no_keys_and_values_of_heads(make_stack, tiny):
    """Absorbed: what a step holds does not grow by H (K + V) numbers per token of the text."""
    stack = make_stack("A", tiny)
    cache, calls = stack.cache(1, 9), []
    stack.layers[0].to_heads.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        stack(stack.input(1, 8), cache)
        assert len(calls) == 1
        stack(stack.input(1, 1), cache)
    assert len(calls) == 1

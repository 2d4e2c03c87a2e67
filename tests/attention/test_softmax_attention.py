"""Full and sliding-window layers against a dense masked reference written out here, rotary positions, and sharing of
keys and values."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.layer_states import KV


def rms(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def turned(x_BTHK, rotary_dim, base):
    """RoPE as a product of complex numbers: channel c is the real part, channel c + P/2 the imaginary one."""
    half = rotary_dim // 2
    position_T = torch.arange(x_BTHK.shape[1], dtype=torch.float64)
    angle_TP = position_T[:, None] / base ** (torch.arange(half, dtype=torch.float64) * 2 / max(rotary_dim, 1))
    z = (
        torch.complex(x_BTHK[..., :half], x_BTHK[..., half:rotary_dim])
        * torch.polar(torch.ones_like(angle_TP), angle_TP)[:, None, :]
    )
    return torch.cat([z.real, z.imag, x_BTHK[..., rotary_dim:]], dim=-1)


def dense(layer, x_BTD, window):
    """The layer's definition with all T x T scores, one head at a time."""
    config = layer.config
    B, T, _ = x_BTD.shape
    H, G, K = config.n_heads, config.n_kv_heads, config.head_dim
    inner = x_BTD @ layer.to_inner.weight.T
    first_key = H * K + (H * K if config.output_gate else H if config.head_gate else 0)
    gate = inner[..., H * K : first_key]
    q = inner[..., : H * K].view(B, T, H, K)
    k = inner[..., first_key : first_key + G * K].view(B, T, G, K)
    v = inner[..., first_key + G * K :].view(B, T, G, K)
    if config.qk_norm:
        q, k = rms(q, layer.q_norm.weight, config.norm_eps), rms(k, layer.k_norm.weight, config.norm_eps)
    q, k = turned(q, config.rotary_dim, config.rope_base), turned(k, config.rotary_dim, config.rope_base)
    age_TT = torch.arange(T)[:, None] - torch.arange(T)[None, :]
    heads = []
    for h in range(H):
        g = h // (H // G)
        scores = (q[:, :, h] @ k[:, :, g].transpose(1, 2) / K**0.5).masked_fill(
            (age_TT < 0) | (age_TT >= window), -torch.inf
        )
        weights = scores.exp()
        total = weights.sum(-1, keepdim=True) + (layer.sink_H[h].exp() if config.sink_logits else 0)
        heads.append(weights / total @ v[:, :, g])
    o = torch.cat(heads, dim=-1)
    if config.head_gate:
        gate = torch.cat([gate[..., h : h + 1].expand(B, T, K) for h in range(H)], dim=-1)
    return (o * torch.sigmoid(gate) if gate.shape[-1] else o) @ layer.to_out.weight.T


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 50),
    st.booleans(),
    st.sampled_from([None, "output_gate", "head_gate"]),
    st.booleans(),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_layers_equal_the_dense_masked_definition(
    make_stack, tiny, n_tokens, window, qk_norm, gate, sink_logits, rotary_fraction
):
    config = dataclasses.replace(
        tiny,
        window=window,
        qk_norm=qk_norm,
        output_gate=gate == "output_gate",
        head_gate=gate == "head_gate",
        sink_logits=sink_logits,
        rotary_fraction=rotary_fraction,
    )
    for letter, reach in (("S", window), ("F", n_tokens)):
        stack = make_stack(letter, config).double()
        x_BTD = stack.input(2, n_tokens, dtype=torch.float64)
        y_BTD, _ = stack.layers[0](x_BTD)
        torch.testing.assert_close(y_BTD, dense(stack.layers[0], x_BTD, reach), rtol=0, atol=1e-9)


def test_a_window_as_long_as_the_text_is_full_attention(make_stack, tiny):
    full, sliding = (make_stack(letter, dataclasses.replace(tiny, window=16)) for letter in "FS")
    x_BTD = full.input(1, 16)
    torch.testing.assert_close(full(x_BTD), sliding(x_BTD), rtol=0, atol=1e-6)


@pytest.mark.parametrize("start", [0, 7])
def test_without_a_cache_positions_start_where_the_caller_says(make_stack, tiny, start):
    # A rotary layer sees distances only, so the output may not depend on where the text starts.
    stack = make_stack("F", dataclasses.replace(tiny, rotary_fraction=1.0)).double()
    x_BTD = stack.input(1, 6, dtype=torch.float64)
    y_BTD, kv = stack.layers[0](x_BTD, start=start)
    torch.testing.assert_close(y_BTD, stack.layers[0](x_BTD)[0], rtol=0, atol=1e-10)
    assert torch.allclose(kv.k_BSGK, stack.layers[0](x_BTD)[1].k_BSGK) == (start == 0)


@pytest.mark.parametrize(("pattern", "window"), [("FR", None), ("Sr", 5)])
def test_sharing_layers_use_the_owners_keys_and_values_and_own_none(make_stack, tiny, pattern, window):
    stack = make_stack(pattern, tiny).double()
    owner, sharer = stack.layers
    H, K = tiny.n_heads, tiny.head_dim
    assert {name for name, _ in sharer.named_parameters()} == {
        "to_inner.weight",
        "to_out.weight",
        "q_norm.weight",
        "sink_H",
    }
    # Queries and output gate only.
    assert sharer.to_inner.out_features == 2 * H * K
    x_BTD = stack.input(2, 11, dtype=torch.float64)
    _, kv = owner(x_BTD)
    y_BTD, offered = sharer(x_BTD, shared=kv)
    assert offered is None
    q_BTHK = rms(sharer.to_inner(x_BTD)[..., : H * K].view(2, 11, H, K), sharer.q_norm.weight, tiny.norm_eps)
    q_BTHK = turned(q_BTHK, tiny.rotary_dim, tiny.rope_base)
    age_TT = torch.arange(11)[:, None] - torch.arange(11)[None, :]
    k_BSHK, v_BSHK = (x.repeat_interleave(H // tiny.n_kv_heads, dim=2) for x in kv)
    scores = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK) / K**0.5
    weights = scores.masked_fill((age_TT < 0) | (age_TT >= (window or 11)), -torch.inf).exp()
    weights = weights / (weights.sum(-1, keepdim=True) + sharer.sink_H.exp()[:, None, None])
    o_BTX = torch.einsum("bhts,bshk->bthk", weights, v_BSHK).flatten(2) * sharer.to_inner(x_BTD)[..., H * K :].sigmoid()
    torch.testing.assert_close(y_BTD, sharer.to_out(o_BTX), rtol=0, atol=1e-10)


def test_gradients_reach_the_owner_through_the_sharing_layer(make_stack, tiny):
    owner, sharer = make_stack("FR", tiny).layers
    x_BTD = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    _, kv = owner(x_BTD)
    y_BTD, _ = sharer(x_BTD, shared=kv)
    y_BTD.square().sum().backward()
    inner = owner.to_inner.weight.grad
    H, G, K = tiny.n_heads, tiny.n_kv_heads, tiny.head_dim
    assert (inner[2 * H * K :].abs().amax(-1) > 0).float().mean() > 0.99
    # The owner's own queries had no part in it.
    assert inner[: 2 * H * K].abs().max() == 0
    assert inner.shape[0] == 2 * H * K + 2 * G * K


def test_misplaced_or_missing_shared_keys_are_refused(make_stack, tiny):
    stack = make_stack("FR", tiny)
    owner, sharer = stack.layers
    x_BTD = stack.input(2, 6)
    _, kv = owner(x_BTD)
    with pytest.raises(
        ValueError, match=r"layer 1 \(R, .*shared is missing; legal: the keys and values that the F layer below"
    ):
        sharer(x_BTD)
    with pytest.raises(ValueError, match=r"layer 0 \(F, .*legal: shared=None"):
        owner(x_BTD, shared=kv)
    for wrong in (KV(*(x[:1] for x in kv)), KV(*(x[:, :5] for x in kv)), KV(*(torch.cat([x, x], dim=1) for x in kv))):
        with pytest.raises(ValueError, match=r"layer 1 \(R, .*shared keys of shape"):
            sharer(x_BTD, shared=wrong)
    cache = stack.cache(2, 12)
    with pytest.raises(
        ValueError, match=r"layer 1 \(R, .*tokens 0 to 5 after the owner of the keys took 0; legal: first the owner"
    ):
        sharer(x_BTD, state=cache.layers[1], shared=kv)

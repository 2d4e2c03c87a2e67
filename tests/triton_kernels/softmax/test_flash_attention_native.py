"""Softmax attention in C against the torch form in fp64: output and every gradient, whatever shape, option and stride.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, K key width, V value width, P half of the rotated
channels.
"""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from triton_kernels.native.library import native
from triton_kernels.softmax.flash_attention import flash_attention
from triton_kernels.softmax.rotary import rotary_tables

pytestmark = pytest.mark.skipif(native().library is None, reason=native().reason)


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(backend, dtype, leaves, *, turned=0, **options):
    """Output and gradients, of values that are the same numbers in every dtype up to rounding."""
    q, k, v, *sinks = (x.detach().to(dtype).requires_grad_() for x in leaves)
    T, S = q.shape[1], k.shape[1]
    o_BTHV = flash_attention(
        *(q, k, v),
        sinks_H=sinks[0] if sinks else None,
        rotary=rotary_tables(torch.arange(S - T, S), rotary_dim=turned, base=1e4) if turned else None,
        backend=backend,
        **options,
    )
    weights = draw(*o_BTHV.shape, seed=9).to(dtype)
    return o_BTHV.detach(), *torch.autograd.grad(o_BTHV, (q, k, v, *sinks), weights)


def assert_as_in_fp64(leaves, **options):
    results = zip(*(run(*how, leaves, **options) for how in (("native", torch.float32), ("torch", torch.float64))))
    for name, (got, expected) in zip(("o", "q", "k", "v", "sinks"), results):
        # Gradients of what cancels are small beside their terms, which are of the size of 1.
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=5e-6 * expected.numel() ** 0.1, msg=name)


@settings(deadline=None, max_examples=60)
@given(
    B=st.integers(1, 2),
    T=st.integers(1, 140),
    more_keys=st.sampled_from([0, 0, 1, 150, 300]),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    widths=st.sampled_from([(4, 4), (16, 16), (33, 20), (32, 64)]),
    causal=st.booleans(),
    window=st.sampled_from([None, None, 1, 7, 100, 260]),
    sinks=st.booleans(),
    turned=st.sampled_from([0, 2, 4]),
    scale=st.sampled_from([None, 0.3]),
)
@example(1, 300, 300, (2, 1), (16, 16), True, None, True, 4, None)
@example(1, 530, 0, (1, 1), (8, 8), True, 250, False, 8, None)
def test_any_shape_and_option(B, T, more_keys, heads, widths, causal, window, sinks, turned, scale):
    (H, G), (K, V), S = heads, widths, T + more_keys
    leaves = [draw(B, T, H, K, seed=0), draw(B, S, G, K, seed=1), draw(B, S, G, V, seed=2)]
    options = {"causal": causal, "window": window if causal else None, "turned": turned, "scale": scale}
    assert_as_in_fp64([*leaves, draw(H, seed=3)] if sinks else leaves, **options)


@pytest.mark.parametrize("window", [None, 7, 100])
def test_of_bf16_products_round_what_they_read(window):
    leaves = [draw(2, 300, heads, 16, seed=seed).bfloat16().double() for seed, heads in enumerate((4, 2, 2))]
    results = zip(*(run(*how, leaves, window=window) for how in (("native", torch.bfloat16), ("torch", torch.float64))))
    for name, (got, expected) in zip(("o", "q", "k", "v"), results):
        # Errors of their own sizes are a hundredth at most, on average much less.
        apart = (got.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert apart < 0.01, (name, float(apart))


def test_more_key_heads_than_are_packed_at_once():
    q, k, v = (draw(9, 514, 16, 64, seed=seed) for seed in range(3))
    got, expected = (
        flash_attention(*(x.to(dtype) for x in (q, k, v)), backend=backend)
        for backend, dtype in (("native", torch.float32), ("torch", torch.float64))
    )
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_parts_of_one_projection_are_read_where_they_are():
    inner = draw(2, 70, 4 * 8 + 2 * 2 * 8, seed=0).float()
    q, k, v = (x.unflatten(-1, (-1, 8)) for x in inner.split([32, 16, 16], dim=-1))
    dense = flash_attention(q.contiguous(), k.contiguous(), v.contiguous(), backend="native")
    assert torch.equal(flash_attention(q, k, v, backend="native"), dense)
    across = [x.mT.contiguous().mT for x in (q, k, v)]
    assert torch.equal(flash_attention(*across, backend="native"), dense)


def test_the_same_bits_by_one_thread_or_more():
    leaves = [draw(2, 300, 4, 16, seed=0), draw(2, 300, 2, 16, seed=1), draw(2, 300, 2, 16, seed=2), draw(4, seed=3)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run("native", torch.float32, leaves, turned=16))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other))


def test_a_sink_of_minus_infinity_is_none_and_nan_stays_where_it_is():
    q, k, v = (draw(1, 100, 1, 8, seed=seed).float() for seed in range(3))
    plain = flash_attention(q, k, v, backend="native")
    assert torch.equal(flash_attention(q, k, v, sinks_H=torch.tensor([-torch.inf]), backend="native"), plain)
    q[0, 40], k[0, 70] = torch.nan, torch.nan
    for sinks_H in (None, torch.zeros(1)):
        o_BTHV = flash_attention(q, k, v, sinks_H=sinks_H, backend="native")
        seen_T = o_BTHV[0, :, 0].isnan().all(dim=-1)
        assert seen_T.nonzero()[:, 0].tolist() == [40, *range(70, 100)]
        assert not o_BTHV[0, ~seen_T].isnan().any()


def test_no_queries():
    q, k, v = torch.ones(2, 0, 4, 8, requires_grad=True), torch.ones(2, 3, 2, 8), torch.ones(2, 3, 2, 8)
    o_BTHV = flash_attention(q, k, v, backend="native")
    o_BTHV.sum().backward()
    assert o_BTHV.shape == (2, 0, 4, 8)


def test_packed_sequences_and_other_dtypes_are_left_to_torch():
    q = torch.ones(1, 4, 2, 8)
    for change in ({"q": q.double()}, {"cu_seqlens": torch.tensor([0, 2, 4])}):
        q, options = change.pop("q", q), change
        with pytest.raises(ValueError, match="backend='native' takes"):
            flash_attention(q, q, q, backend="native", **options)

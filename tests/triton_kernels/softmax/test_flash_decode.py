"""flash_decode: the torch reference against the dense formula, the kernels against the reference, over every kind of
cache."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import triton_kernels.softmax.flash_decode
from triton_kernels.softmax.flash_attention import flash_attention
from triton_kernels.softmax.flash_decode import flash_decode, flash_decode_torch


def dense_decode(q_BHK, k_BSGK, v_BSGV, lengths_B, *, window=None, scale=None, sinks_H=None):
    """Sequence by sequence, head by head, over exactly the tokens that are seen."""
    B, H, K = q_BHK.shape
    S, G = k_BSGK.shape[1:3]
    o_BHV = q_BHK.new_zeros(B, H, v_BSGV.shape[3])
    for b in range(B):
        length = int(lengths_B[b])
        first = 0 if window is None else max(0, length - window)
        for h in range(H):
            g = h // (H // G)
            logits = k_BSGK[b, first : min(length, S), g] @ q_BHK[b, h] * (K**-0.5 if scale is None else scale)
            if sinks_H is not None:
                logits = torch.cat([logits, sinks_H[h : h + 1]])
            if len(logits) > 0:
                weights = logits.softmax(0)[: min(length, S) - first]
                o_BHV[b, h] = weights @ v_BSGV[b, first : min(length, S), g]
    return o_BHV


def random_cache(B, S, H, G, K, V, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)
        for s in ((B, H, K), (B, S, G, K), (B, S, G, V))
    ]


def spoil(k_BSGK, v_BSGV, lengths_B):
    """What is not cached yet is NaN, as torch.empty may leave it."""
    unused_BS = torch.arange(k_BSGK.shape[1]) >= lengths_B[:, None]
    return (x.masked_fill(unused_BS[:, :, None, None], torch.nan) for x in (k_BSGK, v_BSGV))


def into_pool(k_BSGK, v_BSGV, page, seed=0):
    """(k pool, v pool, block table): the rows cut into pages and shuffled, with pages of NaN that nobody owns among
    them."""
    B, S = k_BSGK.shape[:2]
    n_pages = -(-S // page)
    order = torch.randperm(B * n_pages + 3, generator=torch.Generator().manual_seed(seed))[: B * n_pages]
    pools = []
    for x in (k_BSGK, v_BSGV):
        padded = torch.cat([x, x.new_full((B, n_pages * page - S, *x.shape[2:]), torch.nan)], 1)
        pool = x.new_full((B * n_pages + 3, page, *x.shape[2:]), torch.nan)
        pool[order] = padded.reshape(B * n_pages, page, *x.shape[2:])
        pools.append(pool)
    return *pools, order.reshape(B, n_pages)


def quantise(x, dtype):
    """(x in bytes, one scale per token and head)."""
    scale = x.abs().amax(-1) / (127 if dtype == torch.int8 else torch.finfo(dtype).max)
    units = x / scale[..., None]
    return (units.round() if dtype == torch.int8 else units).to(dtype), scale


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 45), min_size=1, max_size=3),
    window=st.sampled_from([None, 1, 7, 100]),
    sinks=st.booleans(),
    page=st.sampled_from([None, 1, 8, 40]),
)
def test_reference_equals_the_formula(lengths, window, sinks, page):
    """Lengths above the 40 rows are rings gone round (there without a window, which the ring itself is)."""
    lengths_B = torch.tensor(lengths)
    if window is not None or page is not None:
        lengths_B = lengths_B.clamp(max=40)
    q, k, v = random_cache(len(lengths), 40, 4, 2, 8, 16)
    options = {"window": window, "sinks_H": torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64) if sinks else None}
    expected = dense_decode(q, k, v, lengths_B, **options)
    k, v = spoil(k, v, lengths_B)
    table = None
    if page is not None:
        k, v, table = into_pool(k, v, page)
    torch.testing.assert_close(
        flash_decode(q, k, v, lengths_B, block_table_BN=table, **options), expected, rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("lengths", [[40, 40], [90, 41]])
@pytest.mark.parametrize("sinks", [False, True])
def test_a_cache_known_to_be_full_gives_what_the_general_form_gives(lengths, sinks, monkeypatch):
    q, k, v = random_cache(2, 40, 4, 2, 8, 16)
    sinks_H = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64) if sinks else None
    lengths_B = torch.tensor(lengths)
    general = flash_decode_torch(
        q,
        k,
        v,
        lengths_B,
        scale=0.3,
        window=None,
        sinks_H=sinks_H,
        block_table_BN=None,
        k_scale=None,
        v_scale=None,
    )
    monkeypatch.delattr(triton_kernels.softmax.flash_decode, "flash_decode_torch")
    full = flash_decode(q, k, v, lengths_B, scale=0.3, sinks_H=sinks_H)
    torch.testing.assert_close(full, general, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("S", "lengths", "H", "G", "K", "V", "page", "options"),
    [
        (1, [1, 0], 2, 1, 32, 32, None, {}),
        (63, [63, 5], 4, 1, 32, 64, None, {}),
        (257, [257, 64, 0], 4, 2, 64, 64, None, {}),
        (100, [250, 100], 2, 2, 32, 32, None, {}),
        (257, [257, 200, 3], 4, 2, 32, 32, None, {"window": 70}),
        (130, [130, 1], 2, 1, 48, 80, 16, {}),
        (257, [257, 200], 4, 2, 32, 32, 64, {"window": 130}),
        (100, [100, 60], 16, 1, 144, 128, None, {"scale": 0.1}),
    ],
)
def test_kernels_are_as_exact_as_torch(S, lengths, H, G, K, V, page, options, dtype):
    q, k, v = random_cache(len(lengths), S, H, G, K, V, dtype)
    lengths_B = torch.tensor(lengths)
    sinks_H = torch.linspace(-1, 2, H)
    exact = dense_decode(q.double(), k.double(), v.double(), lengths_B, sinks_H=sinks_H.double(), **options)
    k, v = spoil(k, v, lengths_B)
    table = None
    if page is not None:
        k, v, table = into_pool(k, v, page)
    arguments = (q, k, v, lengths_B)
    by_torch, ours = (
        flash_decode(*arguments, sinks_H=sinks_H, block_table_BN=table, backend=backend, **options)
        for backend in ("torch", "triton")
    )
    assert ours.dtype == dtype
    budget = 2 * (by_torch.double() - exact).abs().max() + 8 * torch.finfo(dtype).eps * exact.abs().max()
    assert (ours.double() - exact).abs().max() <= budget


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("quantised", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_quantised_caches_equal_the_cache_they_stand_for(quantised, backend):
    q, k, v = random_cache(2, 90, 4, 2, 32, 32, torch.float32)
    lengths_B = torch.tensor([90, 31])
    stored, scales = zip(*(quantise(x, quantised) for x in (k, v)))
    dequantised = (x.float() * scale[..., None] for x, scale in zip(stored, scales))
    ours = flash_decode(q, *stored, lengths_B, k_scale=scales[0], v_scale=scales[1], backend=backend)
    torch.testing.assert_close(ours, dense_decode(q, *dequantised, lengths_B), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "kind", ["growing", "ring", "windowed", "paged", "latent", torch.int8, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_prefill_and_decode_equal_the_full_attention(backend, kind):
    """Token by token over every kind of cache: the rows of the full causal attention over the keys and values that the
    cache stands for."""
    T, G, window = 60, 1 if kind == "latent" else 2, 20 if kind in ("ring", "windowed") else None
    _, k, v = random_cache(1, T, 4, G, 32, 32, torch.float32)
    q_BTHK = torch.randn(1, T, 4, 32, generator=torch.Generator().manual_seed(3))
    v = k[..., :24] if kind == "latent" else v
    stored, scales = [k, v], {}
    if isinstance(kind, torch.dtype):
        (stored[0], scales["k_scale"]), (stored[1], scales["v_scale"]) = quantise(k, kind), quantise(v, kind)
        k, v = (x.float() * scale[..., None] for x, scale in zip(stored, scales.values()))
    full_BTHV = flash_attention(q_BTHK, k, v, window=window)
    for t in (0, 1, 19, 20, 33, T - 1):
        lengths_B, options = torch.tensor([t + 1]), {"window": window if kind == "windowed" else None}
        # What is not written yet is NaN, of bytes the scales; a ring holds the last 20 tokens, in the rows they fell
        # into.
        k_cache, v_cache = stored if scales else spoil(*stored, lengths_B)
        unwritten_BSG = torch.arange(T)[None, :, None] > t
        options |= {name: scale.masked_fill(unwritten_BSG, torch.nan) for name, scale in scales.items()}
        if kind == "ring":
            rows = [max((s for s in range(t + 1) if s % 20 == row), default=T - 1) for row in range(20)]
            k_cache, v_cache = k_cache[:, rows], v_cache[:, rows]
        elif kind == "latent":
            v_cache = k_cache[..., :24]
        elif kind == "paged":
            k_cache, v_cache, options["block_table_BN"] = into_pool(k_cache, v_cache, 16, seed=t)
        o_BHV = flash_decode(q_BTHK[:, t], k_cache, v_cache, lengths_B, backend=backend, **options)
        torch.testing.assert_close(o_BHV, full_BTHV[:, t], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_latent_cache_values_may_be_a_view_of_the_keys(backend):
    q, latent, _ = random_cache(2, 50, 4, 1, 80, 1, torch.float32)
    values = latent[..., :64]
    assert not values.is_contiguous()
    lengths_B = torch.tensor([50, 20])
    ours = flash_decode(q, latent, values, lengths_B, backend=backend)
    torch.testing.assert_close(ours, dense_decode(q, latent, values, lengths_B), rtol=1e-5, atol=1e-5)


def test_the_last_split_clears_its_counters_and_every_run_gives_the_same_bits():
    from triton_kernels.softmax.flash_decode_launch import COUNTERS

    q, k, v = random_cache(2, 300, 4, 2, 64, 64, torch.float16)
    lengths_B = torch.tensor([300, 70])
    runs = [flash_decode(q, k, v, lengths_B, backend="triton") for _ in range(3)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])
    assert all(not counters.any() for counters in COUNTERS.values())


@pytest.mark.parametrize("B", [1, 140])
def test_caches_of_few_and_of_many_sequences(B):
    """Many heads fill a device by themselves: they are not split, and need no counters."""
    q, k, v = random_cache(B, 40, 2, 2, 16, 16, torch.float32)
    lengths_B = torch.arange(B) % 41
    torch.testing.assert_close(
        flash_decode(q, k, v, lengths_B, backend="triton"), dense_decode(q, k, v, lengths_B), rtol=1e-5, atol=1e-5
    )


def test_the_operator_is_registered_soundly():
    from triton_kernels.softmax.flash_decode_launch import decode_op

    q, k, v = random_cache(2, 20, 4, 2, 32, 16, torch.float32)
    arguments = (q, k, v, torch.tensor([20, 3]), 0.2, None, None, None, None, None)
    torch.library.opcheck(decode_op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_BHK": torch.zeros(2, 8)}, "q_BHK has shape"),
        ({"k_cache": torch.zeros(3, 5, 2, 8)}, "k_cache_BSGK has shape"),
        ({"v_cache": torch.zeros(2, 6, 2, 8)}, "v_cache_BSGV has shape"),
        ({"k_cache": torch.zeros(2, 5, 3, 8), "v_cache": torch.zeros(2, 5, 3, 8)}, "multiple of G"),
        ({"k_cache": torch.zeros(2, 5, 2, 8).half()}, "k_cache_BSGK is torch.float16"),
        ({"k_cache": torch.zeros(2, 5, 2, 8).to(torch.int8)}, "without k_scale"),
        ({"k_scale": torch.zeros(2, 5, 2)}, "with k_scale"),
        ({"lengths_B": torch.tensor([1, 2, 3])}, "lengths_B has shape"),
        ({"lengths_B": torch.tensor([1, 2], dtype=torch.int32)}, "lengths_B is torch.int32"),
        ({"block_table_BN": torch.zeros(2, 3)}, "block_table_BN is torch.float32"),
        ({"sinks_H": torch.zeros(2)}, "sinks_H has shape"),
        ({"window": 0}, "window=0"),
        ({"scale": -1.0}, "scale=-1.0"),
    ],
)
def test_wrong_arguments_are_refused_by_name(change, message):
    arguments = {
        "q_BHK": torch.zeros(2, 4, 8),
        "k_cache": torch.zeros(2, 5, 2, 8),
        "v_cache": torch.zeros(2, 5, 2, 8),
        "lengths_B": torch.tensor([5, 2]),
    }
    with pytest.raises(ValueError, match=message):
        flash_decode(**arguments | change)

"""Keys and values in 8 bits, int8 or fp8: what is read is rounded by no more than a step, whichever way it came;
sequences come, go and change places as they do in other caches; the bytes are those of the formulas."""

import pytest
import torch

from attention import HybridCache, cache_bytes
from attention.kv_states import EIGHT_BITS, EightBitGrowingKV, EightBitRingKV
from attention.layer_states import KV

# All that keep keys and values, beside kinds that keep something else.
PATTERNS = ["F", "S", "FR", "M", "SSSFSSSR", "SrGLKFRADCM"]
# A number that is computed a piece at a time may round to the next step: of 127 in a head's largest.
NEXT_STEP = {"int8": 2e-2, "fp8": 0.2}
LARGEST_ERROR = {"int8": 0.03, "fp8": 0.15}


def cache_of(stack, batch_size, max_length, name="int8", dtype=torch.float32):
    return HybridCache(stack.configs, stack.plan, batch_size, max_length, dtype, eight_bits=name)


def run(stack, cache, x_BTD):
    with torch.no_grad():
        return stack(x_BTD, cache)


@pytest.mark.parametrize("kind", [EightBitGrowingKV, EightBitRingKV])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EIGHT_BITS)
def test_what_is_read_is_rounded_by_half_a_step_at_the_most(kind, dtype, name):
    generator = torch.Generator().manual_seed(0)
    window = (20,) if kind is EightBitRingKV else ()
    state = kind(2, 20, *window, (3, 8), dtype, torch.device("cpu"), name=name)
    k, v = (torch.randn(2, 11, 3, 8, generator=generator) * torch.rand(2, 11, 3, 1, generator=generator) for _ in "kv")
    k[0, 0, 0], v[1, 3] = 0.0, 0.0
    read = state.update(k.to(dtype), v.to(dtype))
    for part, exact, rounded in zip("kv", (k.to(dtype), v.to(dtype)), read):
        assert rounded.dtype == dtype
        largest = exact.float().abs().amax(dim=-1, keepdim=True)
        # Of fp8 a step is an eighth of the power of two below a number, or the smallest that there is.
        step = largest / 127 if name == "int8" else (exact.float().abs() / 8).maximum(largest / 448 * 2**-9)
        slack = 1e-6 if dtype == torch.float32 else exact.float().abs().amax() / 256
        assert ((exact.float() - rounded.float()).abs() <= 0.5 * step + slack).all()
        assert state.tensors[part].element_size() == 1
    assert (read.k_BSGK[0, 0, 0] == 0).all()
    with pytest.raises(ValueError, match="float64; legal: the same"):
        state.update(k.double(), v.double())


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", EIGHT_BITS)
def test_a_token_at_a_time_and_pieces_are_one_prefill(make_stack, tiny, pattern, name):
    stack = make_stack(pattern, tiny)
    x_BTD = stack.input(2, 13)
    whole = run(stack, cache_of(stack, 2, 16, name), x_BTD)
    for sizes in ([1] * 13, [4, 1, 6, 2]):
        cache = cache_of(stack, 2, 16, name)
        pieces = torch.cat([run(stack, cache, piece) for piece in x_BTD.split(sizes, dim=1)], dim=1)
        torch.testing.assert_close(pieces, whole, rtol=0, atol=NEXT_STEP[name])
    exact = run(stack, stack.cache(2, 16), x_BTD)
    error = (whole - exact).abs().max() / exact.abs().max()
    assert 0 < error < LARGEST_ERROR[name]


@pytest.mark.parametrize(("pattern", "name"), [*((pattern, "int8") for pattern in PATTERNS), ("SrGLKFRADCM", "fp8")])
def test_sequences_come_go_and_change_places(make_stack, tiny, pattern, name):
    stack = make_stack(pattern, tiny)
    texts = [stack.input(1, length, seed=10 + length) for length in (3, 1, 9)]
    caches = [cache_of(stack, 1, length, name) for length in (12, 20, 12)]
    for cache, text in zip(caches, texts):
        run(stack, cache, text)
    cache = HybridCache.stack(caches)
    cache.reorder(torch.tensor([2, 0]))
    cache.grow(24)
    more_BTD = stack.input(2, 6, seed=3)
    before = cache.snapshot()
    found = torch.cat([run(stack, cache, more_BTD[:, t : t + 1]) for t in range(6)], dim=1)
    cache.restore(before)
    again = torch.cat([run(stack, cache, more_BTD[:, t : t + 1]) for t in range(6)], dim=1)
    assert torch.equal(found, again)
    for text, more_TD, own in zip((texts[2], texts[0]), more_BTD, found):
        alone = run(stack, cache_of(stack, 1, 24, name), torch.cat([text, more_TD[None]], dim=1))
        torch.testing.assert_close(own, alone[0, -6:], rtol=0, atol=NEXT_STEP[name])


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_formulas(make_stack, tiny, pattern, dtype):
    stack = make_stack(pattern, tiny)
    for length in (3, 17):
        by_layer = cache_bytes(stack.configs, stack.plan, length, 2, dtype.itemsize, eight_bits=True)
        for name in EIGHT_BITS:
            cache = cache_of(stack, 2, length, name, dtype)
            assert [state.nbytes() for state in cache.layers] == by_layer
    heads, width = tiny.n_kv_heads, tiny.head_dim
    if pattern == "F":
        assert by_layer == [2 * 17 * 2 * heads * (width + 4)]


def test_cropped_tokens_are_forgotten(make_stack, tiny):
    stack = make_stack("FR", tiny)
    x_BTD = stack.input(2, 9)
    cache = cache_of(stack, 2, 12)
    run(stack, cache, x_BTD)
    cache.crop(5)
    again = run(stack, cache, x_BTD[:, 5:])
    torch.testing.assert_close(again, run(stack, cache_of(stack, 2, 12), x_BTD)[:, 5:], rtol=0, atol=NEXT_STEP["int8"])


def test_another_name_is_refused_and_caches_of_two_do_not_mix(make_stack, tiny):
    stack = make_stack("F", tiny)
    with pytest.raises(ValueError, match="eight_bits='fp4'; legal: None, 'int8', 'fp8'"):
        cache_of(stack, 1, 4, "fp4")
    with pytest.raises(ValueError, match=r"k of layer 0 is torch\.uint8"):
        HybridCache.stack([cache_of(stack, 1, 4), cache_of(stack, 1, 4, "fp8")])


def test_other_caches_hold_what_they_held(make_stack, tiny):
    cache = make_stack("F", tiny).cache(1, 4)
    k = torch.randn(1, 2, tiny.n_kv_heads, tiny.head_dim)
    read = cache.layers[0].update(k, k)
    assert isinstance(read, KV)
    assert torch.equal(read.k_BSGK, k)
    assert read.k_BSGK.untyped_storage().data_ptr() == cache.layers[0].tensors["k"].untyped_storage().data_ptr()

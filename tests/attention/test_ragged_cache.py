"""Sequences of different lengths in one cache: each is what it would be alone, in every kind of state; sequences come,
go and change places; moments are saved and restored; room is made."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import HybridCache, cache_bytes
from attention.kinds import KINDS
from attention.yarn import Yarn

LETTERS = [(kind.reads or "") + letter for letter, kind in KINDS.items()]
PATTERNS = [*LETTERS, "SSSFSSSR", "KKKA", "DDDF", "SrGLKFRADCM"]
# Shorter, as long, and longer than the window of 5; one that is a chunk and one that is not.
LENGTHS = (3, 5, 1, 17, 8)


def run(stack, cache, x_BTD):
    with torch.no_grad():
        return stack(x_BTD, cache)


def prompts(stack, lengths, dtype=torch.float32):
    return [stack.input(1, length, seed=10 + n, dtype=dtype) for n, length in enumerate(lengths)]


def stacked(stack, texts, max_length, dtype=torch.float32):
    """The texts read one by one, then together."""
    caches = [stack.cache(1, max_length, dtype) for _ in texts]
    for cache, x_1TD in zip(caches, texts):
        run(stack, cache, x_1TD)
    return HybridCache.stack(caches)


def decode_and_compare(stack, cache, texts, n_tokens, *, seed=0, atol=1e-5):
    """Goes on with every sequence, and compares each step with a forward over the sequence alone. Returns the texts as
    they are then."""
    more_BTD = stack.input(len(texts), n_tokens, seed=seed, dtype=texts[0].dtype)
    texts = [torch.cat([text, more[None]], dim=1) for text, more in zip(texts, more_BTD)]
    steps = [run(stack, cache, more_BTD[:, t : t + 1]) for t in range(n_tokens)]
    decoded_BTD = torch.cat(steps, dim=1)
    for text, decoded_TD in zip(texts, decoded_BTD):
        with torch.no_grad():
            torch.testing.assert_close(decoded_TD, stack(text)[0, -n_tokens:], rtol=0, atol=atol)
    assert cache.lengths_B.tolist() == [text.shape[1] for text in texts]
    return texts


@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_of_a_stack_decodes_as_it_would_alone(make_stack, tiny, pattern):
    stack = make_stack(pattern, tiny)
    texts = prompts(stack, LENGTHS)
    cache = stacked(stack, texts, 24)
    assert cache.batch_size == len(LENGTHS)
    assert cache.nbytes() == sum(cache_bytes(stack.configs, stack.plan, 24, len(LENGTHS), element_size=4))
    decode_and_compare(stack, cache, texts, 7)


def test_with_the_options_of_published_models(make_stack, tiny):
    """Stretched positions, biases, a norm over all heads, shared keys of a delta rule."""
    options = {"qkv_bias": True, "out_bias": True, "qk_norm_whole": True, "yarn": Yarn(factor=8.0, original_length=6)}
    config = dataclasses.replace(tiny, linear_heads=4, linear_key_heads=2, mamba_groups=2, latent_scale=1.4, **options)
    stack = make_stack("FRSrAGD", config)
    texts = prompts(stack, LENGTHS)
    decode_and_compare(stack, stacked(stack, texts, 24), texts, 7)


@pytest.mark.parametrize("pattern", ["F", "S", "A", "M", "SrGLKFRADCM"])
def test_in_fp64_and_in_bf16(make_stack, tiny, pattern):
    exact = make_stack(pattern, tiny).double()
    texts = prompts(exact, LENGTHS, torch.float64)
    # Linear states are fp32 in the cache.
    decode_and_compare(
        exact, stacked(exact, texts, 24, torch.float64), texts, 4, atol=1e-12 if pattern in "FSA" else 1e-5
    )
    stack = make_stack(pattern, tiny)
    rounded = [text.bfloat16() for text in texts]
    cache = stacked(stack, rounded, 24, torch.bfloat16)
    more_BTD = stack.input(len(texts), 4)
    decoded_BTD = torch.cat([run(stack, cache, more_BTD[:, t : t + 1].bfloat16()) for t in range(4)], dim=1)
    for text, more_TD, decoded_TD in zip(texts, more_BTD, decoded_BTD):
        whole = torch.cat([text.float(), more_TD[None]], dim=1)
        with torch.no_grad():
            expected_TD, forward_TD = stack(whole)[0, -4:], stack(whole.bfloat16())[0, -4:].float()
        error = (forward_TD - expected_TD).abs().max()
        assert (decoded_TD.float() - expected_TD).abs().max() <= 2 * error + 2**-6


@settings(max_examples=20, deadline=None)
@given(
    pattern=st.sampled_from(PATTERNS),
    window=st.integers(1, 9),
    lengths=st.lists(st.integers(1, 13), min_size=2, max_size=4),
    keep=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    added=st.integers(1, 13),
    bare=st.booleans(),
)
def test_sequences_come_go_and_change_places(make_stack, tiny, pattern, window, lengths, keep, added, bare):
    options = {"output_gate": False, "sink_logits": False, "qk_norm": False, "rotary_fraction": 0.0} if bare else {}
    stack = make_stack(pattern, dataclasses.replace(tiny, window=window, **options), seed=1)
    texts = prompts(stack, lengths)
    cache = stacked(stack, texts, 20)
    texts = decode_and_compare(stack, cache, texts, 2)
    index = [n % len(lengths) for n in keep]
    cache.reorder(torch.tensor(index))
    texts = decode_and_compare(stack, cache, [texts[n] for n in index], 2, seed=1)
    (new,) = prompts(stack, [added])
    alone = stack.cache(1, 30)
    run(stack, alone, new)
    cache = HybridCache.stack([cache, alone])
    assert cache.max_length == 30
    decode_and_compare(stack, cache, [*texts, new], 2, seed=2)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sequences_that_have_caught_up_take_many_tokens_at_once_again(make_stack, tiny, pattern):
    stack = make_stack(pattern, tiny)
    texts = prompts(stack, (6, 6, 4))
    cache = stacked(stack, texts, 20)
    assert isinstance(cache.position, torch.Tensor)
    with pytest.raises(
        ValueError, match=r"2 tokens of each of 3 sequences that have seen different numbers of them; legal"
    ):
        run(stack, cache, stack.input(3, 2))
    cache.reorder(torch.tensor([1, 0]))
    assert cache.position == 6
    more_BTD = stack.input(2, 5)
    decoded_BTD = run(stack, cache, more_BTD)
    for n, text in enumerate((texts[1], texts[0])):
        with torch.no_grad():
            expected_1TD = stack(torch.cat([text, more_BTD[n : n + 1]], dim=1))[:, -5:]
        torch.testing.assert_close(decoded_BTD[n : n + 1], expected_1TD, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pattern", ["F", "FR", "AF"])
def test_a_crop_forgets_what_lies_behind_a_place_in_every_sequence(make_stack, tiny, pattern):
    stack = make_stack(pattern, tiny)
    texts = prompts(stack, (3, 9, 6))
    cache = stacked(stack, texts, 20)
    cache.crop(5)
    assert cache.lengths_B.tolist() == [3, 5, 5]
    texts = decode_and_compare(stack, cache, [text[:, :5] for text in texts], 3)
    cache.crop(2)
    assert cache.position == 2
    decode_and_compare(stack, cache, [text[:, :2] for text in texts], 3, seed=1)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_moment_is_restored_as_often_as_wanted(make_stack, tiny, pattern, ragged):
    """As speculation does: some tokens, back, others; also where linear states cannot forget and rings overwrite."""
    stack = make_stack(pattern, tiny)
    texts = prompts(stack, (4, 9) if ragged else (9, 9))
    cache = stacked(stack, texts, 20)
    moment = cache.snapshot()
    for seed in (1, 2):
        decode_and_compare(stack, cache, texts, 6, seed=seed)
        cache.restore(moment)
        assert cache.lengths_B.tolist() == [text.shape[1] for text in texts]
    decode_and_compare(stack, cache, texts, 3)


def test_a_snapshot_copies_what_is_written_over_only(make_stack, tiny):
    for pattern in ("F", "A", "FR"):
        assert make_stack(pattern, tiny).cache(2, 50).snapshot().nbytes() == 0
    stack = make_stack("FSG", tiny)
    cache = stack.cache(2, 50)
    assert cache.snapshot().nbytes() == sum(layer.nbytes() for layer in cache.layers[1:])


def test_snapshots_that_no_longer_hold_are_refused(make_stack, tiny):
    stack = make_stack("FG", tiny)
    cache = stack.cache(1, 20)
    run(stack, cache, stack.input(1, 3))
    first = cache.snapshot()
    run(stack, cache, stack.input(1, 3))
    second = cache.snapshot()
    cache.restore(second)
    cache.restore(first)
    for change in (None, lambda: cache.reorder(torch.tensor([0])), lambda: cache.crop(0)):
        snapshot = second if change is None else cache.snapshot()
        if change is not None:
            change()
        with pytest.raises(ValueError, match="restore: the snapshot is of another cache, or of this one before it was"):
            cache.restore(snapshot)
    with pytest.raises(ValueError, match="restore: the snapshot is of another cache"):
        stack.cache(1, 20).restore(cache.snapshot())


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(PATTERNS), st.lists(st.integers(1, 7), min_size=1, max_size=3), st.integers(0, 9))
def test_a_cache_that_is_full_goes_on_when_room_is_made(make_stack, tiny, pattern, lengths, more):
    stack = make_stack(pattern, tiny)
    texts, full = prompts(stack, lengths), max(lengths)
    cache = stacked(stack, texts, full)
    with pytest.raises(
        ValueError, match=rf"tokens {full} to {full} do not fit a cache made for {full}; legal: a longer"
    ):
        run(stack, cache, stack.input(len(lengths), 1))
    cache.grow(full + more + 1)
    assert cache.nbytes() == sum(cache_bytes(stack.configs, stack.plan, full + more + 1, len(lengths), element_size=4))
    decode_and_compare(stack, cache, texts, more + 1)
    with pytest.raises(ValueError, match=rf"grow to {full} tokens; legal: at least the {full + more + 1}"):
        cache.grow(full)


def test_caches_of_different_models_are_not_stacked(make_stack, tiny):
    one = make_stack("FG", tiny).cache(1, 4)
    others = {
        "1 layers, not 2": make_stack("F", tiny).cache(1, 4),
        "layer 0 is a RingKV, not a GrowingKV": make_stack("SG", tiny).cache(1, 4),
        "k of layer 0 is torch.bfloat16": make_stack("FG", tiny).cache(1, 4, torch.bfloat16),
        r"state of layer 1 is torch.float32 \(1, 3, 8, 10\)": make_stack(
            "FG", dataclasses.replace(tiny, linear_key_dim=8)
        ).cache(1, 4),
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=f"stack: cache 1 is of another model than cache 0: {message}"):
            HybridCache.stack([one, other])
    with pytest.raises(ValueError, match="stack: no caches"):
        HybridCache.stack([])


@pytest.mark.parametrize("pattern", LETTERS)
def test_places_that_do_not_fit_the_cache_are_refused(make_stack, tiny, pattern):
    stack = make_stack(pattern, tiny)
    ragged, even = stacked(stack, prompts(stack, (3, 5)), 9), stacked(stack, prompts(stack, (3, 3)), 9)
    layer, x_BTD = stack.layers[0], stack.input(2, 1)
    refusals = itertools.product((5, torch.tensor([3, 5, 5])), ((ragged, "position"),))
    for start, (cache, legal) in [*refusals, (torch.tensor([3, 3]), (even, "a number"))]:
        with pytest.raises(
            ValueError, match=rf"layer 0 .*for a cache of 2 sequences of lengths \[3, .\]; legal: .*{legal}"
        ):
            layer(x_BTD, start=start, state=cache.layers[0])
    with pytest.raises(ValueError, match="a start for each sequence without a cache; legal: a number"):
        layer(x_BTD, start=torch.tensor([3, 3]))

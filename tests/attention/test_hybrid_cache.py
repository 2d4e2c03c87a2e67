"""Reordering, cropping and refusals of the hybrid cache."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

MIXED = "SrGLKFRADC"


def prefilled(stack, batch_size, n_tokens, max_length):
    x_BTD = stack.input(batch_size, n_tokens)
    cache = stack.cache(batch_size, max_length)
    with torch.no_grad():
        stack(x_BTD, cache)
    return x_BTD, cache


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=5), st.integers(1, 12))
def test_reorder_is_as_if_the_sequences_had_been_decoded_in_that_order(make_stack, tiny, index, n_tokens):
    stack = make_stack(MIXED, tiny)
    x_BTD, cache = prefilled(stack, 3, n_tokens, 20)
    index_B = torch.tensor(index)
    cache.reorder(index_B)
    more_BTD = stack.input(len(index), 2, seed=9)
    with torch.no_grad():
        actual_BTD = stack(more_BTD, cache)
        expected_BTD = stack(torch.cat([x_BTD[index_B], more_BTD], dim=1))[:, n_tokens:]
    torch.testing.assert_close(actual_BTD, expected_BTD, rtol=0, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["F", "FR", "SSSFSSSR", "A", "AAF"]), st.integers(1, 9), st.data())
def test_crop_is_as_if_the_tokens_had_not_been_seen(make_stack, tiny, pattern, n_tokens, data):
    stack = make_stack(pattern, tiny)
    x_BTD, cache = prefilled(stack, 2, n_tokens, 20)
    length = data.draw(st.integers(0, n_tokens))
    if "S" in pattern and n_tokens > tiny.window and length not in (0, n_tokens):
        with pytest.raises(
            ValueError, match=f"crop to {length} of {n_tokens} tokens seen: layer 0 cannot: the ring buffer of 5 tokens"
        ):
            cache.crop(length)
        assert {state.length for state in cache.layers} == {n_tokens}
        return
    cache.crop(length)
    assert cache.length == length
    more_BTD = stack.input(2, 3, seed=9)
    with torch.no_grad():
        actual_BTD = stack(more_BTD, cache)
        expected_BTD = stack(torch.cat([x_BTD[:, :length], more_BTD], dim=1))[:, length:]
    torch.testing.assert_close(actual_BTD, expected_BTD, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pattern", ["L", "G", "K", "D", "FFL", "AAD"])
def test_a_linear_state_says_that_it_cannot_forget_and_nothing_is_cropped(make_stack, tiny, pattern):
    stack = make_stack(pattern, tiny)
    _, cache = prefilled(stack, 2, 6, 10)
    with pytest.raises(
        ValueError, match=f"layer {len(pattern) - 1} cannot: a linear-attention state is a sum over all tokens"
    ):
        cache.crop(3)
    assert {state.length for state in cache.layers} == {6}
    cache.crop(6)


@pytest.mark.parametrize("pattern", ["L", "G", "K", "D", "C", MIXED])
def test_crop_to_nothing_starts_afresh(make_stack, tiny, pattern):
    stack = make_stack(pattern, tiny)
    x_BTD, cache = prefilled(stack, 2, 9, 10)
    cache.crop(0)
    with torch.no_grad():
        torch.testing.assert_close(stack(x_BTD[:, 4:], cache), stack(x_BTD[:, 4:]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [-1, 7])
def test_crop_refuses_lengths_that_were_not_seen(make_stack, tiny, length):
    _, cache = prefilled(make_stack("F", tiny), 1, 6, 10)
    with pytest.raises(ValueError, match=f"crop to {length} tokens; legal: from 0 to the 6 seen"):
        cache.crop(length)
    with pytest.raises(ValueError, match=f"crop to {length} tokens of 6 seen; legal: from 0 to 6"):
        cache.layers[0].crop(length)


@pytest.mark.parametrize("index", [[0, 3], [-1], [[0]], [0.0], []])
def test_reorder_refuses_what_is_not_an_index_of_sequences(make_stack, tiny, index):
    _, cache = prefilled(make_stack("F", tiny), 3, 4, 4)
    with pytest.raises(ValueError, match="reorder: index"):
        cache.reorder(torch.tensor(index))


@pytest.mark.parametrize(("sizes", "message"), [((0, 4), "batch_size=0"), ((1, 0), "max_length=0")])
def test_sizes_below_one_are_refused(make_stack, tiny, sizes, message):
    with pytest.raises(ValueError, match=message):
        make_stack("F", tiny).cache(*sizes)


@pytest.mark.parametrize("pattern", ["F", "S", "G", "A", "D", "C"])
def test_activations_of_another_dtype_are_refused(make_stack, tiny, pattern):
    stack = make_stack(pattern, tiny)
    with pytest.raises(ValueError, match=r"cache holds \w+ as torch.float32.*got torch.bfloat16"):
        stack(stack.input(1, 3).bfloat16(), stack.cache(1, 4))

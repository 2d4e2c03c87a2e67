"""Prefill in chunks of any size and token-by-token decoding from the cache equal one forward over everything, for every
letter and mixtures."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import cache_bytes
from attention.kinds import KINDS
from attention.softmax import SoftmaxKind

PATTERNS = [
    *((kind.reads or "") + letter for letter, kind in KINDS.items()),
    "SSSF",
    "SSSFSSSR",
    "LLLF",
    "GGGF",
    "KKKF",
    "SrGLFRSr",
    "LSFGRKr",
    "MSM",
    "AAAC",
    "DDDA",
    "CDASrFRC",
]


def run_in_chunks(stack, x_BTD, cuts, max_length=None):
    cache = stack.cache(x_BTD.shape[0], max_length or x_BTD.shape[1], x_BTD.dtype)
    edges = [0, *cuts, x_BTD.shape[1]]
    with torch.no_grad():
        return torch.cat([stack(x_BTD[:, begin:end], cache) for begin, end in itertools.pairwise(edges)], dim=1), cache


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_token_by_token_equals_the_full_forward(make_stack, tiny, pattern, dtype):
    stack = make_stack(pattern, tiny).to(dtype)
    x_BTD = stack.input(2, 23, dtype=dtype)
    expected_BTD = stack(x_BTD).detach()
    decoded_BTD, cache = run_in_chunks(stack, x_BTD, range(1, 23))
    assert cache.length == 23
    # Recurrent states are fp32 in the cache, also for fp64 activations.
    without = all(isinstance(KINDS[letter], SoftmaxKind) for letter in pattern)
    tolerance = 1e-12 if dtype == torch.float64 and without else 1e-5
    torch.testing.assert_close(decoded_BTD, expected_BTD, rtol=0, atol=tolerance)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(PATTERNS),
    st.integers(1, 34),
    st.sets(st.integers(1, 33), max_size=6),
    st.integers(1, 12),
    st.integers(0, 9),
    st.booleans(),
)
def test_any_chunks_equal_the_full_forward(make_stack, tiny, pattern, n_tokens, cuts, window, spare, bare):
    # `bare`: the plain options, so that both sides of every switch are covered.
    plain = {"output_gate": False, "sink_logits": False, "qk_norm": False, "rotary_fraction": 1.0}
    config = dataclasses.replace(tiny, window=window, **(plain if bare else {}))
    stack = make_stack(pattern, config, seed=1)
    x_BTD = stack.input(2, n_tokens, seed=2)
    expected_BTD = stack(x_BTD).detach()
    actual_BTD, _ = run_in_chunks(
        stack, x_BTD, sorted(cut for cut in cuts if cut < n_tokens), max_length=n_tokens + spare
    )
    torch.testing.assert_close(actual_BTD, expected_BTD, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pattern", ["SSSFSSSR", *((kind.reads or "") + letter for letter, kind in KINDS.items())])
def test_bf16_decode_stays_within_bf16_rounding(make_stack, tiny, pattern):
    stack = make_stack(pattern, tiny)
    x_BTD = stack.input(2, 19)
    exact_BTD = stack(x_BTD).detach()
    decoded_BTD, _ = run_in_chunks(stack, x_BTD.bfloat16(), [8, *range(9, 19)])
    forward_error = (stack(x_BTD.bfloat16()).float() - exact_BTD).abs().max()
    assert (decoded_BTD.float() - exact_BTD).abs().max() <= 2 * forward_error + 2**-8


def test_layers_with_configurations_of_their_own_decode_as_they_run(make_stack, tiny):
    """Windows, heads, widths, rotary embeddings and options change from layer to layer; two layers share with owners of
    different shapes."""
    wide = dataclasses.replace(tiny, n_heads=6, n_kv_heads=3, head_dim=12, rope_base=500.0, linear_heads=2)
    bare = dataclasses.replace(tiny, rotary_fraction=0.0, qk_norm=False, output_gate=False, sink_logits=False)
    configs = {
        "F": [tiny, dataclasses.replace(wide, rotary_fraction=0.0)],
        "R": [dataclasses.replace(tiny, n_heads=2, output_gate=False), dataclasses.replace(wide, rotary_fraction=0.0)],
        "S": [dataclasses.replace(wide, window=2), dataclasses.replace(bare, window=7)],
        "r": [dataclasses.replace(wide, window=2, sink_logits=False), dataclasses.replace(bare, window=7)],
        "L": [wide, bare],
        "G": [bare, wide],
        "K": [dataclasses.replace(tiny, conv_width=2), wide],
        "A": [tiny, dataclasses.replace(bare, n_heads=3, n_kv_heads=1, latent_query_dim=None, latent_dim=None)],
        "D": [dataclasses.replace(tiny, mamba_groups=1, conv_width=2), dataclasses.replace(wide, mamba_groups=2)],
        "C": [dataclasses.replace(tiny, conv_width=8, short_conv_dim=None), wide],
        "M": [dataclasses.replace(wide, mixed_window=3), tiny],
    }
    assert configs.keys() == KINDS.keys()
    pattern = "FRSrLGKMADC"
    stack = make_stack(pattern * 2, [configs[letter][n] for n in range(2) for letter in pattern])
    x_BTD = stack.input(2, 17)
    expected_BTD = stack(x_BTD).detach()
    decoded_BTD, cache = run_in_chunks(stack, x_BTD, [5, 6, 9, *range(11, 17)])
    torch.testing.assert_close(decoded_BTD, expected_BTD, rtol=0, atol=2e-5)
    assert [state.nbytes() for state in cache.layers] == cache_bytes(stack.configs, stack.plan, 17, 2, element_size=4)


def test_the_cache_never_reads_memory_it_has_not_written(make_stack, tiny):
    stack = make_stack("SSAFRrGLKMDC", tiny)
    x_BTD = stack.input(1, 17)
    cache = stack.cache(1, 30)
    for state in cache.layers[:4]:
        for tensor in state.tensors.values():
            tensor.fill_(float("nan"))
    with torch.no_grad():
        outputs = [stack(x_BTD[:, begin:end], cache) for begin, end in ((0, 3), (3, 4), (4, 13), (13, 14), (14, 17))]
    assert torch.cat(outputs, dim=1).isfinite().all()


def test_a_forward_with_a_cache_leaves_no_graph_in_it(make_stack, tiny):
    stack = make_stack("SFLGKADC", tiny)
    cache = stack.cache(1, 8)
    stack(stack.input(1, 4), cache)
    stack(stack.input(1, 1), cache)
    assert not any(tensor.requires_grad for state in cache.layers for tensor in state.tensors.values())

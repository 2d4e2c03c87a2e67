"""The torch reference of flash_attention against the dense formula in fp64: outputs and every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_kernels.softmax.flash_attention import flash_attention


def dense_attention(q_BTHK, k_BSGK, v_BSGV, *, causal=True, window=None, scale=None, sinks_H=None, cu_seqlens=None):
    """The formula itself: all T x S scores, a mask, a softmax with the sink as one more column."""
    T, H, K = q_BTHK.shape[1:]
    S, G = k_BSGK.shape[1:3]
    k_BSHK, v_BSHV = (x.repeat_interleave(H // G, dim=2) for x in (k_BSGK, v_BSGV))
    scores_BHTS = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK) * (K**-0.5 if scale is None else scale)
    position_T, key_S = torch.arange(S - T, S)[:, None], torch.arange(S)[None, :]
    mask_TS = torch.ones(T, S, dtype=torch.bool)
    if causal:
        mask_TS &= key_S <= position_T
    if window is not None:
        mask_TS &= key_S > position_T - window
    if cu_seqlens is not None:
        sequence_S = torch.bucketize(torch.arange(S), cu_seqlens[1:], right=True)
        mask_TS &= sequence_S[:, None] == sequence_S[None, :]
    scores_BHTS = scores_BHTS.masked_fill(~mask_TS, -torch.inf)
    if sinks_H is not None:
        column = sinks_H.to(scores_BHTS.dtype)[None, :, None, None].expand(*scores_BHTS.shape[:3], 1)
        scores_BHTS = torch.cat([scores_BHTS, column], dim=-1)
    return torch.einsum("bhts,bshv->bthv", scores_BHTS.softmax(-1)[..., :S], v_BSHV)


def random_inputs(B, T, S, H, G, K, V, sinks, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, T, H, K), (B, S, G, K), (B, S, G, V)] + ([(H,)] if sinks else [])
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def output_and_gradients(function, inputs, seed=1, **options):
    names = ("q_BTHK", "k_BSGK", "v_BSGV", "sinks_H")
    o = function(*inputs[:3], **options, **({"sinks_H": inputs[3]} if len(inputs) > 3 else {}))
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(o.dtype)
    return dict(zip(("o", *names), (o, *torch.autograd.grad(o, inputs, do))))


def assert_same(ours, reference, tolerance=1e-10):
    for name, x in ours.items():
        assert x.shape == reference[name].shape, name
        torch.testing.assert_close(
            x, reference[name], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@settings(max_examples=60, deadline=None)
@given(
    T=st.sampled_from([1, 2, 63, 100, 257]),
    more_keys=st.sampled_from([0, 0, 1, 70, 200]),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    widths=st.sampled_from([(8, 8), (8, 16), (16, 4)]),
    window=st.sampled_from([None, 1, 5, 64, 65, 100, 1000]),
    sinks=st.booleans(),
    B=st.sampled_from([1, 2]),
)
def test_causal_attention_equals_the_formula(T, more_keys, heads, widths, window, sinks, B):
    inputs = random_inputs(B, T, T + more_keys, *heads, *widths, sinks)
    assert_same(
        output_and_gradients(flash_attention, inputs, window=window),
        output_and_gradients(dense_attention, inputs, window=window),
    )


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(("T", "S"), [(7, 7), (5, 90), (90, 5), (3, 1)])
def test_bidirectional_attention_equals_the_formula(T, S, sinks):
    inputs = random_inputs(2, T, S, 4, 2, 8, 8, sinks)
    options = {"causal": False, "scale": 0.3}
    assert_same(
        output_and_gradients(flash_attention, inputs, **options),
        output_and_gradients(dense_attention, inputs, **options),
    )


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=5),
    window=st.sampled_from([None, 3, 70]),
    sinks=st.booleans(),
)
def test_packed_sequences_equal_the_formula(lengths, window, sinks):
    T = sum(lengths)
    if T == 0:
        return
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    inputs = random_inputs(1, T, T, 4, 2, 8, 8, sinks)
    options = {"window": window, "cu_seqlens": cu_seqlens}
    assert_same(
        output_and_gradients(flash_attention, inputs, **options),
        output_and_gradients(dense_attention, inputs, **options),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_no_worse_than_the_dtype(dtype):
    """A sink of 8 in bf16 would be off by 2^-6 if its logit were rounded with the queries; the error must stay that of
    rounding the output."""
    inputs = random_inputs(1, 200, 200, 4, 2, 32, 32, sinks=True, dtype=dtype)
    inputs[3] = (inputs[3].detach() + 8.1).requires_grad_()
    exact = dense_attention(*(x.detach().double() for x in inputs[:3]), sinks_H=inputs[3].detach().double(), window=70)
    ours = flash_attention(*inputs[:3], sinks_H=inputs[3], window=70)
    assert ours.dtype == dtype
    assert (ours.double() - exact).abs().max() < 8 * torch.finfo(dtype).eps * exact.abs().max()


def test_no_queries_give_an_empty_output_and_zero_gradients():
    inputs = random_inputs(2, 0, 5, 4, 2, 8, 8, sinks=True)
    result = output_and_gradients(flash_attention, inputs)
    assert result["o"].shape == (2, 0, 4, 8)
    assert all(not result[name].any() for name in ("q_BTHK", "k_BSGK", "v_BSGV", "sinks_H"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_BTHK": torch.zeros(2, 5, 4)}, "q_BTHK has shape"),
        ({"k_BSGK": torch.zeros(2, 5, 2, 9)}, "k_BSGK has shape"),
        ({"v_BSGV": torch.zeros(2, 6, 2, 8)}, "v_BSGV has shape"),
        ({"k_BSGK": torch.zeros(2, 5, 3, 8), "v_BSGV": torch.zeros(2, 5, 3, 8)}, "multiple of G"),
        ({"k_BSGK": torch.zeros(2, 4, 2, 8), "v_BSGV": torch.zeros(2, 4, 2, 8)}, "at least as many keys"),
        ({"v_BSGV": torch.zeros(2, 5, 2, 8, dtype=torch.float16)}, "v_BSGV is torch.float16"),
        ({"window": 0}, "window=0"),
        ({"window": 3, "causal": False}, "causal=False"),
        ({"sinks_H": torch.zeros(2)}, "sinks_H has shape"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "B must be 1"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, "torch.int32, legal are torch.int64"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"backend": "cuda"}, "backend='cuda'"),
    ],
)
def test_wrong_arguments_are_refused_by_name(change, message):
    arguments = {
        "q_BTHK": torch.zeros(2, 5, 4, 8),
        "k_BSGK": torch.zeros(2, 5, 2, 8),
        "v_BSGV": torch.zeros(2, 5, 2, 8),
    } | change
    with pytest.raises(ValueError, match=message):
        flash_attention(**arguments)


@pytest.mark.parametrize("offsets", [[0, 3, 2, 5], [1, 5], [0, 4], [0, 3, 6]])
def test_offsets_that_do_not_cover_the_tokens_are_refused(offsets):
    q, k, v = (torch.zeros(1, 5, heads, 8) for heads in (4, 2, 2))
    with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 to T=5, got \["):
        flash_attention(q, k, v, cu_seqlens=torch.tensor(offsets))

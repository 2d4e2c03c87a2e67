"""The Triton kernels of flash_attention in the interpreter, against the torch reference in fp64 (itself proved against
the dense formula).

Budgets come from the data: a kernel may be at most twice as far from fp64 as torch in the same dtype is, plus a few
roundings of its own.
"""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from triton_kernels.softmax.flash_attention import flash_attention
from triton_kernels.softmax.flash_decode import flash_decode
from triton_kernels.softmax.rotary import rotary_tables

NAMES = ("q_BTHK", "k_BSGK", "v_BSGV", "sinks_H")


def random_inputs(B, T, S, H, G, K, V, sinks, dtype):
    generator = torch.Generator().manual_seed(T + 1000 * S)
    shapes = [(B, T, H, K), (B, S, G, K), (B, S, G, V)] + ([(H,)] if sinks else [])
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def output_and_gradients(inputs, **options):
    o = flash_attention(*inputs[:3], **options, **({"sinks_H": inputs[3]} if len(inputs) > 3 else {}))
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o.dtype)
    return dict(zip(("o", *NAMES), (o, *torch.autograd.grad(o, inputs, do))))


def assert_as_exact_as_torch(inputs, **options):
    exact = output_and_gradients([x.detach().double().requires_grad_() for x in inputs], backend="torch", **options)
    torch_result = output_and_gradients(inputs, backend="torch", **options)
    for name, x in output_and_gradients(inputs, backend="triton", **options).items():
        assert x.dtype == inputs[0].dtype
        reference = exact[name]
        if reference.numel() == 0:
            continue
        rounding = 8 * torch.finfo(x.dtype).eps * max(1.0, reference.abs().max().item())
        budget = 2 * (torch_result[name].double() - reference).abs().max().item() + rounding
        error = (x.double() - reference).abs().max().item()
        # Written so that a NaN fails.
        assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"


@pytest.mark.parametrize(
    ("T", "S", "H", "G", "K", "V", "sinks", "dtype", "options"),
    [
        (1, 1, 1, 1, 32, 32, False, torch.float32, {}),
        (63, 63, 2, 1, 32, 32, True, torch.float16, {}),
        (100, 100, 2, 2, 64, 32, False, torch.float32, {"scale": 0.5}),
        (100, 100, 2, 2, 48, 80, True, torch.float16, {}),
        (257, 257, 1, 1, 32, 32, False, torch.float16, {}),
        (1, 100, 2, 1, 32, 32, True, torch.float32, {}),
        (63, 200, 3, 1, 32, 64, False, torch.float16, {}),
        (40, 40, 1, 1, 256, 256, False, torch.float16, {}),
        (100, 37, 2, 1, 32, 32, True, torch.float16, {"causal": False}),
        (17, 40, 1, 1, 128, 128, False, torch.float32, {"causal": False}),
        (100, 100, 2, 1, 32, 32, True, torch.float16, {"window": 1}),
        (257, 257, 2, 1, 32, 32, False, torch.float16, {"window": 40}),
        (257, 257, 1, 1, 32, 32, False, torch.float16, {"window": 100}),
        (100, 300, 2, 2, 32, 32, True, torch.float16, {"window": 130}),
        (63, 63, 1, 1, 32, 32, False, torch.float32, {"window": 1000}),
    ],
)
def test_output_and_gradients(T, S, H, G, K, V, sinks, dtype, options):
    assert_as_exact_as_torch(random_inputs(2 if T < 64 else 1, T, S, H, G, K, V, sinks, dtype), **options)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    T=st.integers(1, 40),
    more_keys=st.sampled_from([0, 0, 33]),
    heads=st.sampled_from([(1, 1), (2, 1), (3, 3)]),
    widths=st.sampled_from([(32, 32), (40, 64), (128, 32), (64, 256)]),
    window=st.sampled_from([None, 1, 17]),
    sinks=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_any_shape_and_option(T, more_keys, heads, widths, window, sinks, dtype):
    assert_as_exact_as_torch(random_inputs(1, T, T + more_keys, *heads, *widths, sinks, dtype), window=window)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 15, 16, 33, 70]), min_size=1, max_size=6),
    heads=st.sampled_from([(1, 1), (2, 1), (3, 3)]),
    widths=st.sampled_from([(32, 32), (40, 64), (128, 32)]),
    options=st.sampled_from([{}, {"window": 1}, {"window": 9}, {"causal": False}, {"scale": 0.5}]),
    sinks=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
@example(
    lengths=[0, 1, 63, 0, 64, 1, 70, 0],
    heads=(2, 1),
    widths=(32, 32),
    options={"window": 9},
    sinks=True,
    dtype=torch.float16,
)
def test_packed_sequences(lengths, heads, widths, options, sinks, dtype):
    cu_seqlens, T = torch.tensor([0, *lengths]).cumsum(0), sum(lengths)
    assert_as_exact_as_torch(random_inputs(1, T, T, *heads, *widths, sinks, dtype), cu_seqlens=cu_seqlens, **options)


def test_strided_inputs_are_read_where_they_are():
    """q, k and v as slices of one projection, and one tensor whose channels are not side by side."""
    fused = torch.randn(2, 50, 4, 3 * 32, generator=torch.Generator().manual_seed(0)).half()
    q, k, v = fused.split(32, dim=-1)
    k = k.transpose(1, 3).contiguous().transpose(1, 3)
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    assert not any(x.is_contiguous() for x in inputs)
    assert_as_exact_as_torch(inputs)


@pytest.mark.parametrize(
    "options", [{}, {"window": 20, "rotary": rotary_tables(torch.arange(150), rotary_dim=32, base=100.0)}]
)
def test_the_future_changes_no_bit_of_the_past(options):
    """Outputs before the change, and gradients of queries before it, are the same bits; so are gradients of keys that
    no later loss can see."""
    inputs = random_inputs(1, 150, 150, 2, 1, 32, 32, False, torch.float16)
    changed = [x.detach().clone() for x in inputs]
    for x in changed:
        x[:, 90:] = x[:, 90:] * -3 + 1
    changed = [x.requires_grad_() for x in changed]
    results = []
    for tensors in (inputs, changed):
        o = flash_attention(*tensors, backend="triton", **options)
        results.append(
            (o[:, :90], *(g[:, :90] for g in torch.autograd.grad(o[:, :90].float().square().sum(), tensors)))
        )
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_two_runs_give_the_same_bits():
    inputs = random_inputs(1, 130, 130, 4, 2, 32, 32, True, torch.float16)
    first, second = (output_and_gradients(inputs, backend="triton", window=50) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_queries_and_no_keys():
    empty = random_inputs(1, 0, 3, 2, 1, 32, 32, False, torch.float32)
    result = output_and_gradients(empty, backend="triton")
    assert result["o"].shape == (1, 0, 2, 32)
    assert not result["k_BSGK"].any()
    assert not result["v_BSGV"].any()
    nothing_to_see = random_inputs(1, 3, 0, 2, 1, 32, 32, False, torch.float32)
    assert not flash_attention(*nothing_to_see, causal=False, backend="triton").any()


def test_the_operator_is_registered_soundly():
    """Schema, fake implementation and autograd agree with what the op does: torch.compile and CUDA graphs rely on
    it."""
    from triton_kernels.softmax.flash_attention_launch import backward_op, forward_op

    q, k, v, sinks = random_inputs(1, 20, 30, 2, 1, 32, 16, True, torch.float32)
    tables = rotary_tables(torch.arange(20), rotary_dim=16, base=100.0)
    options = (True, 7, 0.2)
    arguments = (q, k, v, None, *tables, sinks, *options)
    torch.library.opcheck(
        forward_op, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )
    o, lse = forward_op(*arguments)
    saved = tuple(x.detach() for x in (torch.randn_like(o), o, lse, q, k, v))
    torch.library.opcheck(backward_op, (*saved, None, *tables, *options), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("change", [{"dtype": torch.float64}, {"K": 264}])
def test_what_the_kernels_do_not_take_is_refused(change):
    q, k, v = random_inputs(1, 4, 4, 1, 1, change.get("K", 32), 32, False, change.get("dtype", torch.float32))
    with pytest.raises(ValueError, match="Triton kernels take"):
        flash_attention(q, k, v, backend="triton")


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("T", "window"), [(1, None), (5, None), (64, None), (70, None), (140, 8)])
def test_a_sink_of_minus_infinity_is_none(T: int, window: int | None, backend: str) -> None:
    """At every length, forward and backward, and in decoding; the other head's sink is not disturbed."""
    drawn = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(1, T, 2, 16, generator=drawn).requires_grad_() for _ in range(3))
    sinks_H = torch.tensor([-torch.inf, 0.3], requires_grad=True)
    with_sinks = flash_attention(q, k, v, sinks_H=sinks_H, window=window, backend=backend)
    without = flash_attention(q, k, v, window=window, backend="torch")
    torch.testing.assert_close(with_sinks[:, :, 0], without[:, :, 0], rtol=1e-4, atol=1e-5)
    *grads, dsinks_H = torch.autograd.grad(with_sinks.square().sum(), (q, k, v, sinks_H))
    expected = torch.autograd.grad(without[:, :, 0].square().sum(), (q, k, v))
    for grad, right in zip(grads, expected):
        torch.testing.assert_close(grad[:, :, 0], right[:, :, 0], rtol=1e-4, atol=1e-4)
    assert dsinks_H[0] == 0
    assert dsinks_H[1].abs() > 0
    decoded = flash_decode(
        q[:, -1].detach(),
        k.detach(),
        v.detach(),
        torch.tensor([T]),
        window=window,
        sinks_H=sinks_H.detach(),
        backend=backend,
    )
    torch.testing.assert_close(decoded, with_sinks[:, -1].detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_nan_query_decodes_to_nan_and_no_tokens_to_zeros(backend: str) -> None:
    q_BHK, cache = torch.randn(3, 2, 16), torch.randn(3, 8, 2, 16)
    q_BHK[0, 1, 3] = torch.nan
    o_BHV = flash_decode(q_BHK, cache, cache, torch.tensor([5, 5, 0]), backend=backend)
    assert o_BHV.isnan().all(-1).tolist() == [[False, True], [False, False], [False, False]]
    assert (o_BHV[2] == 0).all()

"""causal_conv1d against the formula in fp64, token by token: output, tail and every gradient; alone, packed,
continued."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_kernels.linear.causal_conv1d import causal_conv1d
from triton_kernels.native.library import native


def plain_convolution(x_BTD, weight_DW, bias_D=None, activation="silu", initial_tail=None, cu_seqlens=None):
    """One sequence at a time, one token at a time: the window of W inputs ending at the token, times the weights."""
    if cu_seqlens is not None:
        rows = [x_BTD[0, a:b] for a, b in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:])]
    else:
        rows = list(x_BTD)
    W1 = weight_DW.shape[1] - 1
    outputs, tails = [], []
    for n, row_TD in enumerate(rows):
        before = row_TD.new_zeros(W1, row_TD.shape[1]) if initial_tail is None else initial_tail[n].T
        row_LD = torch.cat([before, row_TD])
        z = [
            (row_LD[t : t + W1 + 1].T * weight_DW).sum(1) + (0 if bias_D is None else bias_D)
            for t in range(len(row_TD))
        ]
        z_TD = torch.stack(z) if z else row_TD
        outputs.append(z_TD * torch.sigmoid(z_TD) if activation == "silu" else z_TD)
        tails.append(row_LD[len(row_LD) - W1 :].T)
    y = torch.cat(outputs)[None] if cu_seqlens is not None else torch.stack(outputs)
    return y, torch.stack(tails)


def random_inputs(B, T, D, W, S, bias, tail, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        {"x_BTD": (B, T, D), "weight_DW": (D, W)}
        | ({"bias_D": (D,)} if bias else {})
        | ({"initial_tail": (S, D, W - 1)} if tail else {})
    )
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def outputs_and_gradients(function, inputs, **options):
    y, tail = function(**inputs, **options)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in (y, tail)]
    return {"y": y, "tail": tail} | dict(zip(inputs, torch.autograd.grad((y, tail), list(inputs.values()), upstream)))


def assert_same(ours, reference, tolerance=1e-12):
    for name, x in ours.items():
        torch.testing.assert_close(
            x, reference[name], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@settings(max_examples=25, deadline=None)
@given(
    B=st.integers(1, 3),
    T=st.sampled_from([1, 2, 3, 63, 100]),
    W=st.integers(2, 8),
    bias=st.booleans(),
    tail=st.booleans(),
    activation=st.sampled_from(["silu", None]),
)
def test_batch_equals_the_formula(B, T, W, bias, tail, activation):
    inputs = random_inputs(B, T, 5, W, B, bias, tail)
    options = {"activation": activation}
    assert_same(
        outputs_and_gradients(causal_conv1d, inputs, **options),
        outputs_and_gradients(plain_convolution, inputs, **options),
    )


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=5).filter(any),
    W=st.integers(2, 8),
    tail=st.booleans(),
)
def test_packed_sequences_equal_the_formula(lengths, W, tail):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    inputs = random_inputs(1, sum(lengths), 3, W, len(lengths), True, tail)
    ours = outputs_and_gradients(causal_conv1d, inputs, cu_seqlens=cu_seqlens)
    assert_same(ours, outputs_and_gradients(plain_convolution, inputs, cu_seqlens=cu_seqlens))


def test_long_inputs_are_cut_into_pieces_that_agree():
    """Longer than one piece of the blocked loops, so their seams are crossed."""
    inputs = random_inputs(2, 500, 700, 4, 2, True, True)
    y = causal_conv1d(**inputs)[0]
    x_BLD = torch.cat([inputs["initial_tail"].transpose(1, 2), inputs["x_BTD"]], 1)
    z = torch.nn.functional.conv1d(
        x_BLD.transpose(1, 2), inputs["weight_DW"][:, None], inputs["bias_D"], groups=700
    ).transpose(1, 2)
    expected = torch.nn.functional.silu(z)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(y)
    for ours, reference in zip(
        torch.autograd.grad((y * upstream).sum(), list(inputs.values())),
        torch.autograd.grad((expected * upstream).sum(), list(inputs.values())),
    ):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)


@settings(max_examples=8, deadline=None)
@given(T=st.integers(2, 9), cut=st.integers(1, 8), W=st.sampled_from([2, 4, 8]))
def test_a_sequence_may_be_continued_anywhere_and_token_by_token(T, cut, W):
    cut = min(cut, T - 1)
    inputs = {name: x.detach() for name, x in random_inputs(2, T, 3, W, 2, True, True).items()}
    whole, tail = causal_conv1d(**inputs)
    head, middle = causal_conv1d(**inputs | {"x_BTD": inputs["x_BTD"][:, :cut]})
    pieces = [head]
    for t in range(cut, T):
        y, middle = causal_conv1d(**inputs | {"x_BTD": inputs["x_BTD"][:, t : t + 1], "initial_tail": middle})
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-12, atol=1e-12)
    assert torch.equal(middle, tail)


def test_bf16_inputs_are_summed_in_fp32():
    inputs = random_inputs(2, 100, 16, 4, 2, True, True, torch.bfloat16)
    exact = causal_conv1d(**{name: x.detach().double() for name, x in inputs.items()})[0]
    y, tail = causal_conv1d(**inputs)
    assert y.dtype == tail.dtype == torch.bfloat16
    assert torch.equal(y, exact.float().bfloat16()) or (y.double() - exact).abs().max() <= 2**-8 * exact.abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_BTD": torch.zeros(5, 3)}, "x_BTD has shape"),
        ({"weight_DW": torch.zeros(4, 4)}, "weight_DW has shape"),
        ({"weight_DW": torch.zeros(3, 9)}, "width W=9"),
        ({"activation": "relu"}, "activation='relu'"),
        ({"bias_D": torch.zeros(4)}, "bias_D has shape"),
        ({"initial_tail": torch.zeros(2, 3, 4)}, "initial_tail has shape"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "B must be 1"),
        ({"x_BTD": torch.zeros(2, 5, 3, dtype=torch.int64)}, "x_BTD is torch.int64"),
    ],
)
def test_wrong_arguments_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**{"x_BTD": torch.zeros(2, 5, 3), "weight_DW": torch.zeros(3, 4)} | change)


@pytest.mark.parametrize(
    ("B", "T", "D", "W", "bias", "tail", "activation", "lengths", "dtype"),
    [
        (1, 1, 5, 4, True, True, "silu", None, torch.float16),
        (2, 2, 3, 4, False, True, "silu", None, torch.float32),
        (2, 63, 130, 4, True, True, "silu", None, torch.float16),
        (1, 100, 7, 2, True, False, None, None, torch.float32),
        (1, 100, 7, 2, True, False, None, None, torch.float16),
        (1, 34, 7, 3, False, True, "silu", [0, 1, 17, 0, 2, 14, 0], torch.float16),
        (1, 257, 4, 4, True, True, "silu", [100, 1, 1, 155], torch.float32),
    ],
)
def test_kernels_are_as_exact_as_torch(B, T, D, W, bias, tail, activation, lengths, dtype):
    """In the interpreter, both outputs and every gradient against fp64: at most twice torch's own error in the same
    dtype plus a few roundings."""
    cu_seqlens = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    inputs = random_inputs(B, T, D, W, B if lengths is None else len(lengths), bias, tail, dtype)
    options = {"activation": activation, "cu_seqlens": cu_seqlens}
    exact = outputs_and_gradients(
        plain_convolution, {name: x.detach().double().requires_grad_() for name, x in inputs.items()}, **options
    )
    by_torch = outputs_and_gradients(causal_conv1d, inputs, backend="torch", **options)
    for name, x in outputs_and_gradients(causal_conv1d, inputs, backend="triton", **options).items():
        assert x.dtype == dtype
        budget = (
            2 * (by_torch[name].double() - exact[name]).abs().max()
            + 4 * torch.finfo(dtype).eps * exact[name].abs().max()
        )
        assert (x.double() - exact[name]).abs().max() <= budget, name


@pytest.mark.skipif(native().library is None, reason=native().reason)
@settings(max_examples=30, deadline=None)
@given(
    B=st.integers(1, 3),
    T=st.sampled_from([1, 2, 3, 63, 127, 129, 300]),
    D=st.sampled_from([1, 5, 128, 150]),
    W=st.integers(2, 8),
    bias=st.booleans(),
    tail=st.booleans(),
    activation=st.sampled_from(["silu", None]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
)
def test_in_c_equals_the_formula(B, T, D, W, bias, tail, activation, dtype):
    drawn = random_inputs(B, T, D, W, B, bias, tail, dtype)
    inputs = {name: x.detach().double().requires_grad_() for name, x in drawn.items()}
    exact = outputs_and_gradients(causal_conv1d, inputs, activation=activation)
    for name, x in outputs_and_gradients(causal_conv1d, drawn, activation=activation, backend="native").items():
        assert x.dtype == dtype
        budget = (16 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps * exact[name].abs().max()
        assert (x.double() - exact[name]).abs().max() <= budget, name


@pytest.mark.skipif(native().library is None, reason=native().reason)
def test_in_c_the_same_bits_by_one_thread_or_more_wherever_inputs_lie():
    wide = torch.randn(3, 300, 160, generator=torch.Generator().manual_seed(0))
    _, weight, bias, tail = (
        x.detach() for x in random_inputs(3, 1, 150, 4, 3, True, True, torch.float32, seed=1).values()
    )
    dense, before, results = wide[..., 3:153].contiguous(), torch.get_num_threads(), []
    try:
        for threads, x in ((1, dense), (2, wide[..., 3:153]), (3, dense.mT.contiguous().mT)):
            torch.set_num_threads(threads)
            leaves = [leaf.detach().requires_grad_() for leaf in (x, weight, bias, tail)]
            y, last = causal_conv1d(*leaves[:2], bias_D=leaves[2], initial_tail=leaves[3], backend="native")
            results.append((y, last, *torch.autograd.grad((y, last), leaves, (dense.cos(), last.detach().cos()))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, right) for other in results[1:] for x, right in zip(other, results[0], strict=True))


# That the bits are the same each time is what tools/test_every_operation.py sees, of packed sequences too.
@settings(max_examples=5, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 1), st.integers(0, 19)), min_size=1, max_size=4).filter(any),
    W=st.integers(2, 8),
    activation=st.sampled_from(["silu", None]),
)
def test_kernels_on_packed_sequences_of_any_length_equal_the_formula(lengths, W, activation):
    options = {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0), "activation": activation}
    inputs = random_inputs(1, sum(lengths), 3, W, len(lengths), True, True, torch.float32)
    exact = outputs_and_gradients(
        plain_convolution, {name: x.detach().double().requires_grad_() for name, x in inputs.items()}, **options
    )
    found = outputs_and_gradients(causal_conv1d, inputs, backend="triton", **options)
    assert_same({name: x.double() for name, x in found.items()}, exact, tolerance=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("T", "cu_seqlens"), [(0, None), (0, [0, 0, 0]), (1, None), (1, [0, 0, 1])])
def test_no_token_and_one_token(T, cu_seqlens, backend):
    """The tail passes through, shifted by what there is, and so do its gradients; parameters that met nothing have a
    gradient of zero."""
    inputs = random_inputs(2 if cu_seqlens is None else 1, T, 5, 4, 2, True, True, torch.float32)
    offsets = None if cu_seqlens is None else torch.tensor(cu_seqlens)
    ours = outputs_and_gradients(causal_conv1d, inputs, backend=backend, cu_seqlens=offsets)
    if T == 1:
        return assert_same(ours, outputs_and_gradients(plain_convolution, inputs, cu_seqlens=offsets), tolerance=1e-5)
    assert ours["y"].shape == ours["x_BTD"].shape == inputs["x_BTD"].shape
    assert torch.equal(ours["tail"], inputs["initial_tail"])
    assert not ours["weight_DW"].any()
    assert not ours["bias_D"].any()
    upstream = torch.randn(ours["tail"].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    assert torch.equal(ours["initial_tail"], upstream)


@pytest.mark.parametrize("packed", [False, True])
def test_kernels_read_inputs_wherever_they_lie(packed):
    """Every second token, some channels of a wider projection, channels before tokens: the bits of the dense input."""
    wide = torch.randn(1, 44, 9, generator=torch.Generator().manual_seed(0))
    _, weight, bias, tail = (
        x.detach() for x in random_inputs(1, 1, 5, 4, 2 if packed else 1, True, True, torch.float32).values()
    )
    options = {
        "bias_D": bias,
        "initial_tail": tail,
        "cu_seqlens": torch.tensor([0, 3, 22]) if packed else None,
        "backend": "triton",
    }
    dense = wide[:, ::2, 2:7].contiguous()
    results = []
    for x in (dense, wide[:, ::2, 2:7], dense.transpose(1, 2).contiguous().transpose(1, 2)):
        x = x.detach().requires_grad_()
        y, last = causal_conv1d(x, weight, **options)
        results.append((y, last, *torch.autograd.grad((y, last), x, (dense.cos(), last.cos()))))
    assert all(torch.equal(ours, right) for other in results[1:] for ours, right in zip(other, results[0]))


def test_kernels_let_no_future_and_no_neighbour_through():
    """Bits before a change stay the same, in outputs and in gradients, and so do those of the other packed sequence."""
    inputs = {name: x.detach() for name, x in random_inputs(1, 60, 4, 4, 2, True, True, torch.float32).items()}
    cu_seqlens = torch.tensor([0, 40, 60])
    changed = inputs | {"x_BTD": inputs["x_BTD"].clone()}
    changed["x_BTD"][:, 25:40] += 1
    results = []
    for arguments in (inputs, changed):
        x = arguments["x_BTD"].requires_grad_()
        y, _ = causal_conv1d(**arguments | {"x_BTD": x}, cu_seqlens=cu_seqlens, backend="triton")
        kept = torch.cat([y[:, :25], y[:, 40:]], 1)
        (gradient,) = torch.autograd.grad(kept.square().sum(), x)
        results.append((kept, torch.cat([gradient[:, :25], gradient[:, 40:]], 1)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_the_operator_is_registered_soundly():
    from triton_kernels.linear.causal_conv1d_launch import backward_op, forward_op

    x, weight, bias, tail = random_inputs(2, 5, 6, 4, 2, True, True, torch.float32).values()
    tail = tail.detach().transpose(1, 2).requires_grad_()
    arguments = (x, weight, bias, tail, None, True)
    torch.library.opcheck(
        forward_op, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )
    detached = [t.detach() for t in (x, x, weight, bias, tail)]
    torch.library.opcheck(backward_op, (*detached, None, True), test_utils=("test_schema", "test_faketensor"))

"""gated_rms_norm against its formula in fp64: output and every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_kernels.linear.gated_rms_norm import gated_rms_norm
from triton_kernels.native.library import native

NAMES = ("x", "gate", "weight")


def plain_norm(x, gate, weight, *, eps, activation="silu"):
    activated = torch.sigmoid(gate) * (gate if activation == "silu" else 1)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight * activated


def random_inputs(shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for s in (shape, shape, shape[-1:])
    ]


def output_and_gradients(function, inputs, **options):
    y = function(*inputs, **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return dict(zip(("y", *NAMES), (y, *torch.autograd.grad(y, inputs, dy))))


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.sampled_from([1, 2, 7]), min_size=0, max_size=3).flatmap(
        lambda rows: st.sampled_from([(*rows, D) for D in (1, 5, 64, 100)])
    ),
    activation=st.sampled_from(["silu", "sigmoid"]),
    eps=st.sampled_from([1e-6, 1e-2]),
)
def test_equals_the_formula(shape, activation, eps):
    inputs = random_inputs(shape)
    options = {"eps": eps, "activation": activation}
    ours, reference = (
        output_and_gradients(gated_rms_norm, inputs, **options),
        output_and_gradients(plain_norm, inputs, **options),
    )
    for name, x in ours.items():
        torch.testing.assert_close(x, reference[name], rtol=1e-10, atol=1e-10)


def test_a_row_of_zeros_has_finite_gradients():
    x, gate, weight = (
        torch.zeros(2, 8, requires_grad=True),
        torch.ones(2, 8, requires_grad=True),
        torch.ones(8, requires_grad=True),
    )
    gradients = torch.autograd.grad(gated_rms_norm(x, gate, weight, eps=1e-6).sum(), (x, gate, weight))
    assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": torch.zeros(3, 5)}, "gate has shape"),
        ({"weight": torch.zeros(3)}, "weight has shape"),
        ({"gate": torch.zeros(3, 4).half()}, "gate is torch.float16"),
        ({"activation": "tanh"}, "activation='tanh'"),
        ({"x": torch.tensor(1.0)}, "x is a scalar"),
    ],
)
def test_wrong_arguments_are_refused_by_name(change, message):
    arguments = {"x": torch.zeros(3, 4), "gate": torch.zeros(3, 4), "weight": torch.ones(4), "eps": 1e-6}
    with pytest.raises(ValueError, match=message):
        gated_rms_norm(**arguments | change)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("shape", "activation"),
    [((1, 16), "silu"), ((2, 63, 3, 100), "silu"), ((257, 64), "sigmoid"), ((3, 2048), "silu"), ((301, 1024), "silu")],
)
def test_kernels_are_as_exact_as_torch(shape, activation, dtype):
    """In the interpreter, every output and gradient against fp64: at most twice torch's own error in the same dtype
    plus a few roundings."""
    inputs = random_inputs(shape, dtype)
    options = {"eps": 1e-5, "activation": activation}
    exact = output_and_gradients(plain_norm, [x.detach().double().requires_grad_() for x in inputs], **options)
    by_torch = output_and_gradients(gated_rms_norm, inputs, backend="torch", **options)
    for name, x in output_and_gradients(gated_rms_norm, inputs, backend="triton", **options).items():
        assert x.dtype == dtype
        budget = (
            2 * (by_torch[name].double() - exact[name]).abs().max()
            + 4 * torch.finfo(dtype).eps * exact[name].abs().max()
        )
        assert (x.double() - exact[name]).abs().max() <= budget, name


@pytest.mark.skipif(native().library is None, reason=native().reason)
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (1000, 64), (2, 63, 3, 100), (301, 1024)])
@pytest.mark.parametrize(
    ("activation", "dtype"), [("silu", torch.float32), ("sigmoid", torch.float32), ("silu", torch.bfloat16)]
)
def test_in_c_is_as_exact_as_torch(shape, activation, dtype):
    inputs = [x.detach().double().requires_grad_() for x in random_inputs(shape, dtype)]
    options = {"eps": 1e-5, "activation": activation}
    exact = output_and_gradients(plain_norm, inputs, **options)
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    by_torch = output_and_gradients(gated_rms_norm, inputs, backend="torch", **options)
    for name, x in output_and_gradients(gated_rms_norm, inputs, backend="native", **options).items():
        assert x.dtype == dtype
        right, eps = exact[name], torch.finfo(dtype).eps
        # Of a narrow row's gradient nearly everything cancels.
        budget = 2 * (by_torch[name].double() - right).abs().max() + 4 * eps * right.abs().max().clamp(min=0.1)
        assert (x.double() - right).abs().max() <= budget, name


@pytest.mark.skipif(native().library is None, reason=native().reason)
def test_in_c_the_same_bits_by_one_thread_or_more_wherever_the_gate_lies():
    shape = (2, 150, 3, 20)
    x, gate, weight = (t.detach() for t in random_inputs(shape, torch.float32))
    beside = torch.cat([torch.ones(2, 150, 7), gate.flatten(2)], -1)[..., 7:].view(shape)
    before, results = torch.get_num_threads(), []
    try:
        for threads, layout in ((1, gate), (2, beside), (3, gate.transpose(0, 2).contiguous().transpose(0, 2))):
            torch.set_num_threads(threads)
            leaves = [t.detach().requires_grad_() for t in (x, layout, weight)]
            results.append(list(output_and_gradients(gated_rms_norm, leaves, eps=1e-5, backend="native").values()))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))


def test_the_operator_is_registered_soundly():
    from triton_kernels.linear.gated_rms_norm_launch import backward_op, forward_op

    x, gate, weight = random_inputs((3, 5, 32), torch.float32)
    torch.library.opcheck(
        forward_op,
        (x, gate, weight, 1e-6, True),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    detached = [t.detach() for t in (x, x, gate, weight)]
    torch.library.opcheck(backward_op, (*detached, 1e-6, True), test_utils=("test_schema", "test_faketensor"))


def test_non_contiguous_rows_and_none():
    x, gate, weight = (t.detach() for t in random_inputs((8, 6, 32), torch.float32))
    ours = gated_rms_norm(x.transpose(0, 1), gate.transpose(0, 1), weight, eps=1e-6, backend="triton")
    torch.testing.assert_close(ours, gated_rms_norm(x, gate, weight, eps=1e-6, backend="torch").transpose(0, 1))
    empty = [x[:0].requires_grad_(), gate[:0].requires_grad_(), weight.requires_grad_()]
    results = output_and_gradients(gated_rms_norm, empty, eps=1e-6, backend="triton")
    assert results["y"].shape == results["x"].shape == results["gate"].shape == (0, 6, 32)
    assert torch.equal(results["weight"], torch.zeros(32))

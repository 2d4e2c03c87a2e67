"""gated_rms_norm against its formula in fp64: output and every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_kernels.gated_rms_norm import gated_rms_norm

NAMES = ("x", "gate", "weight")


def plain_norm(x, gate, weight, *, eps, activation="silu"):
    activated = torch.sigmoid(gate) * (gate if activation == "silu" else 1)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight * activated


def random_inputs(shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in (shape, shape, shape[-1:])]


def output_and_gradients(function, inputs, **options):
    y = function(*inputs, **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return dict(zip(("y", *NAMES), (y, *torch.autograd.grad(y, inputs, dy))))


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.sampled_from([1, 2, 7]), min_size=0, max_size=3).flatmap(lambda rows: st.sampled_from([(*rows, D) for D in (1, 5, 64, 100)])),
    activation=st.sampled_from(["silu", "sigmoid"]),
    eps=st.sampled_from([1e-6, 1e-2]),
)
def test_equals_the_formula(shape, activation, eps):
    inputs = random_inputs(shape)
    options = {"eps": eps, "activation": activation}
    ours, reference = output_and_gradients(gated_rms_norm, inputs, **options), output_and_gradients(plain_norm, inputs, **options)
    for name, x in ours.items():
        torch.testing.assert_close(x, reference[name], rtol=1e-10, atol=1e-10)


def test_a_row_of_zeros_has_finite_gradients():
    x, gate, weight = (torch.zeros(2, 8, requires_grad=True), torch.ones(2, 8, requires_grad=True), torch.ones(8, requires_grad=True))
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

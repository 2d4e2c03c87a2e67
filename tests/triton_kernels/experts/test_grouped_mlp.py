"""The Triton kernels of grouped_mlp in the interpreter, against the loop over experts in fp64: output and every
gradient.

Budgets come from the data: the kernels may be at most twice as far from fp64 as the loop in the same dtype is, plus a
few roundings of their own.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_kernels.experts.grouped_mlp import grouped_mlp

NAMES = ("x_TD", "w_gate_up_EDF2", "w_down_EFD", "weight_N")


def draw(mask_TE, D, F, dtype, *, n_padding=0, weight_dtype=None, seed=0):
    """Arguments of `grouped_mlp` for a dense map of which token goes to which expert. Padding names tokens and slots
    that do not exist, and weighs NaN: whatever touched it would be found out."""
    generator = torch.Generator().manual_seed(seed)
    T, E = mask_TE.shape
    _, token_N = mask_TE.t().nonzero(as_tuple=True)
    N = token_N.shape[0]

    def normal(*shape, scale=1.0):
        return torch.randn(shape, generator=generator) * scale

    floats = {
        "x_TD": normal(T, D),
        "w_gate_up_EDF2": normal(E, D, 2 * F, scale=D**-0.5),
        "w_down_EFD": normal(E, F, D, scale=F**-0.5),
    }
    inputs = {
        name: x.to(dtype if name == "x_TD" or weight_dtype is None else weight_dtype).requires_grad_()
        for name, x in floats.items()
    }
    absent = torch.full((n_padding,), 2**40)
    weight_N = torch.cat([torch.rand(N, generator=generator), torch.full((n_padding,), torch.nan)]).requires_grad_()
    return inputs | {
        "weight_N": weight_N,
        "token_N": torch.cat([token_N, absent]),
        "expert_offsets": torch.nn.functional.pad(mask_TE.sum(0).cumsum(0), (1, 0)),
        "token_offsets": torch.nn.functional.pad(mask_TE.sum(1).cumsum(0), (1, 0)),
        "row_of_slot_N": torch.cat([torch.sort(token_N, stable=True)[1], absent]),
    }


def output_and_gradients(inputs, backend, dtype=None):
    """In `dtype`, or as the inputs are."""
    inputs = {
        name: x.detach().to(dtype).requires_grad_() if dtype and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    y = grouped_mlp(**inputs, backend=backend)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return dict(zip(("y", *NAMES), (y, *torch.autograd.grad(y, [inputs[name] for name in NAMES], dy))))


def assert_as_exact_as_the_loop(mask_TE, D, F, dtype, **options):
    inputs = draw(mask_TE, D, F, dtype, **options)
    exact, loop = output_and_gradients(inputs, "torch", torch.float64), output_and_gradients(inputs, "torch")
    for name, x in output_and_gradients(inputs, "triton").items():
        assert x.dtype == inputs[name].dtype if name in inputs else dtype
        reference = exact[name]
        if reference.numel() == 0:
            continue
        rounding = 8 * torch.finfo(dtype).eps * max(1.0, reference.abs().max().item())
        budget = 2 * (loop[name].double() - reference).abs().max().item() + rounding
        error = (x.double() - reference).abs().max().item()
        # Written so that a NaN fails.
        assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"


def random_mask(T, E, share, seed=0):
    return torch.rand(T, E, generator=torch.Generator().manual_seed(seed)) < share


def offsets_of(inputs):
    return tuple(inputs[name] for name in ("expert_offsets", "token_offsets", "row_of_slot_N"))


@pytest.mark.parametrize(
    ("T", "E", "D", "F", "dtype"),
    [
        (1, 1, 16, 16, torch.float32),
        (1, 1, 16, 16, torch.float16),
        (63, 5, 48, 80, torch.float32),
        (50, 9, 32, 16, torch.float16),
        (175, 2, 16, 48, torch.float32),
        (33, 2, 144, 96, torch.float16),
    ],
)
def test_odd_sizes(T, E, D, F, dtype):
    """175 tokens give either expert more rows than the larger block has, 64, and not a multiple of it."""
    assert_as_exact_as_the_loop(random_mask(T, E, 0.4), D, F, dtype, n_padding=5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "case",
    [
        "one expert takes all",
        "empty first and last",
        "tokens without rows",
        "no rows at all",
        "every token everywhere",
        "no tokens",
    ],
)
def test_uneven_loads(case, dtype):
    mask_TE = random_mask(70, 6, 0.5)
    if case == "one expert takes all":
        mask_TE = torch.zeros_like(mask_TE)
        mask_TE[:, 3] = True
    elif case == "empty first and last":
        mask_TE[:, [0, 2, 5]] = False
    elif case == "tokens without rows":
        mask_TE[[0, 7, 8, 69]] = False
    elif case == "no rows at all":
        mask_TE = torch.zeros_like(mask_TE)
    elif case == "every token everywhere":
        mask_TE = torch.ones_like(mask_TE)
    elif case == "no tokens":
        mask_TE = mask_TE[:0]
    assert_as_exact_as_the_loop(mask_TE, 32, 16, dtype, n_padding=3)


@settings(deadline=None, max_examples=5)
@given(
    st.integers(1, 40),
    st.integers(1, 7),
    st.integers(1, 3),
    st.integers(1, 3),
    st.floats(0, 1),
    st.integers(0, 10**6),
    st.integers(0, 40),
)
def test_ragged_assignments(T, E, d, f, share, seed, n_padding):
    """0 to E rows per token, any number per expert."""
    assert_as_exact_as_the_loop(
        random_mask(T, E, share, seed), 16 * d, 16 * f, torch.float32, n_padding=n_padding, seed=seed
    )


def test_experts_in_another_dtype_get_their_gradients_in_it():
    assert_as_exact_as_the_loop(random_mask(40, 5, 0.5), 32, 16, torch.float16, weight_dtype=torch.float32)


def test_padding_gets_no_gradient_and_an_expert_without_rows_a_gradient_of_zero():
    mask_TE = random_mask(20, 4, 0.5)
    mask_TE[:, 2] = False
    gradients = output_and_gradients(draw(mask_TE, 16, 16, torch.float32, n_padding=6), "triton")
    assert not gradients["weight_N"][-6:].any()
    assert not gradients["w_gate_up_EDF2"][2].any()
    assert not gradients["w_down_EFD"][2].any()


def test_two_runs_give_the_same_bits():
    inputs = draw(random_mask(40, 3, 0.4), 32, 48, torch.float32)
    first, second = (output_and_gradients(inputs, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_of_all_rows_only_the_pre_activations_are_saved():
    inputs = draw(torch.eye(5, dtype=torch.bool).repeat(12, 1), 64, 16, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        grouped_mlp(**inputs, backend="triton")
    known = {t.data_ptr() for t in inputs.values()}
    assert [tuple(t.shape) for t in saved if t.data_ptr() not in known] == [(60, 32)]


def test_without_gradients_not_even_those_are_kept():
    from triton_kernels.experts.grouped_mlp_launch import forward_op

    inputs = draw(random_mask(20, 4, 0.5), 16, 16, torch.float32)
    with torch.no_grad():
        y, h = forward_op(
            *(inputs[name] for name in ("x_TD", "w_gate_up_EDF2", "w_down_EFD", "token_N", "weight_N")),
            *offsets_of(inputs),
            False,
        )
        torch.testing.assert_close(y, grouped_mlp(**inputs, backend="torch"))
    assert h.shape == (0, 32)


def test_frozen_experts_cost_no_gradient():
    inputs = draw(random_mask(20, 4, 0.5), 16, 16, torch.float32)
    whole = output_and_gradients(inputs, "triton")
    frozen = {name: x.detach() if name.startswith("w_") else x for name, x in inputs.items()}
    y = grouped_mlp(**frozen, backend="triton")
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    for name, gradient in zip(("x_TD", "weight_N"), torch.autograd.grad(y, [frozen["x_TD"], frozen["weight_N"]], dy)):
        assert torch.equal(gradient, whole[name])


def test_the_operators_are_registered_soundly():
    from triton_kernels.experts.grouped_mlp_launch import backward_op, forward_op

    inputs = draw(random_mask(20, 4, 0.5), 16, 32, torch.float32)
    rows = (inputs["token_N"], inputs["weight_N"], *offsets_of(inputs))
    tensors = (inputs["x_TD"], inputs["w_gate_up_EDF2"], inputs["w_down_EFD"], *rows)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward_op, (*tensors, True), test_utils=(*tests, "test_autograd_registration"))
    tensors = tuple(t.detach() for t in tensors)
    _, h = forward_op(*tensors, True)
    for experts in (True, False):
        torch.library.opcheck(backward_op, (tensors[0], *tensors, h, experts), test_utils=tests)


def test_one_graph_gives_the_same_numbers():
    """torch.compile(fullgraph=True), forward and backward, from the ops' own fake implementations."""
    inputs = draw(random_mask(20, 4, 0.5), 32, 16, torch.float32, n_padding=3)
    leaves = [inputs[name] for name in NAMES]
    eager, compiled = (
        call(**inputs, backend="triton")
        for call in (grouped_mlp, torch.compile(grouped_mlp, fullgraph=True, backend="aot_eager"))
    )
    dy = torch.randn(eager.shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(eager, compiled)
    for one, other in zip(torch.autograd.grad(eager, leaves, dy), torch.autograd.grad(compiled, leaves, dy)):
        assert torch.equal(one, other)


def test_what_the_kernels_cannot_do_is_refused_with_the_reason():
    inputs = draw(random_mask(3, 2, 0.5), 16, 8, torch.float32)
    with pytest.raises(ValueError, match=r"the Triton kernels need widths that are multiples of 16, got \(8, 16\)"):
        grouped_mlp(**inputs, backend="triton")
    with pytest.raises(ValueError, match=r"the Triton kernels do not take torch.float64"):
        grouped_mlp(**inputs | {"x_TD": inputs["x_TD"].double()}, backend="triton")
    with pytest.raises(ValueError, match="'cpu': legal are"):
        grouped_mlp(**inputs, backend="cpu")

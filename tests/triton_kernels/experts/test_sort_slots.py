"""sort_slots on Triton, in the interpreter: equal to the torch path to the last integer, for any slots."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_kernels.experts.expert_slots import sort_slots


def draw(T, E, K, kept, dtype=torch.float32, seed=0):
    """kept: share of the slots that are used, or None to pass no mask. A token's experts need not differ: only their
    order counts here."""
    generator = torch.Generator().manual_seed(seed)
    expert_TK = torch.randint(0, E, (T, K), generator=generator)
    weight_TK = (torch.rand(T, K, generator=generator) + 0.5).to(dtype).requires_grad_()
    return expert_TK, weight_TK, None if kept is None else torch.rand(T, K, generator=generator) < kept


def assert_equal(expert_TK, weight_TK, keep_TK, E):
    wanted, rows = (
        sort_slots(expert_TK, weight_TK, keep_TK, n_experts=E, padded=True, backend=backend)
        for backend in ("torch", "triton")
    )
    for name, x in rows._asdict().items():
        assert x.dtype == getattr(wanted, name).dtype, name
        assert torch.equal(x, getattr(wanted, name)), name
    dweight_N = torch.rand(rows.weight_N.shape, generator=torch.Generator().manual_seed(1)).to(weight_TK.dtype)
    gradients = [torch.autograd.grad(r.weight_N, weight_TK, dweight_N)[0] for r in (wanted, rows)]
    assert torch.equal(*gradients)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 60),
    st.integers(1, 9),
    st.integers(1, 8),
    st.sampled_from([None, 0.0, 0.3, 1.0]),
    st.integers(0, 10**6),
)
def test_equal_to_torch(T, E, K, kept, seed):
    assert_equal(*draw(T, E, K, kept, seed=seed), E)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("T", "E", "K", "kept"), [(257, 80, 3, 0.5), (100, 300, 5, None), (400, 1, 1, 0.7)])
def test_many_blocks_and_experts(T, E, K, kept, dtype):
    assert_equal(*draw(T, E, K, kept, dtype), E)


def test_one_expert_gets_all_and_a_prefix_sum_of_several_steps(monkeypatch):
    monkeypatch.setattr("triton_kernels.experts.expert_slots_launch.SCAN", 4)
    expert_TK, weight_TK, keep_TK = draw(500, 3, 2, 0.5)
    assert_equal(torch.full_like(expert_TK, 2), weight_TK, keep_TK, 3)
    assert_equal(expert_TK, weight_TK, keep_TK, 3)


def test_slots_that_are_views():
    expert_TK, weight_TK, keep_TK = draw(40, 6, 4, 0.5)
    assert keep_TK is not None
    assert_equal(expert_TK.t().contiguous().t(), weight_TK, keep_TK.t().contiguous().t(), 6)


def test_the_operator_is_registered_soundly():
    from triton_kernels.experts.expert_slots_launch import sort_backward_op, sort_op

    expert_TK, weight_TK, keep_TK = draw(10, 5, 3, 0.5)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(sort_op, (weight_TK, expert_TK, keep_TK, 5), test_utils=tests)
    weight_N, *_, row_TK = sort_op(weight_TK.detach(), expert_TK, keep_TK, 5)
    torch.library.opcheck(sort_backward_op, (weight_N, row_TK), test_utils=tests[:2])


def test_taking_slots_out_is_not_for_the_kernels():
    with pytest.raises(ValueError, match="padded = False"):
        sort_slots(*draw(2, 3, 2, 0.5), n_experts=3, padded=False, backend="triton")

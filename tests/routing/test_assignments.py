"""Assignments: nothing is lost or invented between slots and rows, in either direction."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.assignments import Assignments


@st.composite
def slots(draw):
    """Distinct experts per token, and which slots are kept: none, some or all, so that experts and tokens may be left
    empty."""
    n_experts = draw(st.integers(1, 12))
    n_tokens, n_slots = draw(st.integers(0, 20)), draw(st.integers(1, n_experts))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    expert_TK = torch.rand(n_tokens, n_experts, generator=generator).topk(n_slots, dim=-1)[1]
    weight_TK = torch.rand(n_tokens, n_slots, generator=generator) + 0.1
    share = draw(st.sampled_from([None, 0.0, 0.3, 0.9]))
    keep_TK = None if share is None else torch.rand(n_tokens, n_slots, generator=generator) < share
    return expert_TK, weight_TK, keep_TK, n_experts


def kept_triples(expert_TK, weight_TK, keep_TK):
    return {
        (t, int(expert_TK[t, k])): float(weight_TK[t, k])
        for t in range(expert_TK.shape[0])
        for k in range(expert_TK.shape[1])
        if keep_TK is None or keep_TK[t, k]
    }


@settings(deadline=None, max_examples=60)
@given(slots(), st.booleans())
def test_rows_are_the_kept_slots_sorted(drawn, padded):
    expert_TK, weight_TK, keep_TK, n_experts = drawn
    assignments = Assignments.from_slots(expert_TK, weight_TK, keep_TK, n_experts=n_experts, padded=padded)
    expected = kept_triples(expert_TK, weight_TK, keep_TK)
    n_rows = int(assignments.expert_offsets[-1])
    rows = [(int(e), int(t)) for e, t in zip(assignments.expert_N[:n_rows], assignments.token_N[:n_rows])]
    assert rows == sorted(rows)
    assert {(t, e): float(w) for (e, t), w in zip(rows, assignments.weight_N[:n_rows])} == expected
    assert len(rows) == len(expected)
    assert assignments.n_experts == n_experts
    assert assignments.n_tokens == expert_TK.shape[0]
    # Padding exists only where it was asked for, and weighs nothing.
    assert assignments.token_N.shape[0] == (expert_TK.numel() if padded else n_rows)
    assert not assignments.weight_N[n_rows:].any()


@settings(deadline=None, max_examples=60)
@given(slots(), st.booleans())
def test_offsets_lead_back_to_experts_and_tokens(drawn, padded):
    expert_TK, weight_TK, keep_TK, n_experts = drawn
    assignments = Assignments.from_slots(expert_TK, weight_TK, keep_TK, n_experts=n_experts, padded=padded)
    for e in range(n_experts):
        rows = slice(int(assignments.expert_offsets[e]), int(assignments.expert_offsets[e + 1]))
        assert (assignments.expert_N[rows] == e).all()
    for t in range(expert_TK.shape[0]):
        rows = assignments.row_of_slot_N[int(assignments.token_offsets[t]) : int(assignments.token_offsets[t + 1])]
        kept = expert_TK[t] if keep_TK is None else expert_TK[t][keep_TK[t]]
        # In slot order: the best expert first.
        assert assignments.expert_N[rows].tolist() == kept.tolist()
        assert (assignments.token_N[rows] == t).all()
    n_rows = int(assignments.expert_offsets[-1])
    assert sorted(assignments.row_of_slot_N[:n_rows].tolist()) == list(range(n_rows))
    assert int(assignments.experts_per_token_T().sum()) == int(assignments.rows_per_expert_E().sum()) == n_rows


@settings(deadline=None, max_examples=30)
@given(slots(), st.booleans())
def test_gradient_returns_to_the_kept_slots(drawn, padded):
    expert_TK, weight_TK, keep_TK, n_experts = drawn
    weight_TK.requires_grad_()
    weight_N = Assignments.from_slots(expert_TK, weight_TK, keep_TK, n_experts=n_experts, padded=padded).weight_N
    (gradient,) = torch.autograd.grad((weight_N * weight_N).sum() / 2, weight_TK)
    kept = torch.ones_like(weight_TK) if keep_TK is None else keep_TK
    torch.testing.assert_close(gradient, weight_TK.detach() * kept)


def test_more_than_int16_experts():
    expert_TK = torch.tensor([[40_000, 3], [5, 39_999]])
    assignments = Assignments.from_slots(expert_TK, torch.ones(2, 2), n_experts=50_000)
    assert assignments.expert_N.tolist() == [3, 5, 39_999, 40_000]
    assert assignments.token_N.tolist() == [0, 1, 1, 0]


def test_shapes_that_disagree_are_refused():
    with pytest.raises(ValueError, match=r"weight_TK has shape \[2, 2\], expected \[T=2, K=3\]"):
        Assignments.from_slots(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 2), n_experts=4)


@settings(deadline=None, max_examples=60)
@given(slots(), st.integers(0, 2**31))
def test_rows_in_any_order_make_the_same_assignments(drawn, seed):
    expert_TK, weight_TK, keep_TK, n_experts = drawn
    expected = Assignments.from_slots(expert_TK, weight_TK, keep_TK, n_experts=n_experts, padded=False)
    shuffled_N = torch.randperm(len(expected.token_N), generator=torch.Generator().manual_seed(seed))
    rows = (values[shuffled_N] for values in (expected.token_N, expected.expert_N, expected.weight_N))
    got = Assignments.from_rows(*rows, n_tokens=expected.n_tokens, n_experts=n_experts)
    for name in ("token_N", "expert_N", "weight_N", "expert_offsets", "token_offsets"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    # Slots hold their own token's rows; here in the order of the experts.
    assert torch.equal(
        got.token_N[got.row_of_slot_N], torch.repeat_interleave(torch.arange(got.n_tokens), got.experts_per_token_T())
    )
    assert sorted(got.row_of_slot_N.tolist()) == list(range(len(shuffled_N)))

"""router_scores: the torch path against the routing policies, the kernels (in the interpreter) against the torch
path."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.policies.threshold import ScoreThreshold
from routing.policies.top_k import TopK
from routing.policies.top_p import TopP
from routing.router import Router, RouterConfig
from triton_kernels.experts.expert_slots import router_scores, sort_slots
from triton_kernels.experts.grouped_mlp import grouped_mlp


def draw(T, E, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits_TE = (2 * torch.randn(T, E, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    return logits_TE, (torch.randn(E, generator=generator) * 1e-2).to(dtype)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(
    ("rule", "policy", "k", "floor"),
    [
        ("top_k", TopK(k=3), 3, 1),
        ("top_p", TopP(p=0.6, target_mean=None, cap=6), 6, 1),
        ("threshold", ScoreThreshold(cap=5, target_mean=2.0, floor=0), 5, 0),
    ],
)
def test_torch_path_is_what_the_policies_do(rule, policy, k, floor, score, renormalise):
    config = RouterConfig(policy=policy, score=score, renormalise=renormalise)
    router = Router(config, d_model=8, n_experts=10, layer_index=0).eval()
    router.init_weights(torch.Generator().manual_seed(0))
    x_TD = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    scores = router.scores(x_TD)
    slots = router.policy.select(scores)
    threshold = torch.tensor(0.0) if router.policy.budget is None else router.policy.budget.threshold
    options = {"k": k, "rule": rule, "score": score, "renormalise": renormalise, "floor": floor}
    ours = router_scores(scores.logits_TE, router.selection_bias_E, threshold, **options)
    assert torch.equal(ours.expert_TK, slots.expert_TK)
    assert torch.equal(ours.keep_TK, torch.ones_like(ours.keep_TK) if slots.keep_TK is None else slots.keep_TK)
    torch.testing.assert_close(ours.weight_TK, router.weights(slots))


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 20),
    st.integers(1, 20),
    st.sampled_from(["top_k", "top_p", "threshold"]),
    st.sampled_from(["softmax", "sigmoid"]),
    st.booleans(),
    st.floats(0, 1),
    st.integers(0, 2),
    st.integers(0, 10**6),
)
def test_kernels_agree_with_torch_in_fp64(T, E, rule, score, renormalise, share, floor, seed):
    logits, bias = draw(T, E, seed=seed)
    k = 1 + round(share * (E - 1))
    options = {"k": k, "rule": rule, "score": score, "renormalise": renormalise, "floor": min(floor, k)}
    threshold = torch.tensor(-0.2 if rule == "threshold" else 0.7)
    exact = router_scores(logits, bias, threshold, **options)
    logits32 = logits.detach().float().requires_grad_()
    ours = router_scores(logits32, bias.float(), threshold, **options, backend="triton")
    assert torch.equal(ours.expert_TK, exact.expert_TK)
    assert torch.equal(ours.keep_TK, exact.keep_TK)
    for found, wanted in ((ours.weight_TK, exact.weight_TK), (ours.level_TK, exact.level_TK)):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    dweight = torch.randn(exact.weight_TK.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (wanted,), (found,) = (
        torch.autograd.grad(exact.weight_TK, logits, dweight),
        torch.autograd.grad(ours.weight_TK, logits32, dweight.float()),
    )
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)


def test_equal_scores_go_to_the_lower_expert():
    slots = router_scores(torch.zeros(3, 9), torch.zeros(9), torch.tensor(0.0), k=4, backend="triton")
    assert slots.expert_TK.tolist() == [[0, 1, 2, 3]] * 3
    torch.testing.assert_close(slots.weight_TK, torch.full((3, 4), 0.25))


def test_the_operators_are_registered_soundly():
    from triton_kernels.experts.expert_slots_launch import scores_backward_op, scores_op

    logits, bias = draw(5, 7, torch.float32)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        scores_op,
        (logits, bias, torch.tensor(0.5), 3, "top_p", "softmax", True, 1),
        test_utils=(*tests, "test_autograd_registration"),
    )
    weight, expert, keep, _ = scores_op(logits.detach(), bias, torch.tensor(0.5), 3, "top_p", "softmax", True, 1)
    torch.library.opcheck(
        scores_backward_op, (weight, logits.detach(), expert, keep, "softmax", True), test_utils=tests
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 8}, "k=8, E=7"),
        ({"floor": 4}, "floor=4, k=3"),
        ({"rule": "top"}, "rule='top'"),
        ({"bias_E": torch.zeros(6)}, "bias_E has shape"),
    ],
)
def test_wrong_arguments_are_refused_by_name(change, message):
    arguments = {"logits_TE": torch.zeros(2, 7), "bias_E": torch.zeros(7), "threshold": torch.tensor(0.5), "k": 3}
    with pytest.raises(ValueError, match=message):
        router_scores(**arguments | change)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("rule", ["top_k", "top_p", "threshold"])
def test_a_nan_stays_nan_through_slots_rows_and_experts(rule: str, score: str, backend: str) -> None:
    """In one token's logits, one expert's bias, or the threshold: never a zero, and no other token sees it."""
    nan, zeros_E = torch.nan, torch.zeros(4)
    x_TD, w_gate_up, w_down = torch.randn(2, 16), torch.randn(4, 16, 32), torch.randn(4, 16, 16)
    for logits, bias, threshold, is_nan in (
        ([[nan, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0]], zeros_E, 0.5, [True, False]),
        ([[0.0, 1.0, 2.0, 3.0], [3.0, 1.0, 2.0, 0.0]], torch.tensor([0.0, nan, 0.0, 0.0]), 0.5, [True, True]),
        ([[0.0, 1.0, 2.0, 3.0], [3.0, 1.0, 2.0, 0.0]], zeros_E, nan, [True, True]),
    ):
        options = {"k": 2, "rule": rule, "score": score, "floor": 0, "backend": backend}
        logits_TE = torch.tensor(logits, requires_grad=True)
        slots = router_scores(logits_TE, bias, torch.tensor(threshold), **options)
        assert ((slots.expert_TK >= 0) & (slots.expert_TK < 4)).all()
        assert slots.weight_TK.isnan().any(1).tolist() == is_nan
        rows = sort_slots(slots.expert_TK, slots.weight_TK, slots.keep_TK, n_experts=4, backend=backend)._asdict()
        del rows["expert_N"]
        y_TD = grouped_mlp(x_TD, w_gate_up, w_down, **rows, backend=backend)
        assert y_TD.isnan().any(1).tolist() == is_nan
        if logits_TE.isnan().any():
            (dlogits_TE,) = torch.autograd.grad(y_TD.sum(), logits_TE)
            assert dlogits_TE.isnan().any(1).tolist() == is_nan


def test_experts_without_a_chance_are_taken_one_after_the_other() -> None:
    """More slots than experts above -inf: no expert twice, and none that does not exist."""
    bias = torch.tensor([0.0, -torch.inf, -torch.inf, -torch.inf, -torch.inf])
    slots = router_scores(torch.zeros(1, 5), bias, torch.tensor(0.0), k=5, backend="triton")
    assert sorted(slots.expert_TK[0].tolist()) == [0, 1, 2, 3, 4]

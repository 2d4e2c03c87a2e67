"""Policies whose rule the kernels know (in C, and in the interpreter): they decide as `Policy.select` does, over
training steps, calibration and evaluation."""

import dataclasses
from functools import partial

import pytest
import torch

from routing.policies.null_experts import NullExperts
from routing.policies.threshold import ScoreThreshold
from routing.policies.top_k import TopK
from routing.policies.top_p import TopP
from routing.router import Router, RouterConfig
from triton_kernels.experts.expert_slots import router_scores
from triton_kernels.native.library import native

T, D, E = 19, 8, 11
FUSED = [
    TopK(k=3),
    TopP(target_mean=3.0, cap=6, entropy_coefficient=0.1),
    TopP(target_mean=3.0, cap=6, floor=0),
    TopP(p=0.6, target_mean=None, cap=8, floor=2),
    ScoreThreshold(target_mean=3.0, cap=6),
    ScoreThreshold(target_mean=2.0, cap=5, floor=0),
]


def built(config: RouterConfig) -> Router:
    """The selection bias is large enough to decide."""
    router = Router(config, d_model=D, n_experts=E, layer_index=0)
    router.init_weights(torch.Generator().manual_seed(0))
    router.selection_bias_E.copy_(0.3 * torch.randn(E, generator=torch.Generator().manual_seed(1)))
    return router


def tokens(seed: int) -> torch.Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed))


def training_step(router: Router, step: int):
    """Dispatched rows, losses and the gradients of a training step of two forwards."""
    router.begin_step(step, seed=0)
    router.weight_ED.grad = None
    decided, computed = [], []
    for forward in range(2):
        x_TD = tokens(2 * step + forward).requires_grad_()
        routing = router(x_TD)
        rows = routing.assignments
        dweight_N = torch.randn(rows.weight_N.shape, generator=torch.Generator().manual_seed(3))
        ((rows.weight_N * dweight_N).sum() + sum(routing.losses.values())).backward()
        assert x_TD.grad is not None
        decided += [rows.token_N, rows.expert_N, rows.expert_offsets, rows.token_offsets, rows.row_of_slot_N]
        computed += [rows.weight_N.detach(), x_TD.grad, *(loss.detach() for loss in routing.losses.values())]
    decided.append(router.step_rows_E.clone())
    router.after_step()
    assert router.weight_ED.grad is not None
    computed.append(router.weight_ED.grad.clone())
    if router.policy.budget is not None:
        computed += [value.clone() for value in router.policy.budget.state_dict().values()]
    return decided, computed


def run(router: Router):
    """Three training steps, a forward in evaluation, a calibration, and one more forward with what it set."""
    decided, computed = [], []
    for step in range(3):
        step_decided, step_computed = training_step(router.train(), step)
        decided, computed = decided + step_decided, computed + step_computed
    router.eval()
    for seed, target in ((10, None), (11, 2.5), (12, None)):
        if target is not None and router.policy.budget is not None:
            router.calibrate(target)
        routing = router(tokens(seed))
        rows = routing.assignments
        if target is not None and router.policy.budget is not None:
            assert len(rows.token_N) == round(target * T)
            computed.append(router.policy.budget.threshold.clone())
        decided += [rows.token_N, rows.expert_N, rows.row_of_slot_N]
        computed.append(rows.weight_N.detach())
    return decided, computed


# In the interpreter half of them: with every policy either score, renormalised or not, from one to the next in turn.
CASES = [
    pytest.param(backend, policy, score, renormalise, id=f"{backend}-{policy}-{renormalise}-{score}")
    for backend in ("native", "triton")
    for index, policy in enumerate(FUSED)
    for score in ("softmax", "sigmoid")
    for renormalise in (True, False)
    if backend == "native" or (index + (score == "softmax") + renormalise) % 2 == 0
]


@pytest.mark.parametrize(("backend", "policy", "score", "renormalise"), CASES)
def test_the_kernel_decides_as_the_policy_does(backend, policy, score, renormalise, monkeypatch):
    if backend == "native" and native().library is None:
        pytest.skip(native().reason)
    config = RouterConfig(policy=policy, score=score, renormalise=renormalise, selection_bias_step=1e-3)
    with monkeypatch.context() as patch:
        patch.setattr(Router, "takes_the_kernel", lambda self, scores: False)
        decided, computed = run(built(config))
    monkeypatch.setattr(Router, "takes_the_kernel", lambda self, scores: True)
    monkeypatch.setattr("routing.router.router_scores", partial(router_scores, backend=backend))
    # What is compared is the kernel, not the policy once more.
    monkeypatch.setattr(f"{type(policy).__module__}.{type(policy).__name__}Policy.select", None)
    decided_by_kernel, computed_by_kernel = run(built(config))
    assert len(decided) == len(decided_by_kernel)
    assert all(torch.equal(mine, its) for mine, its in zip(decided, decided_by_kernel))
    assert len(computed) == len(computed_by_kernel)
    for mine, its in zip(computed, computed_by_kernel):
        torch.testing.assert_close(its, mine, rtol=1e-5, atol=1e-6)


def test_a_calibration_out_of_reach_is_refused_and_forgotten(monkeypatch):
    monkeypatch.setattr(Router, "takes_the_kernel", lambda self, scores: True)
    router = built(RouterConfig(policy=TopP(target_mean=3.0, cap=6))).eval()
    router.calibrate(7.0)
    with pytest.raises(ValueError, match="at most 6 slots"):
        router(tokens(0))
    router(tokens(0))


@pytest.mark.parametrize("policy", FUSED, ids=repr)
@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, True), (torch.bfloat16, True), (torch.float64, False)])
def test_the_kernel_is_for_single_precision_on_cuda(policy, dtype, expected, monkeypatch, without_native):
    router = built(RouterConfig(policy=policy))
    scores = router.scores(torch.zeros(2, D, dtype=dtype))
    assert not router.takes_the_kernel(scores)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert router.takes_the_kernel(scores) == expected
    # Numbers of experts from outside are none of the kernel's rules.
    router.policy.counts_T = torch.tensor([1, 0])
    assert not router.takes_the_kernel(scores)


def test_which_policies_have_a_rule():
    assert all(policy.fused_rule is not None for policy in FUSED)
    assert TopK(k=2, n_groups=4, top_groups=4).fused_rule is not None
    assert TopK(k=2, n_groups=4, top_groups=2).fused_rule is None
    assert NullExperts().fused_rule is None
    for policy in FUSED[1:]:
        rule = policy.fused_rule
        assert rule is not None
        assert (rule.k, rule.floor) == (policy.cap, policy.floor)
    assert dataclasses.replace(FUSED[0], k=5).fused_rule.k == 5

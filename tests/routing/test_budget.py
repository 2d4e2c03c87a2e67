"""Budgets: exact calibration, and controllers that hold the mean number of experts while the scores drift."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.budget import BudgetController, exact_threshold
from routing.policies.null_experts import NullExperts
from routing.policies.top_k import TopK
from routing.policies.top_p import TopP
from routing.router import Router, RouterConfig

D, E, T = 16, 40, 1024
BUDGETED = [TopP(p=0.4, target_mean=8.0, floor=1, cap=16), NullExperts(k=14, n_null=20, target_mean=8.0, floor=1)]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 50), st.integers(1, 9), st.integers(0, 3), st.floats(0, 1))
def test_exact_threshold_meets_the_target(seed, n_tokens, n_slots, floor, share):
    # Distinct, which random floats are not quite.
    level_TK = (
        torch.randperm(n_tokens * n_slots, generator=torch.Generator().manual_seed(seed))
        .float()
        .view(n_tokens, n_slots)
    )
    floor = min(floor, n_slots)
    level_TK[:, :floor] = -torch.inf
    target = floor + share * (n_slots - floor)
    kept = int((level_TK <= exact_threshold(level_TK, target)).sum())
    # Levels are distinct, so the count is exact unless the target lies among the forced slots.
    assert kept == max(round(target * n_tokens), floor * n_tokens)


def test_exact_threshold_is_exact_within_a_tie():
    level_TK = torch.tensor([[0.1, 0.5], [0.1, 0.5], [0.2, 0.9]])
    for target, kept in [(1 / 3, 2), (2 / 3, 2), (1.0, 3), (4 / 3, 5), (5 / 3, 5), (2.0, 6)]:
        assert int((level_TK <= exact_threshold(level_TK, target)).sum()) == kept


def test_targets_out_of_reach_are_refused():
    with pytest.raises(ValueError, match=r"target_mean = 3.5 .* fills at most 3 slots"):
        exact_threshold(torch.rand(4, 3), 3.5)
    with pytest.raises(ValueError, match="0 tokens"):
        exact_threshold(torch.rand(0, 3), 1.0)


def drifting_router(policy) -> Router:
    router = Router(RouterConfig(policy=policy), d_model=D, n_experts=E, layer_index=0).train()
    router.init_weights(torch.Generator().manual_seed(1))
    return router


@pytest.mark.parametrize("policy", BUDGETED, ids=repr)
def test_controllers_hold_the_target_while_scores_sharpen(policy):
    router = drifting_router(policy)
    generator = torch.Generator().manual_seed(0)
    means = []
    for step in range(120):
        router.begin_step(step, seed=0)
        # Logits grow from standard deviation 0.3 to 3, which at a fixed threshold would change the mean severalfold.
        x_TD = torch.randn(T, D, generator=generator) * 0.3 * 10 ** (step / 119)
        means.append(float(router(x_TD).statistics.mean_experts))
        router.after_step()
    settled = torch.tensor(means[20:])
    assert abs(float(settled.mean()) / 8 - 1) < 0.01
    # Every window of ten steps, not only the long-run mean.
    assert (settled.unfold(0, 10, 10).mean(dim=1) / 8 - 1).abs().max() < 0.02


@pytest.mark.parametrize("policy", BUDGETED, ids=repr)
def test_controllers_are_within_one_percent_once_the_scores_settle(policy):
    router = drifting_router(policy)
    generator = torch.Generator().manual_seed(0)
    means = []
    for step in range(60):
        router.begin_step(step, seed=0)
        means.append(float(router(torch.randn(T, D, generator=generator)).statistics.mean_experts))
        router.after_step()
    assert abs(sum(means[-20:]) / 20 / 8 - 1) < 0.01


def test_the_mean_holds_where_batches_differ_and_numbers_are_not_linear_in_the_threshold():
    """Each batch multiplies all numbers by its own factor, as with text of several kinds: the average threshold is
    right for no average."""
    controller = BudgetController(target_mean=8.0, initial=2.0, lowest=-1e4, highest=1e4, rate=0.5).train()
    generator, means = torch.Generator().manual_seed(0), []
    for _ in range(600):
        shift = 0.3 * torch.randn(1, generator=generator)
        level_TK = torch.arange(1, 25).log() - (0.3 * torch.randn(256, 1, generator=generator) + shift)
        means.append(float(controller.keep(level_TK).sum() / 256))
        controller.after_step(torch.tensor(means[-1]))
    assert abs(sum(means[100:]) / 500 / 8 - 1) < 0.01
    # What the aim makes up for: at a fixed aim numbers are several percent too high.
    assert float(controller.aim) < 7.7


@pytest.mark.parametrize("policy", BUDGETED, ids=repr)
@pytest.mark.parametrize("target", [2.0, 5.25, 8.0, 11.0])
def test_calibration_is_exact_on_its_own_tokens(policy, target):
    router = drifting_router(policy).eval()
    x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(3))
    router.calibrate(target)
    assert float(router(x_TD).statistics.mean_experts) == pytest.approx(target, abs=1e-6)
    # It stays: the threshold is a buffer, and later forwards do not move it.
    assert float(router(x_TD).statistics.mean_experts) == pytest.approx(target, abs=1e-6)
    other = drifting_router(policy).eval()
    other.load_state_dict(router.state_dict())
    assert float(other(x_TD).statistics.mean_experts) == pytest.approx(target, abs=1e-6)


@pytest.mark.parametrize(
    ("policy", "target", "message"),
    [
        (BUDGETED[0], 0.5, "target_mean = 0.5 .* always uses 1"),
        (BUDGETED[0], 17.0, "at most 16 slots"),
        (NullExperts(k=14, n_null=8, target_mean=8.0, floor=1), 5.0, "always uses 6"),
        (TopP(target_mean=8.0, floor=0, cap=16), 0.5, "target_mean = 0.5 .* always uses 1"),
    ],
    ids=repr,
)
def test_calibration_out_of_reach_is_refused(policy, target, message):
    router = drifting_router(policy).eval()
    router.calibrate(target)
    with pytest.raises(ValueError, match=message):
        router(torch.randn(T, D))
    # The refused request is forgotten.
    router(torch.randn(T, D))


def test_a_budget_beyond_the_clamp_of_the_threshold_is_refused():
    """No threshold between the bounds gives it, so the nearest one would hold another mean without saying so."""
    router = drifting_router(NullExperts(k=14, n_null=20, target_mean=8.0, floor=1)).eval()
    router.selection_bias_E.fill_(-5)
    router.calibrate(8.0)
    with pytest.raises(ValueError, match=r"target_mean = 8.0 .* at 2, the highest threshold, the policy uses 1"):
        router(torch.randn(T, D))


def test_calibration_of_a_fixed_number_of_experts_is_refused():
    with pytest.raises(ValueError, match="fixed number of experts"):
        drifting_router(TopK(k=4)).calibrate(3.0)


@pytest.mark.parametrize("policy", BUDGETED, ids=repr)
def test_evaluation_leaves_the_controller_alone(policy):
    router = drifting_router(policy)
    before = {name: value.clone() for name, value in router.state_dict().items()}
    router.begin_step(0, seed=0)
    router.eval()(torch.randn(T, D))
    router.after_step()
    for name, value in router.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_target_at_the_floor_does_not_break_the_integral():
    controller = BudgetController(target_mean=1.0, initial=0.5, lowest=0.0, highest=1.0, rate=0.5).train()
    level_TK = torch.rand(8, 4)
    level_TK[:, 0] = -torch.inf
    for _ in range(20):
        kept = controller.keep(level_TK)
        controller.after_step(kept.sum() / 8)
    assert controller.threshold.isfinite()
    assert float(controller.threshold) < 1e-3

"""A decision taken again from its levels is the policy's own, whatever the policy and the budget."""

import dataclasses
import math

import pytest
import torch

from foundation.serialize import kinds
from routing.budget import exact_threshold
from routing.levels import levels_of, most_experts, thresholds_of
from routing.policies.random_k import RandomK
from routing.policies.top_k import TopK
from routing.policies.top_p import TopP
from routing.policy import PolicyConfig
from routing.router import Router, RouterConfig

T, D, E = 60, 16, 32
POLICIES = [kind() for name, kind in kinds(PolicyConfig).items() if not kind.needs_whole_batch]


def router_of(policy, **config):
    router = Router(RouterConfig(policy=policy, **config), d_model=D, n_experts=E, layer_index=0)
    router.init_weights(torch.Generator().manual_seed(0))
    # A null column of weight zero would tie with every other.
    if router.null_weight_ZD is not None:
        torch.nn.init.normal_(router.null_weight_ZD, std=D**-0.5, generator=torch.Generator().manual_seed(1))
    return router.eval()


def tokens():
    return 2 * torch.randn(T, D, generator=torch.Generator().manual_seed(2))


def decided(routing):
    """(token, expert) of every row, with its weight."""
    rows = routing.assignments
    pairs = zip(rows.token_N.tolist(), rows.expert_N.tolist())
    return dict(zip(pairs, rows.weight_N.tolist()))


def kept(levels, threshold=None):
    """The same, from the levels alone."""
    keep_TK = levels.keep_TK if threshold is None else ~(levels.level_TK > threshold)
    return {(t, int(levels.expert_TK[t, k])): float(levels.weight_TK[t, k]) for t, k in keep_TK.nonzero().tolist()}


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
@torch.no_grad()
def test_levels_say_what_was_dispatched(policy):
    router = router_of(policy, scaling=1.5)
    routing = router(tokens())
    levels = levels_of(router, routing.scores)
    assert kept(levels) == pytest.approx(decided(routing))
    assert levels.expert_TK.shape == (T, most_experts(router))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
@torch.no_grad()
def test_another_budget_decides_as_a_calibrated_router_does(policy):
    router = router_of(policy)
    x_TD = tokens()
    levels = levels_of(router, router(x_TD).scores)
    for mean in (3, 6.5, 11):
        (threshold,) = thresholds_of(router, levels.level_TK, [mean]).tolist()
        if router.policy.budget is not None:
            assert threshold == pytest.approx(float(exact_threshold(levels.level_TK, mean)))
            other = router_of(policy)
            other.calibrate(mean)
        elif math.isnan(threshold):
            assert mean != int(mean)
            continue
        else:
            other = router_of(TopK(k=mean))
        assert kept(levels, threshold).keys() == decided(other(x_TD)).keys()


@torch.no_grad()
def test_what_is_out_of_reach_has_no_threshold():
    router = router_of(TopP(floor=2, cap=8, target_mean=4.0))
    levels = levels_of(router, router(tokens()).scores)
    assert thresholds_of(router, levels.level_TK, [1, 2, 8, 8.5]).isnan().tolist() == [True, False, False, True]
    fixed = router_of(RandomK(k_min=2, k_max=8, k_eval=4))
    levels = levels_of(fixed, fixed(tokens()).scores)
    assert thresholds_of(fixed, levels.level_TK, [0, 1, 2.5, 24, 25]).isnan().tolist() == [
        True,
        False,
        True,
        False,
        True,
    ]


@torch.no_grad()
def test_asking_teaches_a_budget_nothing():
    router = router_of(TopP(cap=8, target_mean=4.0))
    router.train()
    router.begin_step(1, 0)
    routing = router(tokens())
    heard, threshold = len(router.policy.budget.step_levels), router.policy.budget.threshold.clone()
    levels_of(router, routing.scores)
    assert len(router.policy.budget.step_levels) == heard
    assert router.policy.budget.threshold == threshold


@torch.no_grad()
def test_groups_stay_what_they_are():
    router = router_of(TopK(k=4, n_groups=4, top_groups=2))
    routing = router(tokens())
    levels = levels_of(router, routing.scores)
    assert levels.expert_TK.shape[1] == 16
    other = router_of(dataclasses.replace(router.policy.config, k=7))
    assert kept(levels, 7.0).keys() == decided(other(tokens())).keys()

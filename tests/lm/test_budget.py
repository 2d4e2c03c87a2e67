"""Budgets at run time: met exactly on the calibration text, whatever the policy, and only above the boundary."""

import dataclasses

import pytest
import torch

from lm.budget import calibrate_to_targets, experts_per_token, set_budget, variable_layers
from lm.config import BlockOverride, ModelConfig
from lm.model import LanguageModel
from moe.config import MoEConfig
from routing.policies.null_experts import NullExperts
from routing.policies.random_k import RandomK
from routing.policies.skipping import Skipping
from routing.policies.top_k import TopK
from routing.policies.top_p import TopP
from routing.router import RouterConfig

TOKENS_BT = torch.randint(50, (4, 32), generator=torch.Generator().manual_seed(0))
POLICIES = {
    "top_k": TopK(k=3),
    "random_k": RandomK(k_min=2, k_max=4, k_eval=3),
    "top_p": TopP(target_mean=3.0, cap=8),
    "null_experts": NullExperts(k=6, n_null=8, target_mean=3.0),
    "skipping": Skipping(k=6),
}


def build(policy) -> LanguageModel:
    moe = MoEConfig(n_experts=16, d_expert=16, router=RouterConfig(policy=policy))
    return LanguageModel(ModelConfig(vocab_size=50, d_model=32, n_layers=3, moe=moe)).init_weights(0)


def with_lower(config: ModelConfig, moe: MoEConfig, n_lower: int) -> ModelConfig:
    """The first `n_lower` blocks have other experts and routers."""
    return dataclasses.replace(config, blocks=tuple(BlockOverride(moe=moe if i < n_lower else None) for i in range(3)))


def means(model: LanguageModel) -> list[float]:
    return [experts_per_token(model, TOKENS_BT, (layer,)).mean().item() for layer in range(3)]


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("boundary", [0, 2])
def test_every_budget_is_met_on_the_calibration_text(name, boundary):
    model = build(POLICIES[name])
    before = means(model)
    inputs = model.prefix(TOKENS_BT, boundary).detach() if boundary else TOKENS_BT
    for budget in (1, 2, 4):
        calibrated_on = set_budget(model, budget, inputs, boundary=boundary)
        assert calibrated_on == (TOKENS_BT.numel() if name in ("top_p", "null_experts", "skipping") else 0)
        # One part in 128 tokens, where levels tie.
        assert means(model) == pytest.approx(before[:boundary] + [budget] * (3 - boundary), abs=0.02)
    thresholds = [
        float(router.policy.budget.threshold) for router in model.routers(boundary) if router.policy.budget is not None
    ]
    assert len(set(thresholds)) == len(thresholds), "each layer has its own"


def test_a_fractional_budget_needs_a_threshold():
    model = build(TopP(target_mean=3.0, cap=8))
    set_budget(model, 2.5, TOKENS_BT)
    assert means(model) == pytest.approx([2.5] * 3, abs=0.02)
    with pytest.raises(ValueError, match=r"2\.5, must be a whole number"):
        set_budget(build(TopK(k=3)), 2.5, TOKENS_BT)


@pytest.mark.parametrize("budget", [0, -1, 17])
def test_budgets_out_of_reach(budget):
    with pytest.raises(ValueError, match=rf"mean_experts: {budget}, must lie in \(0, 16\]"):
        set_budget(build(TopK(k=3)), budget, TOKENS_BT)


def test_a_refused_budget_changes_no_threshold_now_or_later():
    """The third layer cannot: what the two below it were given is taken back, and nothing is left to happen at the next
    forward."""
    moe = MoEConfig(n_experts=16, d_expert=16, router=RouterConfig(policy=TopP(target_mean=3.0, cap=8)))
    model = LanguageModel(with_lower(build(TopP(target_mean=3.0, cap=4)).config, moe, 2)).init_weights(0)
    set_budget(model, 3, TOKENS_BT)
    before, states = means(model), {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        ValueError, match="target_mean = 5 experts per token is out of reach: the policy fills at most 4 slots"
    ):
        set_budget(model, 5, TOKENS_BT)
    assert means(model) == before
    assert all(torch.equal(value, states[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("boundary", [0, 2])
def test_every_policy_is_calibrated_to_its_own_target(boundary):
    lower, upper = (RouterConfig(policy=TopP(target_mean=mean, cap=8)) for mean in (2.0, 4.0))
    config = dataclasses.replace(build(TopK(k=3)).config, moe=MoEConfig(n_experts=16, d_expert=16, router=upper))
    model = LanguageModel(with_lower(config, dataclasses.replace(config.moe, router=lower), 1)).init_weights(0)
    before = means(model)
    inputs = model.prefix(TOKENS_BT, boundary).detach() if boundary else TOKENS_BT
    assert calibrate_to_targets(model, inputs, boundary=boundary) == TOKENS_BT.numel()
    assert means(model) == pytest.approx(before[:boundary] + [2.0, 4.0, 4.0][boundary:], abs=0.02)
    assert calibrate_to_targets(build(TopK(k=3)), TOKENS_BT) == 0


def test_variable_layers_are_those_whose_number_depends_on_the_token():
    assert variable_layers(build(TopK(k=3))) == ()
    config = build(TopP(target_mean=3.0, cap=8)).config
    lower = dataclasses.replace(config.moe, router=RouterConfig(policy=TopK(k=3)))
    assert variable_layers(LanguageModel(with_lower(config, lower, 2))) == (2,)

"""The MoE layer: equals its own definition, trains under every policy, and refuses configurations that make no
sense."""

import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F

from lm.config import BlockOverride, ModelConfig
from lm.model import LanguageModel
from moe.config import MoEConfig
from moe.layer import MoE
from routing.policies.null_experts import NullExperts
from routing.policies.random_k import RandomK
from routing.policies.top_k import TopK
from routing.policies.top_p import TopP
from routing.policies.zero_computation import ZeroComputationExperts
from routing.router import RouterConfig

D, E = 32, 10
POLICIES = [
    TopK(k=3),
    TopP(target_mean=3.0, cap=6),
    NullExperts(k=6, n_null=6, target_mean=3.0, floor=0),
    RandomK(k_min=1, k_max=6, k_eval=3),
]
POLICIES.append(ZeroComputationExperts(k=6, n_null=6, target_mean=3.0))


def layer(policy, **config) -> MoE:
    settings = {"n_experts": E, "d_expert": 12, "d_shared": 8, "router": RouterConfig(policy=policy)} | config
    moe = MoE(MoEConfig(**settings), d_model=D, layer_index=1)
    moe.init_weights(torch.Generator().manual_seed(1))
    return moe


def tokens(n=70, dtype=torch.float32):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_output_is_the_weighted_sum_over_the_dispatched_rows(policy):
    moe = layer(policy)
    x_TD = tokens()
    y_TD, routing = moe(x_TD)
    assert moe.shared_expert is not None
    expected_TD = moe.shared_expert(x_TD)
    rows = routing.assignments
    for t, e, weight in zip(rows.token_N.tolist(), rows.expert_N.tolist(), rows.weight_N):
        gate_F, up_F = (x_TD[t] @ moe.experts.w_gate_up_EDF2[e]).chunk(2)
        expected_TD[t] = expected_TD[t] + weight * ((F.silu(gate_F) * up_F) @ moe.experts.w_down_EFD[e])
    if isinstance(policy, ZeroComputationExperts):
        # What the real experts leave of the weight goes to the token itself.
        expected_TD = (
            expected_TD + (1 - torch.zeros(len(x_TD)).index_add(0, rows.token_N, rows.weight_N))[:, None] * x_TD
        )
    torch.testing.assert_close(y_TD, expected_TD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_few_steps_lower_the_loss_and_touch_every_parameter(policy, dtype):
    moe = layer(policy, d_shared=0 if getattr(policy, "floor", 1) else 8).train()
    x_TD, target_TD = tokens(256, dtype), torch.randn(256, D, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(moe.parameters(), lr=1e-2)
    before = {name: value.detach().clone() for name, value in moe.named_parameters()}
    losses = []
    for step in range(30):
        moe.router.begin_step(step, seed=0)
        y_TD, routing = moe(x_TD)
        assert y_TD.dtype == dtype
        loss = F.mse_loss(y_TD.float(), target_TD)
        (loss + sum(routing.losses.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
        moe.router.after_step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    for name, value in moe.named_parameters():
        assert not torch.equal(value, before[name]), name


def test_tokens_without_experts_need_a_shared_one():
    for policy in (NullExperts(k=6, n_null=6, target_mean=3.0, floor=0), TopP(target_mean=3.0, cap=6, floor=0)):
        layer(policy)
        with pytest.raises(ValueError, match=f"{type(policy).__name__}.floor = 0 needs a shared expert"):
            layer(policy, d_shared=0)
    layer(ZeroComputationExperts(k=6, n_null=6, target_mean=3.0), d_shared=0)


@pytest.mark.parametrize(
    "policy",
    [NullExperts(k=6, n_null=6, target_mean=3.0, floor=0), TopP(cap=6, target_mean=3.0, floor=0), TopK(k=11)],
    ids=repr,
)
def test_another_policy_is_held_to_what_the_first_one_is(policy):
    with pytest.raises(ValueError) as refused:
        layer(policy, d_shared=0)
    moe = layer(TopK(k=3), d_shared=0)
    model = LanguageModel(ModelConfig(n_layers=2, moe=moe.config))
    for swap in (moe.router.set_policy, model.set_policy):
        with pytest.raises(ValueError, match=re.escape(str(refused.value))):
            swap(policy)
    # What was refused has changed nothing.
    assert moe.router.policy.config == TopK(k=3)
    assert moe.router.null_weight_ZD is None


def test_a_policy_that_one_block_refuses_is_given_to_none():
    shared = MoEConfig(n_experts=E, d_expert=12, d_shared=8, router=RouterConfig(policy=TopK(k=3)))
    alone = dataclasses.replace(shared, d_shared=0)
    model = LanguageModel(
        ModelConfig(n_layers=2, moe=shared, blocks=(BlockOverride(), BlockOverride(moe=alone))),
    )
    with pytest.raises(ValueError, match="floor = 0 needs a shared expert"):
        model.set_policy(TopP(cap=6, target_mean=3.0, floor=0))
    assert [router.policy.config for router in model.routers()] == [TopK(k=3)] * 2
    model.set_policy(TopP(cap=6, target_mean=3.0))
    assert [router.policy.config for router in model.routers()] == [TopP(cap=6, target_mean=3.0)] * 2


def test_weights_are_drawn_once():
    state = torch.get_rng_state()
    config = MoEConfig(n_experts=E, d_expert=12, d_shared=8, router=RouterConfig(policy=TopK(k=3)))
    moe = MoE(config, d_model=D, layer_index=0)
    moe.init_weights(torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn from the global generator"
    assert moe.shared_expert is not None
    # One after another from the one generator: whatever construction had drawn would have been for nothing.
    generator = torch.Generator().manual_seed(0)
    router, experts, shared = moe.router, moe.experts, moe.shared_expert
    for weight, fan_in in (
        (router.weight_ED, D),
        (experts.w_gate_up_EDF2, D),
        (experts.w_down_EFD, 12),
        (shared.w_gate_up_DF2, D),
        (shared.w_down_FD, 8),
    ):
        assert torch.equal(weight, torch.randn(weight.shape, generator=generator) * fan_in**-0.5)


def test_same_generator_same_weights():
    first, second = layer(TopK(k=3)), layer(TopK(k=3))
    for moe in (first, second):
        moe.init_weights(torch.Generator().manual_seed(5))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    second.init_weights(torch.Generator().manual_seed(5), down_scale=0.5)
    torch.testing.assert_close(second.experts.w_down_EFD, 0.5 * first.experts.w_down_EFD)
    torch.testing.assert_close(second.experts.w_gate_up_EDF2, first.experts.w_gate_up_EDF2)


def test_checkpoint_holds_the_controllers():
    policy = TopP(target_mean=3.0, cap=6)
    moe = layer(policy, router=RouterConfig(policy=policy, selection_bias_step=0.01)).train()
    for step in range(5):
        moe.router.begin_step(step, seed=0)
        moe(tokens())
        moe.router.after_step()
    resumed = layer(policy, router=RouterConfig(policy=policy, selection_bias_step=0.01)).train()
    resumed.load_state_dict(moe.state_dict())
    for step in range(5, 8):
        outputs = []
        for each in (moe, resumed):
            each.router.begin_step(step, seed=0)
            y_TD, routing = each(tokens())
            outputs.append((y_TD, routing.losses["balance"]))
            each.router.after_step()
        assert all(torch.equal(a, b) for a, b in zip(*outputs))
    assert all(torch.equal(a, b) for a, b in zip(moe.state_dict().values(), resumed.state_dict().values()))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"n_experts": 0}, "n_experts: 0"),
        ({"d_expert": 0}, "d_expert: 0"),
        ({"d_shared": -1}, "d_shared: -1"),
        ({"n_experts": 2}, "TopK.k = 3"),
    ],
    ids=repr,
)
def test_configurations_that_make_no_sense_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        layer(TopK(k=3), **config)


def test_null_columns_do_not_change_what_the_experts_start_from():
    layers = []
    for policy in (TopK(k=2), NullExperts(k=4, n_null=4, target_mean=2.0)):
        config = MoEConfig(n_experts=8, d_expert=16, router=RouterConfig(policy=policy))
        layers.append(MoE(config, d_model=16, layer_index=0))
        layers[-1].init_weights(torch.Generator().manual_seed(3))
    assert torch.equal(layers[0].router.weight_ED, layers[1].router.weight_ED)
    assert torch.equal(layers[0].experts.w_down_EFD, layers[1].experts.w_down_EFD)

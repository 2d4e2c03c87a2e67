import dataclasses

import pytest
import torch

from lm.model import LanguageModel
from routing.policies.null_experts import NullExperts
from routing.policies.top_k import TopKPolicy
from routing.policies.top_p import TopP, TopPPolicy
from staged_training.checkpoint import CheckpointMismatchError
from staged_training.fork import fork, inherited_state


@pytest.fixture(scope="module")
def trunk(model_config):
    model = LanguageModel(model_config).init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # As if trained: no tensor is at its initial value.
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn(tensor.shape, generator=generator))
    return model


def branch_of(plan_of, branches, **changes):
    return plan_of(branches, **changes).branches[-1]


def test_a_routing_method_starts_from_the_trunks_weights(trunk, plan_of, with_policy):
    branch = branch_of(plan_of, [("null", with_policy(NullExperts(k=3, n_null=2, target_mean=2)), 7)])
    model, stored = fork(trunk, branch).state_dict(), trunk.state_dict()
    fresh = LanguageModel(branch.model).init_weights(7).state_dict()
    for name, tensor in model.items():
        own = "null_weight" in name or ".policy." in name
        assert torch.equal(tensor, fresh[name] if own else stored[name]), name
    assert sum("null_weight" in name for name in model) == 2


def test_the_frozen_blocks_keep_the_trunks_policy(trunk, plan_of, with_policy):
    branch = branch_of(plan_of, [("top_p", with_policy(TopP(target_mean=2, cap=4)), 0)])
    assert branch.boundary == 2
    policies = [type(block.moe.router.policy) for block in fork(trunk, branch).blocks]
    assert policies == [TopKPolicy] * 2 + [TopPPolicy] * 2


def test_the_prefix_computes_what_the_trunk_computes(trunk, plan_of, with_policy):
    branch = branch_of(plan_of, [("top_p", with_policy(TopP(target_mean=2, cap=4)), 0)])
    tokens_BT = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(fork(trunk, branch).eval().prefix(tokens_BT, 2), trunk.eval().prefix(tokens_BT, 2))


def test_fresh_blocks_are_fresh_in_the_baseline_too_and_paired_by_seed(trunk, plan_of, model_config):
    hybrid = dataclasses.replace(model_config, layer_plan="S")
    plan = plan_of(
        [(name, model, seed) for seed in (0, 1) for name, model in (("baseline", model_config), ("hybrid", hybrid))],
        freeze=0.7,
    )
    models = {branch.name: fork(trunk, branch).state_dict() for branch in plan.branches}
    stored = trunk.state_dict()
    for name in stored:
        above = name.startswith("blocks.3.")
        first = models["baseline-seed0"][name]
        assert torch.equal(first, stored[name]) != above, name
        # Same seed, same fresh weights, whatever the method; the buffers start at zero for every seed.
        assert torch.equal(first, models["hybrid-seed0"][name]), name
        assert torch.equal(first, models["baseline-seed1"][name]) != (above and first.dim() >= 2), name


def test_freeze_zero_forks_the_whole_network(trunk, plan_of, model_config):
    branch = branch_of(plan_of, [("baseline", model_config, 0)], freeze=0.0)
    model = fork(trunk, branch)
    assert branch.boundary == 0
    assert all(torch.equal(tensor, trunk.state_dict()[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        model.head_VD.zero_()
    assert trunk.head_VD.abs().sum() > 0


@pytest.mark.parametrize("freeze", [0.0, 0.5])
def test_a_twin_differs_by_rounding_in_what_it_trains_and_in_nothing_else(trunk, plan_of, model_config, freeze):
    branches = [("baseline", model_config, 3), ("twin", model_config, 3), ("twin", model_config, 4)]
    baseline, twin, other = plan_of(branches, freeze=freeze, rounding=("twin",)).branches
    plain, changed = fork(trunk, baseline), fork(trunk, twin).state_dict()
    trained = {name for name, _ in plain.named_parameters()} - plain.frozen_names(baseline.boundary)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(changed[name], tensor) == (name not in trained), name
        # Five standard deviations, and the rounding of the result.
        torch.testing.assert_close(changed[name], tensor, rtol=6e-7, atol=0)
    assert all(torch.equal(changed[name], again) for name, again in fork(trunk, twin).state_dict().items())
    assert not torch.equal(changed["head_VD"], fork(trunk, other).state_dict()["head_VD"])


def test_a_trunk_of_another_shape_is_refused_by_name(plan_of, model_config):
    wide = LanguageModel(dataclasses.replace(model_config, moe=dataclasses.replace(model_config.moe, d_expert=16)))
    with pytest.raises(
        CheckpointMismatchError,
        match=(
            r"baseline-seed0 cannot take.*blocks\.0\.moe\.experts\.w_gate_up_EDF2 \[4, 16, 16\] \(the trunk has \[4,"
            r" 16, 32\]\)"
        ),
    ):
        fork(wide, branch_of(plan_of, [("baseline", model_config, 0)]))


def state_of(trunk):
    """As a trunk's checkpoint has it, with weights that are averaged beside it."""
    kinds = ("step", "exp_avg", "momentum_buffer", "merged")
    return {f"{kind}:{name}": torch.ones(()) for name, _ in trunk.named_parameters() for kind in kinds}


@pytest.mark.parametrize(("freeze", "boundary"), [(0.0, 0), (0.5, 2)])
def test_the_optimizers_state_goes_with_the_weights_that_are_taken_and_trained(
    trunk, plan_of, with_policy, freeze, boundary
):
    null = with_policy(NullExperts(k=3, n_null=2, target_mean=2))
    branch = branch_of(plan_of, [("null", null, 7)], freeze=freeze)
    assert branch.boundary == boundary
    model = fork(trunk, branch)
    inherited = inherited_state(model, trunk, branch, state_of(trunk))
    taken = {name for name, _ in trunk.named_parameters()} - trunk.frozen_names(boundary)
    assert inherited.keys() == {f"{kind}:{name}" for name in taken for kind in ("step", "exp_avg", "momentum_buffer")}
    assert "step:head_VD" in inherited
    assert ("step:embedding_VD" in inherited) == (boundary == 0)
    assert any("null_weight" in name for name, _ in model.named_parameters())


def test_fresh_blocks_inherit_nothing(trunk, plan_of, model_config):
    hybrid = dataclasses.replace(model_config, layer_plan="S")
    branch = branch_of(plan_of, [("baseline", model_config, 0), ("hybrid", hybrid, 0)], freeze=0.7)
    assert branch.fresh
    inherited = inherited_state(fork(trunk, branch), trunk, branch, state_of(trunk))
    assert {name.partition(":")[2] for name in inherited} == {"norm.weight", "head_VD"}

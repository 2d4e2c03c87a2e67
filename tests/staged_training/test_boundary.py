import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.accounting import meta_model
from lm.config import ModelConfig
from moe.config import MoEConfig
from routing.policies.null_experts import NullExperts
from routing.policies.top_p import TopP
from staged_training.boundary import added_weights, choose_cut, compose, different_blocks, frozen_share


def with_plan(config, letters):
    return dataclasses.replace(config, layer_plan=letters)


def test_share_is_that_of_the_real_parameters(model_config):
    model = meta_model(model_config)
    total = sum(parameter.numel() for parameter in model.parameters())
    for boundary in range(1, 4):
        below = model.embedding_VD.numel() + sum(
            p.numel() for block in model.blocks[:boundary] for p in block.parameters()
        )
        assert frozen_share(model_config, boundary) == pytest.approx(below / total)
    assert frozen_share(model_config, 0) == 0.0


@settings(max_examples=30, deadline=None)
@given(freeze=st.floats(0, 0.99), n_layers=st.integers(1, 12))
def test_the_nearest_boundary_is_taken(freeze, n_layers):
    config = ModelConfig(vocab_size=300, d_model=16, n_layers=n_layers, moe=MoEConfig(n_experts=16, d_expert=8))
    cut = choose_cut(config, {"baseline": config}, freeze)
    distances = [abs(frozen_share(config, boundary) - freeze) for boundary in range(n_layers)]
    assert distances[cut.boundary] == min(distances)
    assert not cut.fresh
    assert cut.share == frozen_share(config, cut.boundary)
    if freeze == 0:
        assert cut.boundary == 0


def test_routing_methods_keep_the_trunks_weights(model_config, with_policy):
    methods = {
        "baseline": model_config,
        "top_p": with_policy(TopP(target_mean=2, cap=4)),
        "null": with_policy(NullExperts(k=3, n_null=2, target_mean=2)),
    }
    assert not choose_cut(model_config, methods, 0.5).fresh
    assert added_weights(model_config, methods["top_p"]) == []
    assert added_weights(model_config, methods["null"]) == [
        f"blocks.{block}.moe.router.null_weight_ZD" for block in range(4)
    ]


def test_sinks_of_attention_heads_join_a_trunk(model_config):
    sinks = dataclasses.replace(model_config.attention, sink_logits=True)
    method = dataclasses.replace(model_config, attention=sinks)
    assert not choose_cut(model_config, {"baseline": model_config, "sinks": method}, 0.5).fresh
    assert added_weights(model_config, method) == [f"blocks.{block}.attention.sink_H" for block in range(4)]


def test_one_architectural_method_makes_every_branch_fresh(model_config):
    cut = choose_cut(model_config, {"baseline": model_config, "window": with_plan(model_config, "S")}, 0.8)
    assert (cut.boundary, cut.fresh) == (3, True)
    assert "fresh in every branch, because these methods change the architecture: window" in " ".join(cut.reasons)


def test_another_expert_width_is_architectural(model_config):
    wide = dataclasses.replace(model_config, moe=dataclasses.replace(model_config.moe, d_expert=16))
    assert different_blocks(model_config, wide) == [0, 1, 2, 3]
    assert choose_cut(model_config, {"wide": wide}, 0.8).fresh


def test_lowered_until_the_blocks_above_differ(model_config):
    # SSSF ends in F like the trunk: cutting below block 3 would compare the trunk with itself.
    cut = choose_cut(model_config, {"baseline": model_config, "hybrid": with_plan(model_config, "SSSF")}, 0.8)
    assert cut.boundary == 2
    assert "lowered to 2: the blocks of hybrid above it are the trunk's own" in cut.reasons


def test_lowered_until_shared_keys_lie_above():
    config = ModelConfig(
        vocab_size=300, d_model=16, n_layers=8, layer_plan="F", moe=MoEConfig(n_experts=12, d_expert=8)
    )
    cut = choose_cut(config, {"baseline": config, "shared": with_plan(config, "SSSFSSSR")}, 0.8)
    # R in layer 7 finds the F of layer 6, a trunk's layer, as long as that lies below the boundary.
    composed = compose(config, with_plan(config, "SSSFSSSR"), cut.boundary)
    assert all(composed.plan.source[layer] >= cut.boundary for layer in range(cut.boundary, 8))
    assert "R" in composed.plan.letters[cut.boundary :]
    assert any("reads keys and values of layer" in reason for reason in cut.reasons)


def test_a_trunk_that_shares_keys_is_not_cut_between_them():
    config = ModelConfig(
        vocab_size=300, d_model=16, n_layers=8, layer_plan="SSSFSSSR", moe=MoEConfig(n_experts=12, d_expert=8)
    )
    assert choose_cut(config, {"baseline": config}, 0.8).boundary == 3


def test_freeze_zero_with_another_architecture_says_that_no_block_is_reused(model_config):
    cut = choose_cut(model_config, {"window": with_plan(model_config, "S")}, 0.0)
    assert (cut.boundary, cut.fresh, cut.share) == (0, True, 0.0)
    assert "no block is re-used" in " ".join(cut.reasons)


def test_composed_models_keep_the_trunk_below(model_config, with_policy):
    method = with_policy(TopP(target_mean=2, cap=4), layer_plan="SSSS")
    composed = compose(model_config, method, 2)
    assert "".join(composed.plan.letters) == "FFSS"
    assert [composed.block(layer).moe for layer in range(4)] == [model_config.moe] * 2 + [method.moe] * 2
    assert compose(model_config, composed, 2) == composed
    assert compose(model_config, model_config, 2) == dataclasses.replace(model_config, layer_plan="FFFF")


@pytest.mark.parametrize("freeze", [-0.1, 1.0, 2.0])
def test_refuses_a_share_outside_its_range(model_config, freeze):
    with pytest.raises(ValueError, match=rf"freeze: {freeze}"):
        choose_cut(model_config, {}, freeze)


def test_refuses_what_a_branch_cannot_change(model_config):
    other = dataclasses.replace(model_config, d_model=32, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"'wide' cannot branch.*d_model is 32 instead of 16; dtype is 'bfloat16'"):
        choose_cut(model_config, {"wide": other}, 0.5)

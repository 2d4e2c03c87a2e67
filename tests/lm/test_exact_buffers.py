"""Rounding a model's weights leaves its counts, thresholds, biases and decays alone; autocast leaves routing alone."""

import dataclasses

import pytest
import torch
from torch import nn

from attention.config import AttentionConfig
from attention.kinds import KINDS
from foundation.exact_buffers import ExactBuffers
from lm.config import ModelConfig
from lm.model import LanguageModel
from moe.config import MoEConfig
from routing.policies.relu import ReLU
from routing.policies.top_p import TopP
from routing.router import Router, RouterConfig

CONFIG = ModelConfig(
    vocab_size=61,
    d_model=32,
    n_layers=4,
    attention=AttentionConfig(n_heads=2, n_kv_heads=1, head_dim=16, window=5),
    moe=MoEConfig(n_experts=16, d_expert=16),
)


def model_of(plan="F", policy=None):
    router = RouterConfig() if policy is None else RouterConfig(policy=policy)
    moe = dataclasses.replace(CONFIG.moe, router=router)
    config = dataclasses.replace(CONFIG, layer_plan=plan, n_layers=max(4, len(plan)), moe=moe)
    return LanguageModel(config).init_weights(0)


def spread(model):
    """Buffers with digits that bfloat16 does not have."""
    with torch.no_grad():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(1001.0 + 1e-3)
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("change", [nn.Module.bfloat16, nn.Module.half, lambda model: model.to(torch.bfloat16)])
def test_rounding_weights_leaves_buffers_as_they_are(change):
    plan = "".join((kind.reads or "") + letter for letter, kind in KINDS.items())
    for model in (
        model_of(plan),
        model_of(policy=TopP(target_mean=4, cap=8)),
        model_of(policy=ReLU(target_mean=4, cap=8)),
    ):
        before = spread(model)
        change(model)
        assert {parameter.dtype.itemsize for parameter in model.parameters()} == {2}
        after = dict(model.named_buffers())
        assert len(before) == len(after) > 0
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert all(before[name].dtype == after[name].dtype for name in before)


def test_parts_keep_theirs_alone_and_wider_dtypes_reach_them():
    block = model_of("L").blocks[0]
    for part in (block.attention, block.moe, block.moe.router):
        assert isinstance(part, ExactBuffers)
        part.bfloat16()
        assert all(buffer.dtype != torch.bfloat16 for buffer in part.buffers())
    wide = [buffer.dtype for buffer in model_of("L").double().buffers() if buffer.is_floating_point()]
    assert set(wide) == {torch.float64}


@pytest.mark.parametrize("policy", [None, TopP(target_mean=4, cap=8)])
def test_autocast_changes_no_bit_of_the_routing(policy):
    config = RouterConfig() if policy is None else RouterConfig(policy=policy)
    router = Router(config, d_model=32, n_experts=16, layer_index=0)
    router.init_weights(torch.Generator().manual_seed(0))
    x_TD = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    plain = router(x_TD)
    with torch.autocast("cpu", torch.bfloat16):
        cast = router(x_TD)
    assert cast.probs_TE.dtype == torch.float32
    assert torch.equal(cast.probs_TE, plain.probs_TE)
    assert torch.equal(cast.assignments.rows_per_expert_E(), plain.assignments.rows_per_expert_E())
    assert all(torch.equal(cast.losses[name], plain.losses[name]) for name in plain.losses)

"""Models whose layers differ: some choose the number of experts, some have a fixed one, some have a single expert."""

from pathlib import Path

import numpy as np
import pytest

from ablations.counterfactual.gains import routed_layers, slots_of
from ablations.counterfactual.measure import Bench, forced_numbers, widen
from ablations.counterfactual.options import CounterfactualOptions
from attention.config import AttentionConfig
from lm.config import ModelConfig
from lm.model import LanguageModel
from moe.config import MoEConfig
from routing.policies.top_k import TopK
from routing.policies.top_p import TopP
from routing.router import RouterConfig

OPTIONS = CounterfactualOptions(run=(Path("run"),))


@pytest.fixture
def bench():
    moe = MoEConfig(n_experts=8, d_expert=8, router=RouterConfig(policy=TopK(k=3)))
    config = ModelConfig(
        vocab_size=300,
        d_model=16,
        n_layers=3,
        attention=AttentionConfig(n_heads=2, n_kv_heads=1, head_dim=8),
        moe=moe,
    )
    model = LanguageModel(config).init_weights(0).eval()
    return Bench(model=model, text=None, layers=list(routed_layers(model)))


def test_fixed_layers_get_the_slots_that_choosing_ones_have(bench):
    bench.model.routers()[1].set_policy(TopP(target_mean=3, cap=5))
    bench.model.routers()[2].set_policy(TopK(k=2, n_groups=4, top_groups=2))
    assert slots_of(bench.model) == {0: 3, 1: 5, 2: 2}
    widen(bench, OPTIONS, 3.0)
    # Of four groups of two the best two have four.
    assert slots_of(bench.model) == {0: 5, 1: 5, 2: 4}
    assert forced_numbers(bench.model, OPTIONS, np.array([3.0])).tolist() == [1, 2, 3, 4]


def test_static_models_get_twice_their_mean(bench):
    widen(bench, OPTIONS, 2.5)
    assert slots_of(bench.model) == {0: 6, 1: 6, 2: 6}
    assert forced_numbers(bench.model, OPTIONS, np.array([2.5])).tolist() == [1, 2, 3, 4, 6]
    widen(bench, CounterfactualOptions(run=(Path("run"),), forced=(1, 12)), 2.5)
    assert slots_of(bench.model) == {0: 8, 1: 8, 2: 8}

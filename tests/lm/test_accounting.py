"""The accounting formulas against the objects they describe."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from attention.config import AttentionConfig
from lm.accounting import decode_bytes, kv_bytes, mixing_flops, model_cost
from lm.config import ModelConfig
from lm.model import LanguageModel, token_losses
from moe.config import MoEConfig

CONFIG = ModelConfig(
    vocab_size=64,
    d_model=32,
    n_layers=2,
    attention=AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=16),
    # The other CPU path pads rows, and torch would count the padding.
    moe=MoEConfig(n_experts=16, d_expert=16, backend="reference"),
)


@pytest.mark.parametrize("plan", ["F", "SSSF", "FR", "LG"])
def test_total_parameters_are_those_of_the_model(plan):
    config = dataclasses.replace(CONFIG, layer_plan=plan, n_layers=4)
    cost = model_cost(config, length=16, mean_experts=4)
    assert cost.total_parameters == sum(parameter.numel() for parameter in LanguageModel(config).parameters())
    assert cost.prefix_share(4) == pytest.approx(1 - cost.head_parameters / cost.total_parameters)


def test_active_parameters_count_the_experts_used():
    few, many = (model_cost(CONFIG, length=16, mean_experts=mean) for mean in (2, 5))
    # One expert has three matrices of d_model x d_expert; there are two layers.
    assert many.active_parameters - few.active_parameters == 2 * 3 * (3 * 32 * 16)
    everything = model_cost(CONFIG, length=16, mean_experts=16)
    assert everything.active_parameters == everything.total_parameters - everything.embedding_parameters


@pytest.mark.parametrize("backward", [False, True])
def test_flops_are_those_that_torch_counts(backward, without_native):
    batch, length = 2, 24
    model = LanguageModel(CONFIG).init_weights(0)
    tokens_BT = torch.randint(64, (batch, length + 1), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        output = model(tokens_BT[:, :-1])
        if backward:
            token_losses(output.logits_BTV, tokens_BT[:, 1:]).mean().backward()
    cost = model_cost(
        CONFIG, length=length, mean_experts=tuple(float(routing.statistics.mean_experts) for routing in output.routings)
    )
    products = cost.forward_flops - sum(mixing_flops(CONFIG, layer, length) for layer in range(2))
    counted = counter.get_total_flops() / (batch * length)
    # torch counts softmax attention separately and without the causal half: take its own numbers out.
    attention = sum(count for op, count in counter.get_flop_counts()["Global"].items() if "attention" in str(op)) / (
        batch * length
    )
    assert counted - attention == pytest.approx((3 if backward else 1) * products)


def test_mixing_flops_of_linear_layers_match_the_published_per_token_figures():
    attention = AttentionConfig(n_heads=1, n_kv_heads=1, head_dim=128, chunk_size=64)
    config = ModelConfig(layer_plan="LGK", n_layers=3, attention=attention)
    assert mixing_flops(config, 0, 4096) == pytest.approx(98e3, rel=0.01)
    assert mixing_flops(config, 1, 4096) == mixing_flops(config, 2, 4096) == pytest.approx(183e3, rel=0.01)


def test_sliding_windows_cost_less_and_tiny_windows_are_exact():
    config = dataclasses.replace(CONFIG, layer_plan="FS", attention=dataclasses.replace(CONFIG.attention, window=1))
    assert mixing_flops(config, 1, 100) == 4 * 4 * 16
    assert mixing_flops(config, 0, 100) == 4 * 4 * 16 * 50.5


def test_a_decode_step_reads_the_active_weights_and_the_cache():
    short, long = (decode_bytes(CONFIG, length, mean_experts=3) for length in (10, 110))
    assert long - short == kv_bytes(CONFIG, 110) - kv_bytes(CONFIG, 10) == 2 * 100 * (2 * 2 * 16) * 4
    shared = dataclasses.replace(CONFIG, layer_plan="FR")
    assert kv_bytes(shared, 100) == kv_bytes(CONFIG, 100) / 2
    reads = [decode_bytes(shared, length, mean_experts=3) for length in (10, 110)]
    assert reads[1] - reads[0] == long - short, "a layer that shares keys and values saves memory, not reads"

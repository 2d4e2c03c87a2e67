"""Bits per byte, and that padding counts for nothing."""

import math

import numpy as np
import pytest
import torch

from lm.config import ModelConfig
from lm.evaluate import evaluate
from lm.model import IGNORED_TARGET, LanguageModel, token_losses
from moe.config import MoEConfig

CONFIG = ModelConfig(vocab_size=64, d_model=32, n_layers=2, moe=MoEConfig(n_experts=16, d_expert=16))


@pytest.fixture(scope="module")
def model():
    model = LanguageModel(CONFIG).init_weights(0)
    torch.nn.init.normal_(model.head_VD, std=0.3, generator=torch.Generator().manual_seed(1))
    return model


def batch(seed: int, batch_size: int = 2, length: int = 12):
    tokens_BT = torch.randint(64, (batch_size, length + 1), generator=torch.Generator().manual_seed(seed))
    return tokens_BT[:, :-1], tokens_BT[:, 1:].clone()


def test_bits_per_byte_of_a_uniform_model():
    fresh = LanguageModel(CONFIG).init_weights(0)
    result = evaluate(fresh, [batch(0)], n_bytes=48)
    assert result.tokens == 24
    assert result.bits_per_byte == pytest.approx(24 * math.log2(64) / 48)


def test_padding_counts_for_nothing(model):
    inputs_BT, targets_BT = batch(1)
    targets_BT[1, 5:] = IGNORED_TARGET
    result = evaluate(model, [(inputs_BT, targets_BT)], n_bytes=10)
    assert result.tokens == 17
    with torch.no_grad():
        assert result.nats == pytest.approx(
            token_losses(model(inputs_BT).logits_BTV, targets_BT).sum().item(), rel=1e-6
        )
    assert all(sum(histogram) == 17 for histogram in result.experts_histogram)


def test_boundary_activations_give_the_same_result(model):
    inputs_BT, targets_BT = batch(2)
    whole = evaluate(model, [(inputs_BT, targets_BT)], n_bytes=10)
    with torch.no_grad():
        x_BTD = model.eval().prefix(inputs_BT, 1)
    upper = evaluate(model, [(x_BTD, targets_BT)], n_bytes=10, boundary=1)
    assert upper.nats == whole.nats
    assert upper.mean_experts == whole.mean_experts[1:]


def test_the_mode_of_the_model_is_restored(model):
    model.train()
    evaluate(model, [batch(3)], n_bytes=10)
    assert model.training


def test_nothing_to_evaluate_is_an_error(model):
    with pytest.raises(ValueError, match="nothing to evaluate: 0 tokens"):
        evaluate(model, [], n_bytes=10)


def test_section_losses_are_those_of_their_tokens(model):
    batches = [batch(4), batch(5)]
    batches[1][1][1, 5:] = IGNORED_TARGET
    # 41 tokens count: 24, and 17 ahead of the padding; sections run across rows and batches.
    section_N = np.repeat([0, 1, 2], [10, 25, 6])
    result = evaluate(model, batches, n_bytes=10, section_N=section_N)
    with torch.no_grad():
        losses = [token_losses(model.eval()(inputs).logits_BTV, targets).flatten() for inputs, targets in batches]
    nats_N = torch.cat([losses[0], losses[1][:17]]).double().numpy()
    for section, nats in enumerate(result.section_nats):
        assert nats == pytest.approx(nats_N[section_N == section].sum(), rel=1e-6)
    assert sum(result.section_nats) == pytest.approx(result.nats, rel=1e-12)

"""Measurements on a model: budgets are met, text is counted in bytes, policies without a budget become top-k."""

import pytest
import torch

from ablations.defaults import ModelOptions
from ablations.measure import budgets_of, set_budget, text_bytes
from ablations.registry import all_methods
from corpus.prepare import CorpusConfig, prepare
from lm.evaluate import evaluate
from lm.model import LanguageModel


def build(name, tiny_model):
    config = all_methods()[name].change(ModelOptions(**tiny_model).config(50))
    return LanguageModel(config).init_weights(0)


def mean_experts(model, inputs, boundary):
    return evaluate(model, [(inputs, torch.zeros(4, 32, dtype=torch.int64))], n_bytes=100, boundary=boundary).mean_experts


@pytest.mark.parametrize("name", ["baseline", "top_p", "null_experts", "random_k"])
@pytest.mark.parametrize("boundary", [0, 5])
def test_every_budget_is_met_exactly_on_the_calibration_text(name, boundary, tiny_model):
    model = build(name, tiny_model)
    tokens_BT = torch.randint(50, (4, 32), generator=torch.Generator().manual_seed(0))
    inputs = model.prefix(tokens_BT, boundary).detach() if boundary else tokens_BT
    for experts in (1, 2, 3, 4):
        calibrated_on = set_budget(model, experts, inputs, boundary)
        assert calibrated_on == (128 if name in ("top_p", "null_experts") else 0)
        # One part in 128 tokens, where levels tie.
        assert mean_experts(model, inputs, boundary) == pytest.approx((experts,) * (8 - boundary), abs=0.05)


def test_blocks_below_the_boundary_keep_their_policy(tiny_model):
    model = build("baseline", tiny_model)
    tokens_BT = torch.randint(50, (4, 32), generator=torch.Generator().manual_seed(0))
    set_budget(model, 1, model.prefix(tokens_BT, 6).detach(), 6)
    assert mean_experts(model, tokens_BT, 0) == (3.0,) * 6 + (1.0,) * 2


def test_budgets_are_around_the_baselines_own():
    assert budgets_of(ModelOptions(k=12).config(50)) == [2, 4, 6, 8, 12, 16]
    assert budgets_of(ModelOptions(k=3, n_experts=8).config(50)) == [1, 2, 3, 4]
    assert budgets_of(ModelOptions(k=1, n_experts=1).config(50)) == [1]


def test_bytes_of_the_first_targets_are_those_of_their_text(text_folder, tmp_path):
    corpus = prepare(CorpusConfig(data=(str(text_folder),), vocab_size=300), tmp_path)
    everything = text_bytes(corpus, len(corpus.valid) * 2)
    assert everything == corpus.valid.n_bytes
    first = corpus.valid.window(1, 40).tolist()
    assert text_bytes(corpus, 40) == len(corpus.tokenizer.decode(first).encode()) < everything

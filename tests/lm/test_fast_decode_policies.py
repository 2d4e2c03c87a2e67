"""Decisions within a step that is one call of C, and outside of it: what C decides for policies that add something to
scores, and routers that the call asks."""

import pytest
import torch

from lm.budget import set_budget
from routing.decode_step import OutsideDecisions
from routing.policies.difficulty_head import DifficultyHead
from routing.policies.moe_plus_plus import MoEPlusPlus
from routing.policies.null_experts import NullExperts
from routing.policies.relative_threshold import RelativeThreshold
from routing.policies.sequence_budget import SequenceBudget
from routing.policies.threshold import ScoreThreshold
from routing.policies.top_k import TopK
from routing.policies.top_p import TopP
from routing.policies.zero_computation import ZeroComputationExperts
from routing.router import NonFiniteScoresError, RouterConfig
from tests.lm.test_fast_decode import (
    POLICIES,
    build,
    compare,
    compare_routings,
    decoded,
    layer_by_layer,
    pytestmark,
)

__all__ = ["pytestmark"]

IN_C = (DifficultyHead, NullExperts, ScoreThreshold, TopK, TopP, ZeroComputationExperts)
# What `adapt` teaches, and every option that C knows.
TAUGHT = {
    "null columns apart": NullExperts(k=12, n_null=12, target_mean=4.0, apart=True),
    "null columns with a gain": NullExperts(k=12, n_null=16, target_mean=4.0, start=0.3),
    "few that never weigh": NullExperts(k=8, n_null=3, target_mean=6.5, floor=2, null_weighs=False),
    "the token returned": ZeroComputationExperts(k=9, n_null=9, target_mean=3.0, column_bias=True),
    "a head": DifficultyHead(cap=12, target_mean=4.0),
    "a head with a power": DifficultyHead(cap=12, target_mean=4.0, floor=2, start=0.01),
}


@pytest.fixture
def asked(monkeypatch):
    """Grows by the layer's number with every decision outside of the call."""
    layers, decide = [], OutsideDecisions.decide
    monkeypatch.setattr(OutsideDecisions, "decide", lambda self, layer: layers.append(layer) or decide(self, layer))
    return layers


def taught(policy, dtype="float32", **router):
    """A model whose policies have something to say, at their mean on a text."""
    model = build("F", dtype, RouterConfig(policy=policy, **router))
    draws = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for each in model.routers():
            for name, tensor in each.policy.state_dict().items():
                if name in ("head_D", "column_bias_Z", "constant_CD", "mix_CD"):
                    tensor.copy_(torch.randn(tensor.shape, generator=draws) * 0.1)
            each.selection_bias_E.copy_(torch.randn(40, generator=draws) * 0.003)
        set_budget(model, policy.target_mean, torch.randint(50, (4, 32), generator=draws))
    return model


@pytest.mark.parametrize(("dtype", "batch_size"), [("float32", 1), ("float32", 8), ("bfloat16", 1), ("bfloat16", 8)])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("name", TAUGHT)
def test_taught_policies_decide_in_c_as_in_torch(name, score, dtype, batch_size, monkeypatch, steps, asked):
    renormalise = batch_size == 1 or score == "sigmoid"
    model = taught(TAUGHT[name], dtype, score=score, renormalise=renormalise)
    _, experts = decoded(model, 8)
    assert len(experts.unique()) > 1
    steps.clear()
    compare(model, batch_size, monkeypatch, steps)
    assert not asked


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.__name__)
def test_who_is_asked(policy, steps, asked):
    model = build("F", "float32", RouterConfig(policy=policy()))
    decoded(model, 1, 2)
    assert len(steps) == 2
    assert asked == ([] if policy in IN_C else [*range(model.config.n_layers)] * 2)


@pytest.mark.parametrize("router", [{"bias": True}, {"scaling": 2.0}, {"renormalise_eps": 0.1}])
def test_routers_with_more_than_scores_are_asked(router, monkeypatch, steps, asked):
    compare(taught(TAUGHT["the token returned"], **router), 2, monkeypatch, steps)
    assert asked


@pytest.mark.parametrize("policy", [*TAUGHT.values(), MoEPlusPlus(target_mean=6.0), RelativeThreshold(target_mean=6.0)])
def test_routings_are_those_of_the_layers(policy, monkeypatch, steps):
    compare_routings(taught(policy), monkeypatch, steps)


def test_a_policy_that_follows_sequences_remembers_them(monkeypatch, steps, asked):
    """Through a reordered cache, too: its sums move on with every step."""
    logits = []
    for one_call in (True, False):
        if not one_call:
            layer_by_layer(monkeypatch)
        model, own = build("F", "float32", RouterConfig(policy=SequenceBudget())), []
        cache = model.new_cache(2, 16)
        with torch.no_grad():
            for step in range(12):
                if step == 6:
                    cache.reorder(torch.tensor([1, 0]))
                own.append(model(torch.tensor([[step], [3 * step % 50]]), cache).logits_BTV)
        logits.append(torch.cat(own))
    assert len(steps) == 12
    assert len(asked) == 12 * model.config.n_layers
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", [TopP(target_mean=6.0), TAUGHT["null columns apart"], TAUGHT["a head"]])
def test_numbers_of_single_texts_are_asked_for_and_then_no_more(policy, monkeypatch, steps, asked):
    logits = []
    for one_call in (True, False):
        if not one_call:
            layer_by_layer(monkeypatch)
        model, own = taught(policy), []
        cache = model.new_cache(2, 6)
        with torch.no_grad():
            for counts in (None, [2, 5], [2, 5], None):
                for router in model.routers():
                    router.policy.counts_T = None if counts is None else torch.tensor(counts)
                output = model(torch.tensor([[1], [2]]), cache)
                own.append(output.logits_BTV)
                if counts is not None:
                    assert output.routings[0].assignments.experts_per_token_T().tolist() == counts
        logits.append(torch.cat(own))
    assert len(steps) == 4
    assert asked == [*range(model.config.n_layers)] * 2
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_what_is_refused_is_refused_alike(monkeypatch, steps):
    """By C, and by a router that is asked, whatever it raises."""

    def nan(tensor):
        return lambda model: tensor(model.routers()[1]).view(-1)[0].fill_(torch.nan)

    cases = [
        (TAUGHT["null columns with a gain"], nan(lambda router: router.null_weight_ZD), "layer 1: scores"),
        (TAUGHT["null columns with a gain"], nan(lambda router: router.policy.gain.root_1), "layer 1: scores"),
        (TAUGHT["the token returned"], nan(lambda router: router.policy.column_bias_Z), "layer 1: scores"),
        (TAUGHT["a head"], nan(lambda router: router.policy.head_D), "layer 1: scores"),
        (RelativeThreshold(target_mean=6.0), nan(lambda router: router.weight_ED), "layer 1: scores"),
        (
            RelativeThreshold(target_mean=6.0),
            lambda model: setattr(model.routers()[1].policy, "counts_T", torch.tensor([99])),
            "99 experts for a token",
        ),
    ]
    said = []
    for one_call in (True, False):
        if not one_call:
            layer_by_layer(monkeypatch)
        for policy, change, text in cases:
            model = taught(policy)
            cache = model.new_cache(1, 4)
            with torch.no_grad():
                model(torch.tensor([[1]]), cache)
                change(model)
                with pytest.raises(ValueError, match=text) as error:
                    model(torch.tensor([[2]]), cache)
            said.append((str(error.value), type(error.value), [state.length for state in cache.layers]))
            assert isinstance(error.value, NonFiniteScoresError) == ("scores" in text)
    assert len(steps) == 2 * len(cases)
    assert said[: len(cases)] == said[len(cases) :]

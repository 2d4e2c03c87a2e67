"""A routing policy that exists in this test only: defining it is all it takes to train it, hold its budget, swap it in
and out, store it, plan it and compare it."""

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ablations.cli import compare
from ablations.comparison.options import Options
from ablations.comparison.registry import find_methods
from ablations.difficulty.observe import observe
from ablations.difficulty.windows import Windows
from ablations.method import Method, experts_of, with_policy
from attention.config import AttentionConfig
from corpus.prepare import CorpusConfig
from foundation.serialize import from_dict, to_dict
from lm.budget import calibrate_to_targets, set_budget, variable_layers
from lm.config import ModelConfig
from lm.model import LanguageModel, token_losses
from lm.options import ModelOptions
from moe.config import MoEConfig
from routing.budget import BudgetController
from routing.policies.top_k import TopK
from routing.policy import Policy, PolicyConfig, Scores, Slots, best, check_bounds
from routing.router import RouterConfig
from staged_training.staging import StagingConfig

MODEL = ModelConfig(
    vocab_size=40,
    d_model=16,
    n_layers=2,
    attention=AttentionConfig(n_heads=2, n_kv_heads=1, head_dim=8),
    moe=MoEConfig(n_experts=8, d_expert=16, router=RouterConfig(policy=TopK(k=3))),
)


@pytest.fixture
def margin() -> Callable[..., PolicyConfig]:
    """The policy's config class: a file in `routing/policies/` would hold these two classes and nothing else."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Margin(PolicyConfig):
        """The experts whose logit lies within a margin of the token's best one."""

        target_mean: float = 3.0
        floor: int = 1
        cap: int = 6

        @property
        def held_mean(self) -> float:
            return self.target_mean

        @property
        def assumed_experts(self) -> float:
            return self.target_mean

        @property
        def needs_shared_expert(self) -> bool:
            return self.floor == 0

        def build(self, *, n_experts: int, d_model: int, layer_index: int) -> Policy:
            return MarginPolicy(self, n_experts=n_experts)

    class MarginPolicy(Policy):
        def __init__(self, config: Margin, *, n_experts: int) -> None:
            super().__init__(config)
            check_bounds(floor=config.floor, cap=config.cap, n_experts=n_experts, target_mean=config.target_mean)
            self.budget = BudgetController(
                target_mean=config.target_mean, initial=0.5, lowest=0.0, highest=1e4, rate=0.5
            )

        def select(self, scores: Scores) -> Slots:
            expert_TK, score_TK = best(scores, self.config.cap)
            logit_TK = scores.logits_TE.detach().gather(-1, expert_TK)
            level_TK = logit_TK[:, :1] - logit_TK
            level_TK[:, : self.config.floor] = -torch.inf
            return Slots(expert_TK, score_TK, self.within_budget(level_TK))

    return Margin


def tokens(seed: int) -> torch.Tensor:
    return torch.randint(MODEL.vocab_size, (8, 33), generator=torch.Generator().manual_seed(seed))


def mean_experts(model: LanguageModel, tokens_BT: torch.Tensor) -> list[float]:
    return [float(routing.statistics.mean_experts) for routing in model(tokens_BT).routings]


def trained(config: ModelConfig, steps: int) -> tuple[LanguageModel, list[float], list[float]]:
    """A model after some steps, its losses and the experts it used."""
    model = LanguageModel(config).init_weights(0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, means = [], []
    for step in range(steps):
        model.begin_step(step, seed=0)
        # The same text again and again: it is learnt by heart.
        tokens_BT = tokens(0)
        output = model(tokens_BT[:, :-1])
        loss = token_losses(output.logits_BTV, tokens_BT[:, 1:]).mean()
        (loss + output.routing_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.after_step()
        losses.append(loss.item())
        means += [float(routing.statistics.mean_experts) for routing in output.routings]
    return model, losses, means


def test_it_trains_at_its_budget_and_is_calibrated(margin):
    model, losses, means = trained(with_policy(MODEL, margin(target_mean=2.5)), steps=30)
    assert losses[-1] < losses[0] - 0.3
    assert np.mean(means[20:]) == pytest.approx(2.5, rel=0.03)
    assert [router.policy.asked_experts for router in model.routers()] == [2.5, 2.5]
    assert variable_layers(model) == (0, 1)
    model.eval()
    assert calibrate_to_targets(model, tokens(1)) == tokens(1).numel()
    assert mean_experts(model, tokens(1)) == pytest.approx([2.5, 2.5], abs=1e-6)
    set_budget(model, 4, tokens(1))
    assert mean_experts(model, tokens(1)) == pytest.approx([4, 4], abs=1e-6)
    with pytest.raises(ValueError, match="fills at most 6 slots"):
        set_budget(model, 7, tokens(1))


def test_it_is_swapped_in_and_out(margin):
    model, _, _ = trained(MODEL, steps=2)
    model.eval()
    before = model(tokens(1)).logits_BTV
    model.set_policy(margin(target_mean=2.0))
    assert all(1 <= mean <= 6 for mean in mean_experts(model, tokens(1)))
    assert not torch.equal(model(tokens(1)).logits_BTV, before)
    with pytest.raises(ValueError, match=r"Margin.floor = 0 needs a shared expert"):
        model.set_policy(margin(floor=0))
    with pytest.raises(ValueError, match="cap = 9 is outside"):
        model.set_policy(margin(cap=9))
    model.set_policy(TopK(k=3))
    assert torch.equal(model(tokens(1)).logits_BTV, before)


def test_its_decisions_are_dealt_out_anew(margin):
    model, _, _ = trained(with_policy(MODEL, margin()), steps=2)
    tokens_WT = tokens(1)
    windows: Any = Windows.__new__(Windows)
    for name, value in (
        ("tokens_WT", tokens_WT[:, :-1]),
        ("targets_WT", tokens_WT[:, 1:]),
    ):
        object.__setattr__(windows, name, value)
    own = observe(model, windows)
    dealt_NL = np.random.default_rng(0).permutation(own.experts_NL)
    dealt = observe(model, windows, counts_NL=dealt_NL)
    assert np.array_equal(dealt.experts_NL, dealt_NL)
    assert not np.allclose(dealt.nats_N, own.nats_N)
    # Observing leaves nothing behind.
    assert np.array_equal(observe(model, windows).nats_N, own.nats_N)


def test_it_is_stored_by_its_name(margin):
    config = with_policy(MODEL, margin(target_mean=2.0))
    stored = json.loads(json.dumps(to_dict(config)))
    assert stored["moe"]["router"]["policy"] == {"type": "Margin", "target_mean": 2.0, "floor": 1, "cap": 6}
    assert from_dict(ModelConfig, stored) == config
    stored["moe"]["router"]["policy"]["type"] = "Margn"
    with pytest.raises(
        ValueError, match=r"policy: unknown type 'Margn'; did you mean 'Margin'\? Legal: DifficultyHead"
    ):
        from_dict(ModelConfig, stored)


@pytest.mark.usefixtures("undrawn")
def test_it_is_compared_with_the_baseline(margin, tmp_path, text_folder, tiny_model, capsys):
    method = Method(
        name="margin",
        question="Does a margin below the best logit choose well?",
        change=lambda model: with_policy(model, margin(target_mean=experts_of(model), cap=model.moe.n_experts)),
    )
    options = Options(
        seeds=2,
        out=tmp_path,
        budget_batches=1,
        model=ModelOptions(**tiny_model),
        staging=StagingConfig(tokens=6 * 4 * 64, trunk_share=0.67, freeze=0.4, batch_size=4, seq_len=64),
        corpus=CorpusConfig(data=(str(text_folder),), vocab_size=300),
    )
    assert method.kind(options.model.config(300)) == "routing"
    assert method.has_budget(options.model.config(300))
    report = compare([*find_methods([]), method], options)
    printed = capsys.readouterr().out
    assert re.search(r"margin +policy TopK\(k=3[^)]*\) -> \S*Margin\(target_mean=3", printed)
    assert report is not None
    assert "Does a margin below the best logit choose well?" in report.read_text()
    # It holds what it was asked for, at its own budget and at others.
    (folder, _) = sorted((tmp_path / "branches").glob("margin_*"))
    result = json.loads((folder / "result.json").read_text())
    for point in result["budgets"]:
        assert point["mean_experts"] == pytest.approx(point["asked_experts"], rel=0.25)

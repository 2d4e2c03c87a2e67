"""Thresholds on the score itself.

`ScoreThreshold`: an expert is used if its probability exceeds one threshold for all tokens, moved so that the mean
number of experts is the budget. A token with several strong experts gets more of them than one that top-p would satisfy
with the first.

`LearnedThreshold`: each expert learns how high its own bar is, in the manner of DynMoE (Guo et al., arXiv 2405.14297).
There, a straight-through estimator carries the gradient past the comparison; here an expert weighs sigmoid(logit -
bar), which carries it by itself. The budget is held by one shift common to all bars. Weights that were trained under a
softmax know no offset common to a token's logits; bars that join them read logits without it (`centred`).

Legend: T tokens, E experts, K slots per token (the cap).
"""

import dataclasses

import torch
from torch import nn

from routing.budget import BudgetController
from routing.policy import FusedRule, Policy, PolicyConfig, Scores, Slots, best, check_bounds


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreThreshold(PolicyConfig):
    """The experts whose score passes one bar, the same for all tokens.

    Attributes:
        target_mean: experts per token that the budget holds in the mean.
        floor: least experts per token.
        cap: most experts per token.
        rate: of the controller, per step.
    """

    target_mean: float = 12.0
    floor: int = 1
    cap: int = 24
    rate: float = 0.5

    @property
    def held_mean(self) -> float:
        return self.target_mean

    @property
    def assumed_experts(self) -> float:
        return self.target_mean

    @property
    def needs_shared_expert(self) -> bool:
        return self.floor == 0

    @property
    def fused_rule(self) -> FusedRule:
        return FusedRule("threshold", self.cap, self.floor)

    def build(self, *, n_experts: int, d_model: int, layer_index: int) -> "ScoreThresholdPolicy":
        return ScoreThresholdPolicy(self, n_experts=n_experts)


class ScoreThresholdPolicy(Policy):
    def __init__(self, config: ScoreThreshold, *, n_experts: int) -> None:
        super().__init__(config)
        check_bounds(floor=config.floor, cap=config.cap, n_experts=n_experts, target_mean=config.target_mean)
        # The level is minus the selection score. The first threshold is what an even router gives each expert.
        self.budget = BudgetController(
            target_mean=config.target_mean, initial=-1.0 / n_experts, lowest=-2.0, highest=2.0, rate=config.rate
        )

    def select(self, scores: Scores) -> Slots:
        expert_TK, score_TK = best(scores, self.config.cap)
        level_TK = -scores.selection_TE.gather(-1, expert_TK)
        level_TK[:, : self.config.floor] = -torch.inf
        return Slots(expert_TK, score_TK, self.within_budget(level_TK))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnedThreshold(PolicyConfig):
    """The experts whose score passes their own bar, which each of them learns.

    Attributes:
        target_mean: experts per token that the budget holds in the mean; None lets the bars alone decide.
        floor: least experts per token.
        cap: most experts per token.
        centred: bars are on log-probabilities, logits without what a token's have in common.
        rate: of the controller, per step.
    """

    target_mean: float | None = 12.0
    floor: int = 1
    cap: int = 24
    centred: bool = False
    rate: float = 0.5

    @property
    def held_mean(self) -> float | None:
        return self.target_mean

    @property
    def assumed_experts(self) -> float:
        return self.target_mean if self.target_mean is not None else self.cap / 2

    @property
    def needs_shared_expert(self) -> bool:
        return self.floor == 0

    def build(self, *, n_experts: int, d_model: int, layer_index: int) -> "LearnedThresholdPolicy":
        return LearnedThresholdPolicy(self, n_experts=n_experts)


class LearnedThresholdPolicy(Policy):
    def __init__(self, config: LearnedThreshold, *, n_experts: int) -> None:
        super().__init__(config)
        check_bounds(floor=config.floor, cap=config.cap, n_experts=n_experts, target_mean=config.target_mean)
        self.bar_E = nn.Parameter(torch.zeros(n_experts))
        self.budget = BudgetController(
            target_mean=config.target_mean, initial=0.0, lowest=-1e4, highest=1e4, rate=config.rate
        )

    def select(self, scores: Scores) -> Slots:
        logits_TE = scores.centred_TE if self.config.centred else scores.logits_TE
        margin_TE = logits_TE - self.bar_E.to(logits_TE.dtype)
        margin_TK, expert_TK = margin_TE.topk(self.config.cap, dim=-1)
        level_TK = -margin_TK.detach()
        level_TK[:, : self.config.floor] = -torch.inf
        return Slots(expert_TK, margin_TK.sigmoid(), self.within_budget(level_TK))

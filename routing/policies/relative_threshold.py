"""Relative threshold: the experts that score more than a share of the token's best one, and at least `floor` of them.

Slot j, in order of score, is used if score_j >= t score_1, or j <= floor. It is the rule of post-hoc skipping (Lu et
al., arXiv 2402.14800; `routing/policies/skipping.py`) with a floor, trained with: t is moved so that the mean number of
experts is the budget, and the router meets its own decisions in training. Unlike one bar on the score itself, it asks
how the probability is shared within a token and not how sharp the token's scores are.

Legend: T tokens, K slots per token (the cap).
"""

import dataclasses

import torch

from routing.budget import BudgetController
from routing.policy import Policy, PolicyConfig, Scores, Slots, best, check_bounds


@dataclasses.dataclass(frozen=True, kw_only=True)
class RelativeThreshold(PolicyConfig):
    """The experts whose score reaches a share of the best one's, and a floor of them.

    Attributes:
        target_mean: experts per token that the budget holds in the mean.
        floor: least experts per token.
        cap: most experts per token.
        ratio: t before any step has moved it.
        rate: of the controller, per step.
    """

    target_mean: float = 12.0
    floor: int = 2
    cap: int = 24
    ratio: float = 0.3
    rate: float = 0.5

    @property
    def held_mean(self) -> float:
        return self.target_mean

    @property
    def assumed_experts(self) -> float:
        return self.target_mean

    def build(self, *, n_experts: int, d_model: int, layer_index: int) -> "RelativeThresholdPolicy":
        return RelativeThresholdPolicy(self, n_experts=n_experts)


class RelativeThresholdPolicy(Policy):
    def __init__(self, config: RelativeThreshold, *, n_experts: int) -> None:
        super().__init__(config)
        check_bounds(floor=config.floor, cap=config.cap, n_experts=n_experts, target_mean=config.target_mean)
        if not 0.0 <= config.ratio <= 1.0:
            raise ValueError(f"RelativeThreshold.ratio = {config.ratio} is outside [0, 1]")
        # The best expert has ratio 1: it is used at any threshold, so a floor of 0 leaves no token with nothing.
        self.budget = BudgetController(
            target_mean=config.target_mean, initial=-config.ratio, lowest=-1.0, highest=0.0, rate=config.rate
        )

    def select(self, scores: Scores) -> Slots:
        expert_TK, score_TK = best(scores, self.config.cap)
        ranked_TK = score_TK.detach()
        # A selection bias ranks and does not weigh: the first slot need not have the highest score.
        level_TK = -ranked_TK / ranked_TK.amax(dim=-1, keepdim=True)
        level_TK[:, : self.config.floor] = -torch.inf
        return Slots(expert_TK, score_TK, self.within_budget(level_TK))

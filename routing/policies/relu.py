"""ReLU routing: an expert is used if its logit is positive, and weighs just that (ReMoE, Wang et al., arXiv
2412.14711).

Continuous and differentiable in the logits, with no top-k. Two ways to hold the number of experts:
- "shift": a shift of all logits, moved like any other threshold, holds it to the percent; no penalty.
- "penalty", as published: an L1 penalty, weighted by each expert's load so that it balances too, whose coefficient is
  multiplied or divided by a constant each step as the mean number of experts lies above or below its target. Only the
  optimizer's answer moves the number, so where the weights move slowly it swings around the target rather than staying
  there.

At inference the shift, calibrated, sets the budget of either. Use `renormalise = False` in the router's config for the
published form.

Legend: T tokens, E experts, K slots per token (the cap).
"""

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from routing.budget import BudgetController
from routing.losses import mean_over_tokens
from routing.policy import Policy, PolicyConfig, Scores, Slots, best, check_bounds

# What a slot that only the floor keeps weighs before renormalisation: little, but a layer whose logits are all negative
# still computes something.
FLOOR_SCORE = 1e-2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReLU(PolicyConfig):
    """The experts whose logit is positive, weighed by just that.

    Attributes:
        target_mean: experts per token that are held in the mean.
        floor: least experts per token; without one, layers are known to collapse to no experts at all.
        cap: most experts per token.
        centred: of log-probabilities, logits without what a token's have in common: weights that were trained under a
            softmax, which a policy joins, know no such offset.
        control: how the mean is held: "shift" of all logits, to the percent, or by the published "penalty".
        l1_coefficient: initial weight of the penalty.
        l1_factor: by which the penalty's weight changes per step.
        rate: of the controller of "shift", per step.
    """

    target_mean: float = 12.0
    floor: int = 1
    cap: int = 32
    centred: bool = False
    control: Literal["shift", "penalty"] = "shift"
    l1_coefficient: float = 1e-8
    l1_factor: float = 1.2
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

    def build(self, *, n_experts: int, d_model: int, layer_index: int) -> "ReLUPolicy":
        return ReLUPolicy(self, n_experts=n_experts)


class ReLUPolicy(Policy):
    l1_coefficient: Tensor

    def __init__(self, config: ReLU, *, n_experts: int) -> None:
        super().__init__(config)
        check_bounds(floor=config.floor, cap=config.cap, n_experts=n_experts, target_mean=config.target_mean)
        if config.l1_factor <= 1.0 or config.l1_coefficient <= 0.0:
            raise ValueError(
                f"ReLU needs l1_factor > 1 and l1_coefficient > 0, got {config.l1_factor} and {config.l1_coefficient}"
            )
        if config.control not in ("penalty", "shift"):
            raise ValueError(f"ReLU.control = {config.control!r} is not one of 'shift', 'penalty'")
        # Under "penalty" the threshold does not move in training; it is there to be calibrated.
        target_mean = config.target_mean if config.control == "shift" else None
        self.budget = BudgetController(target_mean=target_mean, initial=0.0, lowest=-1e4, highest=1e4, rate=config.rate)
        self.register_buffer("l1_coefficient", torch.tensor(config.l1_coefficient))

    def select(self, scores: Scores) -> Slots:
        assert self.budget is not None
        expert_TK, _ = best(scores, self.config.cap)
        logit_TK = self._logits_TE(scores).gather(-1, expert_TK)
        level_TK = -logit_TK.detach()
        level_TK[:, : self.config.floor] = -torch.inf
        keep_TK = self.within_budget(level_TK)
        score_TK = (logit_TK + self.budget.limit).relu()
        forced_TK = keep_TK & (score_TK <= 0)
        return Slots(expert_TK, score_TK.masked_fill(forced_TK, FLOOR_SCORE), keep_TK)

    def losses(self, scores: Scores, load_E: Tensor) -> dict[str, Tensor]:
        if self.config.control == "shift":
            return {}
        assert self.budget is not None
        n_experts = load_E.shape[0]
        relative_load_E = torch.where(load_E.sum() > 0, load_E * n_experts / load_E.sum().clamp_min(1), 1.0)
        penalty_E = mean_over_tokens((self._logits_TE(scores) + self.budget.threshold).relu())
        return {"l1": self.l1_coefficient * (relative_load_E * penalty_E).sum() / n_experts}

    def _logits_TE(self, scores: Scores) -> Tensor:
        return scores.centred_TE if self.config.centred else scores.logits_TE

    def after_step(self, mean_experts: Tensor) -> None:
        above, below = mean_experts > self.config.target_mean, mean_experts < self.config.target_mean
        self.l1_coefficient *= self.config.l1_factor ** (above.float() - below.float())

"""Skipping: top-k, minus the experts that weigh little beside the token's best one (Lu et al., arXiv 2402.14800,
"NAEE").

Slot j is used if score_j >= ratio * score_1. The paper skips in models that were trained with top-k, its ratio the
median of score_2 / score_1 per layer; `Router.calibrate` sets it per layer for any mean number of experts. With
`target_mean` training skips too, and moves the ratio to hold that mean.

Legend: T tokens, K slots per token.
"""

import dataclasses

from routing.budget import BudgetController
from routing.policy import Policy, PolicyConfig, Scores, Slots, best, check_bounds, check_k


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skipping(PolicyConfig):
    """Top-k without the experts that weigh little beside the token's best one.

    Attributes:
        k: slots before skipping.
        ratio: of the best expert's score that an expert must reach, until calibrated.
        target_mean: experts per token that the budget holds in the mean; None leaves the ratio as it is.
        rate: of the controller, per step.
    """

    k: int = 12
    ratio: float = 0.5
    target_mean: float | None = None
    rate: float = 0.5

    @property
    def held_mean(self) -> float | None:
        return self.target_mean

    @property
    def assumed_experts(self) -> float:
        return self.k if self.target_mean is None else self.target_mean

    def build(self, *, n_experts: int, d_model: int, layer_index: int) -> "SkippingPolicy":
        return SkippingPolicy(self, n_experts=n_experts)


class SkippingPolicy(Policy):
    def __init__(self, config: Skipping, *, n_experts: int) -> None:
        super().__init__(config)
        check_k("Skipping.k", config.k, n_experts)
        if not 0.0 <= config.ratio <= 1.0:
            raise ValueError(f"Skipping.ratio = {config.ratio} is outside [0, 1]")
        check_bounds(floor=1, cap=config.k, n_experts=n_experts, target_mean=config.target_mean)
        # The best expert has ratio 1 and is always used, so no floor is needed.
        self.budget = BudgetController(
            target_mean=config.target_mean, initial=-config.ratio, lowest=-1.0, highest=0.0, rate=config.rate
        )

    def select(self, scores: Scores) -> Slots:
        expert_TK, score_TK = best(scores, self.config.k)
        return Slots(
            expert_TK, score_TK, self.within_budget(-score_TK.detach() / score_TK.detach().amax(dim=-1, keepdim=True))
        )

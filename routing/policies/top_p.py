"""Top-p: as many experts as a token needs to gather probability mass p (Huang et al., arXiv 2403.07652).

Sorted by score, expert j is used if the mass ahead of it is at most p: the smallest set whose mass exceeds p. The same
p means very different numbers of experts at different sharpness of the scores, so p is moved to hold the mean number of
experts, unless `target_mean` is None.

Legend: T tokens, K slots per token (the cap).
"""

import dataclasses

import torch
from torch import Tensor

from routing.budget import BudgetController
from routing.losses import mean_over_tokens
from routing.policy import FusedRule, Policy, PolicyConfig, Scores, Slots, best, check_bounds


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopP(PolicyConfig):
    """As many experts as a token needs to gather a share of the probability.

    Attributes:
        p: initial (or, without a target, fixed) probability mass.
        target_mean: experts per token that the budget holds in the mean; None leaves p as it is.
        floor: least experts per token.
        cap: most experts per token.
        entropy_coefficient: weighs the mean entropy of the scores in nats, which the paper adds so that the mass
            gathers on few experts.
        rate: of the controller, per step.
    """

    p: float = 0.4
    target_mean: float | None = 12.0
    floor: int = 1
    cap: int = 24
    entropy_coefficient: float = 0.0
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

    @property
    def fused_rule(self) -> FusedRule:
        return FusedRule("top_p", self.cap, self.floor)

    def build(self, *, n_experts: int, d_model: int, layer_index: int) -> "TopPPolicy":
        return TopPPolicy(self, n_experts=n_experts)


class TopPPolicy(Policy):
    def __init__(self, config: TopP, *, n_experts: int) -> None:
        super().__init__(config)
        if not 0.0 < config.p < 1.0:
            raise ValueError(f"TopP.p = {config.p} is outside (0, 1)")
        check_bounds(floor=config.floor, cap=config.cap, n_experts=n_experts, target_mean=config.target_mean)
        if config.target_mean is not None and config.target_mean < 1:
            # No mass lies ahead of a token's first expert, so that no p leaves it out.
            raise ValueError(
                f"TopP.target_mean = {config.target_mean} is out of reach with floor = {config.floor}: every token uses"
                " its first expert, whatever the threshold; legal: at least 1"
            )
        self.budget = BudgetController(
            target_mean=config.target_mean, initial=config.p, lowest=0.0, highest=1.0, rate=config.rate
        )

    def select(self, scores: Scores) -> Slots:
        expert_TK, score_TK = best(scores, self.config.cap)
        mass_TK = scores.probs_TE.detach().gather(-1, expert_TK)
        level_TK = mass_TK.cumsum(dim=-1) - mass_TK
        level_TK[:, : self.config.floor] = -torch.inf
        return Slots(expert_TK, score_TK, self.within_budget(level_TK))

    def losses(self, scores: Scores, load_E: Tensor) -> dict[str, Tensor]:
        if self.config.entropy_coefficient == 0.0:
            return {}
        entropy_T = -(scores.probs_TE * scores.probs_TE.clamp_min(torch.finfo(scores.probs_TE.dtype).tiny).log()).sum(
            dim=-1
        )
        return {"entropy": self.config.entropy_coefficient * mean_over_tokens(entropy_T)}

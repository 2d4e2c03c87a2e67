"""Expert threshold: every expert has a bar of its own, a moving average of the score that its fair share of all tokens
passes (expert threshold routing, arXiv 2603.11535).

Expert e computes token t if s_te >= c_e. After a step of N tokens c_e moves to beta c_e + (1 - beta) q_e, with q_e the
score of the C-th best token for e, C = round(k N / E): the bar that expert choice would have set for that step. Loads
are even so, and the mean is k, without a balance loss; unlike expert choice a decision asks for no other token: bars
are those of the steps before, in training and at inference alike. Experts of a token may be none; `floor` says what
happens then. The first steps weigh as a plain mean, or the start would be remembered for 1 / (1 - beta) steps.

Legend: T tokens, E experts, N tokens of a step, K slots per token (the cap).
"""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from routing.budget import BudgetController
from routing.policy import Policy, PolicyConfig, Scores, Slots, check_bounds


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertThreshold(PolicyConfig):
    """The experts whose own bar the token's score reaches; bars are moving averages that keep loads even.

    Attributes:
        k: mean experts per token; each expert computes the share k / E of the tokens.
        floor: least experts per token: those whose bars it comes nearest to.
        cap: most experts per token.
        decay: beta of the moving average, per step.
    """

    own_statistics: ClassVar[bool] = True

    k: float = 12.0
    floor: int = 1
    cap: int = 24
    decay: float = 0.99

    @property
    def held_mean(self) -> float:
        return self.k

    @property
    def assumed_experts(self) -> float:
        return self.k

    @property
    def needs_shared_expert(self) -> bool:
        return self.floor == 0

    def build(self, *, n_experts: int, d_model: int, layer_index: int) -> "ExpertThresholdPolicy":
        return ExpertThresholdPolicy(self, n_experts=n_experts)


class ExpertThresholdPolicy(Policy):
    bar_E: Tensor
    n_steps: Tensor

    def __init__(self, config: ExpertThreshold, *, n_experts: int) -> None:
        super().__init__(config)
        check_bounds(floor=config.floor, cap=config.cap, n_experts=n_experts, target_mean=config.k)
        if not 0.0 <= config.decay < 1.0:
            raise ValueError(f"ExpertThreshold.decay = {config.decay} is outside [0, 1)")
        # What an even router gives each expert, until the first step is counted.
        self.register_buffer("bar_E", torch.full((n_experts,), 1.0 / n_experts))
        self.register_buffer("n_steps", torch.zeros(()))
        # The bars hold the mean. The shift common to all of them is there to be calibrated, to this mean or another.
        self.budget = BudgetController(target_mean=None, initial=0.0, lowest=-2.0, highest=2.0, rate=1.0)
        self.step_scores: list[Tensor] = []

    def select(self, scores: Scores) -> Slots:
        selection_TE = scores.selection_TE
        if self.training and len(selection_TE):
            self.step_scores.append(selection_TE)
        margin_TK, expert_TK = (selection_TE - self.bar_E.to(selection_TE.dtype)).topk(self.config.cap, dim=-1)
        level_TK = -margin_TK
        level_TK[:, : self.config.floor] = -torch.inf
        return Slots(expert_TK, scores.scores_TE.gather(-1, expert_TK), self.within_budget(level_TK))

    def begin_step(self, step: int, seed: int) -> None:
        self.step_scores = []

    def after_step(self, mean_experts: Tensor) -> None:
        if not self.step_scores:
            return
        selection_NE = torch.cat(self.step_scores)
        self.step_scores = []
        n_tokens, n_experts = selection_NE.shape
        share = min(max(round(self.config.k * n_tokens / n_experts), 1), n_tokens)
        fair_E = selection_NE.kthvalue(n_tokens - share + 1, dim=0)[0]
        self.n_steps += 1
        self.bar_E += (1 / self.n_steps).clamp_min(1 - self.config.decay) * (fair_E - self.bar_E)

"""Difficulty head: a linear head predicts how many experts pay off for a token; the router only ranks them.

k_t = exp(d_t + shift) with d_t = <h, x_t>: slot j is used if log j - d_t <= shift, and the shift, common to all tokens,
holds the budget. The slot's score is multiplied by sigmoid((shift - level) / softness), so that the model's loss tells
the head whether the last experts of a token helped: raising d_t raises the share of a token's later slots. In weights
that were trained without it the factor starts at about one: it is raised to a power that is learned from `start` on.

Legend: T tokens, D model width, K slots per token (the cap).
"""

import dataclasses
import math

import torch
from torch import nn
from torch.nn import functional

from routing.budget import BudgetController
from routing.policy import Policy, PolicyConfig, Scores, Slots, best, check_bounds, gain_from
from triton_kernels.native.decode_step import PREDICTED, NativeBlock, Watch


@dataclasses.dataclass(frozen=True, kw_only=True)
class DifficultyHead(PolicyConfig):
    """As many experts as a linear head predicts to pay off for the token.

    Attributes:
        target_mean: experts per token that the budget holds in the mean.
        floor: least experts per token.
        cap: most experts per token.
        softness: width of the soft edge, in units of log k.
        start: the power of the soft edge at first, learned from there, so that a head can join weights that were
            trained without one and leave what those compute as it is; 1 for no power.
        rate: of the controller, per step.
    """

    target_mean: float = 12.0
    floor: int = 1
    cap: int = 24
    softness: float = 0.3
    start: float = 1.0
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

    def build(self, *, n_experts: int, d_model: int, layer_index: int) -> "DifficultyHeadPolicy":
        return DifficultyHeadPolicy(self, n_experts=n_experts, d_model=d_model)


class DifficultyHeadPolicy(Policy):
    def __init__(self, config: DifficultyHead, *, n_experts: int, d_model: int) -> None:
        super().__init__(config)
        check_bounds(floor=config.floor, cap=config.cap, n_experts=n_experts, target_mean=config.target_mean)
        if config.softness <= 0.0:
            raise ValueError(f"DifficultyHead.softness = {config.softness} must be positive")
        self.gain = gain_from(config.start)
        # Zero: every token starts equally difficult.
        self.head_D = nn.Parameter(torch.zeros(d_model))
        initial = math.log(max(config.target_mean, 1.0))
        self.budget = BudgetController(
            target_mean=config.target_mean, initial=initial, lowest=-1e4, highest=1e4, rate=config.rate
        )

    def describe(self, block: NativeBlock, watch: Watch) -> None:
        config = self.config
        block.rule, block.slots, block.floor, block.softness = PREDICTED, config.cap, config.floor, config.softness
        block.head = watch.parameter(self, "head_D", watch.d_model)
        if self.gain is not None:
            block.gain = watch.parameter(self.gain, "root_1", 1)

    def select(self, scores: Scores) -> Slots:
        assert self.budget is not None
        expert_TK, score_TK = best(scores, self.config.cap)
        difficulty_T1 = (scores.x_TD @ self.head_D.to(scores.x_TD.dtype))[:, None]
        if self.counts_T is not None:
            # A number from outside stands for a prediction of that number, which also weighs a token's last experts.
            difficulty_T1 = (self.counts_T + 0.5).to(score_TK.dtype).log()[:, None] - self.budget.limit
        soft_level_TK = (
            torch.arange(1, self.config.cap + 1, device=score_TK.device).to(score_TK.dtype).log() - difficulty_T1
        )
        level_TK = soft_level_TK.detach().clone()
        level_TK[:, : self.config.floor] = -torch.inf
        keep_TK = self.within_budget(level_TK)
        margin_TK = (self.budget.limit - soft_level_TK) / self.config.softness
        edge_TK = margin_TK.sigmoid() if self.gain is None else (self.gain() * functional.logsigmoid(margin_TK)).exp()
        return Slots(expert_TK, score_TK * edge_TK, keep_TK)

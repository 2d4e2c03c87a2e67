"""Null experts: top-k over E real and Z null columns; a null column computes nothing (AdaMoE, arXiv 2406.13233;
LongCat-Flash, arXiv 2509.01322).

The null columns have router weights of their own and all compete for the same k slots, so a token that ranks some of
them high uses fewer real experts. Null rows are dropped before dispatch. The mean number of real experts is held by one
selection bias common to the null columns (it selects and never weighs). Real expert j, in order of score, is used if
fewer than k columns stand before it, that is if it beats null column k-j+1: the level of slot j is that null column's
score minus its own, and the threshold is minus the bias.

Legend: T tokens, Z null columns, K slots per token.
"""

import dataclasses

import torch
from torch import Tensor

from routing.budget import BudgetController
from routing.policy import Policy, PolicyConfig, Scores, Slots, best, check_bounds, check_k, gain_from
from triton_kernels.native.decode_step import RIVALS, NativeBlock, Watch


@dataclasses.dataclass(frozen=True, kw_only=True)
class NullExperts(PolicyConfig):
    """Top-k over real and null columns; a null column computes nothing.

    Attributes:
        k: slots that real and null columns compete for.
        n_null: null columns.
        target_mean: real experts per token that the budget holds in the mean, or None to leave the bias at zero.
        floor: real experts every token gets.
        null_weighs: chosen null columns take their share of renormalised weights, so that they learn from the model's
            loss and the real ones sum to less than one (True), or the real ones sum to one (False, AdaMoE).
        start: what chosen null columns' scores are multiplied by at first, and learned from there, so that they can
            join weights that were trained without them and leave what those compute as it is; 1 for no factor.
        rate: of the controller, per step.
        apart: real experts score as if there were no null columns, exp(logit) / sum over the real exp(logit), and null
            columns by the same measure: columns that join a router which does not renormalise then take nothing from
            its weights.
    """

    k: int = 20
    n_null: int = 40
    target_mean: float | None = 12.0
    floor: int = 1
    null_weighs: bool = True
    start: float = 1.0
    rate: float = 0.5
    apart: bool = False

    @property
    def held_mean(self) -> float | None:
        return self.target_mean

    @property
    def assumed_experts(self) -> float:
        return self.target_mean if self.target_mean is not None else self.k / 2

    @property
    def needs_shared_expert(self) -> bool:
        return self.floor == 0

    @property
    def null_columns(self) -> int:
        return self.n_null

    @property
    def null_columns_apart(self) -> bool:
        return self.apart

    def build(self, *, n_experts: int, d_model: int, layer_index: int) -> "NullExpertsPolicy":
        return NullExpertsPolicy(self, n_experts=n_experts)


class NullExpertsPolicy(Policy):
    def __init__(self, config: NullExperts, *, n_experts: int) -> None:
        super().__init__(config)
        name = type(config).__name__
        if config.start != 1.0 and not config.null_weighs:
            raise ValueError(f"{name}.start = {config.start}: null columns that never weigh have nothing to start from")
        self.gain = gain_from(config.start)
        check_k(f"{name}.k", config.k, n_experts)
        if config.n_null < 1:
            raise ValueError(f"{name}.n_null = {config.n_null} must be at least 1")
        check_bounds(floor=config.floor, cap=config.k, n_experts=n_experts, target_mean=config.target_mean)
        if config.target_mean is not None and config.target_mean < config.k - config.n_null:
            raise ValueError(
                f"{name}.target_mean = {config.target_mean} is out of reach: with n_null = {config.n_null} null columns"
                f" at least {config.k - config.n_null} of k = {config.k} slots go to real experts"
            )
        # Scores of columns that stand apart have no upper bound.
        highest = 1e4 if config.apart else 2.0
        self.budget = BudgetController(
            target_mean=config.target_mean, initial=0.0, lowest=-2.0, highest=highest, rate=config.rate
        )

    def select(self, scores: Scores) -> Slots:
        config = self.config
        assert scores.null_TZ is not None
        expert_TK, score_TK = best(scores, config.k)
        n_rivals = min(config.k, config.n_null)
        null_TK, rival_TK = self.rivals(scores.null_TZ, n_rivals)
        # Slot j meets null column k-j+1; slots whose rival does not exist are always real.
        level_TK = torch.full_like(score_TK, -torch.inf)
        level_TK[:, config.k - n_rivals :] = rival_TK.flip(-1)
        level_TK -= scores.selection_TE.gather(-1, expert_TK)
        level_TK[:, : config.floor] = -torch.inf
        keep_TK = self.within_budget(level_TK)
        if not config.null_weighs:
            return Slots(expert_TK, score_TK, keep_TK)
        # With c real experts, the k - c best null columns fill the remaining slots.
        n_null_T = config.k - keep_TK.sum(dim=-1, keepdim=True)
        chosen_TK = torch.arange(n_rivals, device=keep_TK.device) < n_null_T
        rest_T = (null_TK * chosen_TK).sum(dim=-1)
        return Slots(expert_TK, score_TK, keep_TK, rest_T if self.gain is None else rest_T * self.gain())

    def describe(self, block: NativeBlock, watch: Watch) -> None:
        config = self.config
        block.rule, block.slots, block.floor = RIVALS, config.k, config.floor
        block.columns, block.apart, block.null_weighs = config.n_null, config.apart, config.null_weighs
        if self.gain is not None:
            block.gain = watch.parameter(self.gain, "root_1", 1)

    def rivals(self, null_TZ: Tensor, n_rivals: int) -> tuple[Tensor, Tensor]:
        """The best null columns of each token, best first: what they weigh, and, detached, what they compete by."""
        null_TK = null_TZ.topk(n_rivals, dim=-1)[0]
        return null_TK, null_TK.detach()

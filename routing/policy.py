"""What a routing policy is: the rule that turns one token's scores into its set of experts.

Legend: T tokens, D model width, E experts, Z null columns, K slots per token.
"""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from routing.budget import BudgetController


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """What the router knows about each token, all in at least fp32.

    x_TD          the router's input
    logits_TE     of the real experts
    probs_TE      softmax of logits_TE: what balance losses and probability-mass policies read, whatever the score
                  function
    scores_TE     what an expert weighs before renormalisation: softmax (over null columns too where there are any) or
                  sigmoid
    selection_TE  detached; scores plus the selection bias: what ranks experts, and never weighs them
    null_TZ       scores of the null columns, or None
    """

    x_TD: Tensor
    logits_TE: Tensor
    probs_TE: Tensor
    scores_TE: Tensor
    selection_TE: Tensor
    null_TZ: Tensor | None = None


class Slots(NamedTuple):
    """A policy's decision, best expert first.

    expert_TK  int64
    score_TK   what each expert weighs before renormalisation, differentiable
    keep_TK    bool, or None if every slot is used
    rest_T     score of chosen columns that compute nothing but take their share of the weight, or None
    identity_T the part of rest_T whose columns return the token itself, or None
    """

    expert_TK: Tensor
    score_TK: Tensor
    keep_TK: Tensor | None = None
    rest_T: Tensor | None = None
    identity_T: Tensor | None = None


class Policy(nn.Module):
    """Base of all policies. Those with a variable number of experts hold a `budget`; the others leave it None."""

    config: Any
    budget: BudgetController | None

    def __init__(self) -> None:
        super().__init__()
        self.budget = None

    @property
    def asked_experts(self) -> float | None:
        """Experts per token, in the mean, that the policy was told to use; None where its threshold alone decides."""
        return getattr(self.config, "target_mean", None)

    def select(self, scores: Scores) -> Slots:
        """Choose the experts of each token."""
        raise NotImplementedError

    def within_budget(self, level_TK: Tensor) -> Tensor:
        """Which slots are used, bool [T, K]: those whose level is at or below the budget's threshold."""
        assert self.budget is not None
        return self.budget.keep(level_TK)

    def losses(self, scores: Scores, load_E: Tensor) -> dict[str, Tensor]:
        """Losses of the policy's own, already weighted. load_E: rows per expert of the last step. None by default."""
        return {}

    def begin_step(self, step: int, seed: int) -> None:
        """Called before a training step; what random draws depend on."""

    def selection_bias_change_E(self, rows_E: Tensor, n_tokens: Tensor) -> Tensor | None:
        """What the policy adds to the router's selection bias after a step in which n_tokens made rows_E; None by
        default."""
        return None

    def after_step(self, mean_experts: Tensor) -> None:
        """Called after a training step that routed tokens. mean_experts: dispatched rows per token, a scalar on the
        device."""


def best(scores: Scores, k: int) -> tuple[Tensor, Tensor]:
    """The k experts of highest selection score, best first, and the scores they weigh: (expert_TK, score_TK)."""
    expert_TK = torch.topk(scores.selection_TE, k, dim=-1)[1]
    return expert_TK, scores.scores_TE.gather(-1, expert_TK)


def check_k(name: str, k: int, n_experts: int, *, lowest: int = 1) -> None:
    if not lowest <= k <= n_experts:
        raise ValueError(f"{name} = {k} is outside [{lowest}, {n_experts}] (n_experts = {n_experts})")


def check_bounds(*, floor: int, cap: int, n_experts: int, target_mean: float | None) -> None:
    """Floor and cap are experts per token; the target of a budget must lie between them."""
    check_k("cap", cap, n_experts)
    if not 0 <= floor <= cap:
        raise ValueError(f"floor = {floor} must lie in [0, cap = {cap}]")
    if target_mean is not None and not max(floor, 0) <= target_mean <= cap:
        raise ValueError(f"target_mean = {target_mean} experts per token is out of reach: floor = {floor}, cap = {cap}")

"""Expert choice: in training each expert takes the tokens that score highest for it (Zhou et al., arXiv 2202.09368).
Perfectly balanced by construction.

Whether a token gets an expert then depends on later tokens of the batch: the training loss is not one of a language
model, and a text that is generated has no later tokens. Outside training every token takes its k best experts instead.

Legend: T tokens, E experts, C tokens per expert, K slots per token.
"""

import dataclasses
from typing import ClassVar

import torch

from routing.policy import Policy, PolicyConfig, Scores, Slots, best


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertChoice(PolicyConfig):
    """Each expert takes the tokens that score highest for it; outside training tokens take their best experts.

    Attributes:
        k: mean experts per token; each expert takes C = round(k * T / E) tokens. Outside training every token takes as
            many experts, rounded.
    """

    needs_whole_batch: ClassVar[bool] = True

    k: float = 12.0

    @property
    def assumed_experts(self) -> float:
        return self.k

    @property
    def evaluated_experts(self) -> float:
        return max(1, round(self.k))

    def build(self, *, n_experts: int, d_model: int, layer_index: int) -> "ExpertChoicePolicy":
        return ExpertChoicePolicy(self, n_experts=n_experts)


class ExpertChoicePolicy(Policy):
    def __init__(self, config: ExpertChoice, *, n_experts: int) -> None:
        super().__init__(config)
        if not 0.0 < config.k <= n_experts:
            raise ValueError(f"ExpertChoice.k = {config.k} is outside (0, {n_experts}] (n_experts = {n_experts})")

    def select(self, scores: Scores) -> Slots:
        if not self.training:
            return Slots(*best(scores, max(1, round(self.config.k))))
        n_tokens, n_experts = scores.scores_TE.shape
        taken_CE = scores.selection_TE.topk(min(n_tokens, round(self.config.k * n_tokens / n_experts)), dim=0)[1]
        keep_TE = torch.zeros_like(scores.scores_TE, dtype=torch.bool).scatter_(0, taken_CE, True)
        expert_TE = torch.arange(n_experts, device=keep_TE.device).expand(n_tokens, n_experts)
        return Slots(expert_TE, scores.scores_TE, keep_TE)

"""Top-k: the same number of experts for every token (Shazeer et al., arXiv 1701.06538).

With softmax scores and `renormalise`, this equals top-k first and softmax over the chosen logits after it, because
softmax of a subset is the renormalised softmax of the whole. With sigmoid scores and a selection bias it is
DeepSeek-V3's router (arXiv 2412.19437), whose groups of experts, each on one device, limit how many devices a token
visits: a group's score is the sum of its two best.

Legend: T tokens, E experts, G groups, K slots per token.
"""

import dataclasses

import torch
from torch import Tensor

from routing.policy import FusedRule, Policy, PolicyConfig, Scores, Slots, best, check_k


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK(PolicyConfig):
    """The same number of experts for every token.

    Attributes:
        k: experts per token.
        n_groups: groups of consecutive experts.
        top_groups: groups that a token's experts come from, its best ones; all of them: no limit.
    """

    k: int = 12
    n_groups: int = 1
    top_groups: int = 1

    @property
    def assumed_experts(self) -> float:
        return self.k

    @property
    def fixed_experts(self) -> int:
        return self.k

    @property
    def varies_by_token(self) -> bool:
        return False

    @property
    def fused_rule(self) -> FusedRule | None:
        # The kernel ranks all experts together.
        return FusedRule("top_k", self.k) if self.top_groups == self.n_groups else None

    def of_number(self, k: int) -> "TopK":
        return dataclasses.replace(self, k=k)

    def build(self, *, n_experts: int, d_model: int, layer_index: int) -> "TopKPolicy":
        return TopKPolicy(self, n_experts=n_experts)


class TopKPolicy(Policy):
    def __init__(self, config: TopK, *, n_experts: int) -> None:
        super().__init__(config)
        check_k("TopK.k", config.k, n_experts)
        if config.n_groups < 1 or n_experts % config.n_groups:
            raise ValueError(f"TopK.n_groups = {config.n_groups} does not divide n_experts = {n_experts}")
        check_k("TopK.top_groups", config.top_groups, config.n_groups)
        check_k("TopK.k", config.k, n_experts // config.n_groups * config.top_groups)

    def select(self, scores: Scores) -> Slots:
        config = self.config
        if config.top_groups < config.n_groups:
            scores = dataclasses.replace(scores, selection_TE=self._within_groups(scores.selection_TE))
        return Slots(*best(scores, config.k))

    def _within_groups(self, selection_TE: Tensor) -> Tensor:
        """The selection scores, -inf outside each token's best groups."""
        grouped_TGE = selection_TE.unflatten(-1, (self.config.n_groups, -1))
        group_score_TG = grouped_TGE.topk(min(2, grouped_TGE.shape[-1]), dim=-1)[0].sum(dim=-1)
        chosen_TG = torch.zeros_like(group_score_TG, dtype=torch.bool)
        chosen_TG.scatter_(-1, group_score_TG.topk(self.config.top_groups, dim=-1)[1], True)
        return grouped_TGE.masked_fill(~chosen_TG[..., None], -torch.inf).flatten(-2)

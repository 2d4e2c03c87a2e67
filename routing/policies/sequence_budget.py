"""Sequence budget: the slots of a sequence compete with each other, so that its hard tokens get what its easy ones
leave (SeqTopK, Wen et al., arXiv 2511.06494), in a form that is causal.

The source takes the T k best of the T E scores of a sequence, which looks at later tokens; while it decodes it ranks a
token's scores among those kept of the tokens before. Here that is all there is, in training too: slot j of token t is
used if r_tj / t <= threshold, with r_tj the rank of its score among the slots of tokens 1 to t of its document. For
scores that come in no order the threshold is the number of experts; `BudgetController` moves it to hold the mean.
Ranks come from a histogram of -log(score), within a bin by the place between its edges, so that what decoding
remembers of a document, one number per bin, does not grow with it. The first token has itself alone to compete with,
and gets about k.

Legend: T tokens, K slots per token (the cap), N bins.
"""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from routing.budget import BudgetController
from routing.policy import Policy, PolicyConfig, Scores, Slots, best, check_bounds
from routing.sequences import followed

# Of -log(score): scores below e^-16 are alike.
BINS, WIDTH = 128, 0.125


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceBudget(PolicyConfig):
    """The experts whose score ranks high among those of the token's document so far.

    Attributes:
        target_mean: experts per token that the budget holds in the mean.
        floor: least experts per token.
        cap: most experts per token, and slots that it ranks.
        rate: of the controller, per step.
    """

    follows_sequences: ClassVar[bool] = True

    target_mean: float = 12.0
    floor: int = 1
    cap: int = 24
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

    def build(self, *, n_experts: int, d_model: int, layer_index: int) -> "SequenceBudgetPolicy":
        return SequenceBudgetPolicy(self, n_experts=n_experts)


class SequenceBudgetPolicy(Policy):
    def __init__(self, config: SequenceBudget, *, n_experts: int) -> None:
        super().__init__(config)
        check_bounds(floor=config.floor, cap=config.cap, n_experts=n_experts, target_mean=config.target_mean)
        # No level exceeds the slots of a token.
        self.budget = BudgetController(
            target_mean=config.target_mean,
            initial=config.target_mean,
            lowest=0.0,
            highest=config.cap + 1.0,
            rate=config.rate,
        )

    def remembered(self, scores: Scores, place_T: Tensor) -> Tensor:
        """How many slots of each token lie in each bin, [T, N]."""
        bin_TK = _bins(best(scores, self.config.cap)[1])[0]
        return torch.zeros(len(bin_TK), BINS, device=bin_TK.device).scatter_add_(
            1, bin_TK, torch.ones_like(bin_TK, dtype=torch.float32)
        )

    def select(self, scores: Scores) -> Slots:
        expert_TK, score_TK = best(scores, self.config.cap)
        past_TX = scores.past_TX if scores.past_TX is not None else followed(self, scores)[0].past_TX
        assert past_TX is not None
        count_TN, tokens_T1 = past_TX[:, :BINS], past_TX[:, BINS:]
        bin_TK, inside_TK = _bins(score_TK)
        above_TN = count_TN.cumsum(dim=1) - count_TN
        rank_TK = above_TN.gather(1, bin_TK) + inside_TK * count_TN.gather(1, bin_TK)
        level_TK = (rank_TK / tokens_T1).to(score_TK.dtype)
        level_TK[:, : self.config.floor] = -torch.inf
        return Slots(expert_TK, score_TK, self.within_budget(level_TK))


def _bins(score_TK: Tensor) -> tuple[Tensor, Tensor]:
    """The bin of each score, the highest scores' first, int64, and how far down it lies there, in [0, 1)."""
    score_TK = score_TK.detach()
    depth_TK = -score_TK.clamp_min(torch.finfo(score_TK.dtype).tiny).log() / WIDTH
    depth_TK = depth_TK.clamp(0.0, BINS - 2**-10)
    bin_TK = depth_TK.floor()
    return bin_TK.long(), depth_TK - bin_TK

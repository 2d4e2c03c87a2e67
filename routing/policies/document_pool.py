"""Document pool: the tokens of a document choose their experts from a pool that they share (EMO, arXiv 2605.06663).

A document then needs the weights of `pool` experts in memory, and not of all: what is saved is memory, and k stays. The
pool is the experts with the highest mean probability in the document, and tokens take the k best of it. The source
takes the mean over the whole document, also over what comes later, in training; here it is that of the tokens so far,
so that text is predicted as it is trained, and from `settle` tokens on it does not change any more. Its two other
parts, a balance loss over many documents and a pool whose size varies in training, are what the loss of
`RouterConfig.balance_coefficient`, which reads the loads of a whole step, and nothing here do.

Legend: T tokens, E experts, K slots per token.
"""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from routing.policy import Policy, PolicyConfig, Scores, Slots, best, check_k
from routing.sequences import followed


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentPool(PolicyConfig):
    """The same number of experts for every token, from a pool that the tokens of a document share.

    Attributes:
        k: experts per token.
        pool: experts that a document uses once it has settled; all, where there are no more. Where k exceeds it, the
            best others fill up.
        settle: tokens of a document by whose probabilities the pool is chosen.
    """

    follows_sequences: ClassVar[bool] = True

    k: int = 12
    pool: int = 32
    settle: int = 64

    @property
    def assumed_experts(self) -> float:
        return self.k

    @property
    def fixed_experts(self) -> int:
        return self.k

    @property
    def varies_by_token(self) -> bool:
        return False

    def of_number(self, k: int) -> "DocumentPool":
        return dataclasses.replace(self, k=k)

    def build(self, *, n_experts: int, d_model: int, layer_index: int) -> "DocumentPoolPolicy":
        return DocumentPoolPolicy(self, n_experts=n_experts)


class DocumentPoolPolicy(Policy):
    def __init__(self, config: DocumentPool, *, n_experts: int) -> None:
        super().__init__(config)
        check_k("DocumentPool.k", config.k, n_experts)
        for name in ("pool", "settle"):
            if getattr(config, name) < 1:
                raise ValueError(f"DocumentPool.{name} = {getattr(config, name)}; legal: 1 or more")

    def remembered(self, scores: Scores, place_T: Tensor) -> Tensor:
        """The probabilities of tokens that the pool is chosen by, [T, E]; of the others 0."""
        return scores.probs_TE * (place_T < self.config.settle)[:, None]

    def select(self, scores: Scores) -> Slots:
        past_TX = scores.past_TX if scores.past_TX is not None else followed(self, scores)[0].past_TX
        assert past_TX is not None
        selection_TE, n_experts = scores.selection_TE, scores.selection_TE.shape[1]
        pool_TP = past_TX[:, :n_experts].topk(min(self.config.pool, n_experts), dim=-1)[1]
        outside_TE = torch.ones_like(selection_TE, dtype=torch.bool).scatter(1, pool_TP, False)
        # Behind all of the token's pool, in their order.
        span_T1 = selection_TE.amax(dim=1, keepdim=True) - selection_TE.amin(dim=1, keepdim=True) + 1.0
        ranked = dataclasses.replace(scores, selection_TE=selection_TE - span_T1 * outside_TE)
        return Slots(*best(ranked, self.config.k))

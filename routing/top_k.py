"""Top-k: the same number of experts for every token (Shazeer et al., arXiv 1701.06538).

With softmax scores and `renormalise`, this equals top-k first and softmax over the chosen logits after it, because softmax of a subset is the
renormalised softmax of the whole. With sigmoid scores and a selection bias it is DeepSeek-V3's router (arXiv 2412.19437).
"""

import dataclasses

from routing.policy import Policy, Scores, Slots, best, check_k


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK:
    k: int = 12


class TopKPolicy(Policy):
    def __init__(self, config: TopK, *, n_experts: int, layer_index: int):
        super().__init__()
        check_k("TopK.k", config.k, n_experts)
        self.config = config

    def select(self, scores: Scores) -> Slots:
        return Slots(*best(scores, self.config.k))

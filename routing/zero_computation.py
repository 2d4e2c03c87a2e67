"""Zero-computation experts: null columns that return the token itself (LongCat-Flash, arXiv 2509.01322, eq. 1 and 2).

y_t = sum over the chosen real experts of weight_i E_i(x_t) + (sum of the chosen null columns' weights) x_t. Like null columns they make no rows.

LongCat moves the selection bias of each real expert i by mu (K_e / (K N) - T_i / (K T_all)), with K_e real experts wanted among K slots, N experts
and T_i of T_all tokens. Its mean over i holds the number of real experts: here, with the opposite sign, the bias common to the null columns, moved
by `BudgetController`. The rest balances the experts among themselves: here `RouterConfig.selection_bias_step`.

Legend: T tokens.
"""

import dataclasses

from routing.null_experts import NullExperts, NullExpertsPolicy
from routing.policy import Scores, Slots


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroComputationExperts(NullExperts):
    """As NullExperts, whose weights must be shared with the null columns: null_weighs = True."""

    floor: int = 0


class ZeroComputationPolicy(NullExpertsPolicy):
    def __init__(self, config: ZeroComputationExperts, *, n_experts: int, d_model: int, layer_index: int):
        if not config.null_weighs:
            raise ValueError("ZeroComputationExperts.null_weighs = False would leave the returned tokens without a weight")
        super().__init__(config, n_experts=n_experts, d_model=d_model, layer_index=layer_index)

    def select(self, scores: Scores) -> Slots:
        slots = super().select(scores)
        return slots._replace(identity_T=slots.rest_T)

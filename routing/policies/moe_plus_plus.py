"""Zero, copy and constant experts (MoE++, Jin et al., arXiv 2410.07348, eq. 3 to 5): null columns of three kinds
compete with the real experts for a token's slots.

A zero column adds nothing, a copy column the token itself, and a constant column a vector of its own mixed with the
token: a x_t + (1 - a) v_j, with (a, 1 - a) = softmax(x_t W_j). As null columns they take their share of the token's
weights and make no rows; the mean number of real experts is held by the bias common to all of them
(`routing/policies/null_experts.py`). Of the paper's two further parts, gates that see the layer below's and a balance
loss that weighs both kinds of columns, neither is here: the number is held exactly.

Legend: T tokens, D model width, Z null columns (zero ones first, then copies, then constants), C constant columns,
K slots per token.
"""

import dataclasses

import torch
from torch import Tensor, nn

from routing.policies.null_experts import NullExperts, NullExpertsPolicy
from routing.policy import Scores, Slots
from triton_kernels.native.decode_step import NativeBlock, NotInOneCall, Watch


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEPlusPlus(NullExperts):
    """Top-k over real experts and null columns of three kinds: zero, copy, constant.

    Attributes:
        k: slots that real and null columns compete for.
        n_null: null columns of all kinds.
        target_mean: real experts per token that are held in the mean, or None to leave the bias at zero.
        floor: real experts every token gets.
        null_weighs: must be True: null columns give what they compute by their share of the weights.
        start: of what chosen null columns weigh, see `NullExperts`.
        rate: of the controller, per step.
        apart: see `NullExperts`.
        n_copy: of n_null, columns that return the token.
        n_constant: of n_null, columns with a vector of their own; those that are neither add zero.
    """

    n_copy: int = 4
    n_constant: int = 4

    def build(self, *, n_experts: int, d_model: int, layer_index: int) -> "MoEPlusPlusPolicy":
        return MoEPlusPlusPolicy(self, n_experts=n_experts, d_model=d_model)


class MoEPlusPlusPolicy(NullExpertsPolicy):
    def __init__(self, config: MoEPlusPlus, *, n_experts: int, d_model: int) -> None:
        if not config.null_weighs:
            raise ValueError("MoEPlusPlus.null_weighs = False would leave what null columns compute without a weight")
        if min(config.n_copy, config.n_constant) < 0 or config.n_copy + config.n_constant > config.n_null:
            raise ValueError(
                f"MoEPlusPlus: n_copy = {config.n_copy} and n_constant = {config.n_constant} must be 0 or more and"
                f" together at most n_null = {config.n_null}"
            )
        super().__init__(config, n_experts=n_experts)
        # Zero: a constant column begins as half a copy, and its vector is learnt from the first step on.
        self.constant_CD = nn.Parameter(torch.zeros(config.n_constant, d_model))
        self.mix_CD = nn.Parameter(torch.zeros(config.n_constant, d_model))

    def describe(self, block: NativeBlock, watch: Watch) -> None:
        raise NotInOneCall("constant columns")

    def select(self, scores: Scores) -> Slots:
        slots = super().select(scores)
        config, weight_TZ = self.config, self._weights_of_null(scores, slots)
        first = config.n_null - config.n_constant
        copy_TZ, constant_TC = weight_TZ[:, first - config.n_copy : first], weight_TZ[:, first:]
        x_TD = scores.x_TD
        # The softmax of two logits of which only the difference counts.
        share_TC = (x_TD @ self.mix_CD.to(x_TD.dtype).mT).sigmoid()
        identity_T = copy_TZ.sum(dim=-1) + (constant_TC * share_TC).sum(dim=-1)
        constant_TD = (constant_TC * (1 - share_TC)) @ self.constant_CD.to(x_TD.dtype)
        return slots._replace(identity_T=identity_T, constant_TD=constant_TD)

    def _weights_of_null(self, scores: Scores, slots: Slots) -> Tensor:
        """weight_TZ: the score of each null column where it was chosen, 0 elsewhere; they add up to `slots.rest_T`."""
        assert scores.null_TZ is not None
        assert slots.keep_TK is not None
        null_TK, column_TK = scores.null_TZ.topk(min(self.config.k, self.config.n_null), dim=-1)
        n_null_T1 = self.config.k - slots.keep_TK.sum(dim=-1, keepdim=True)
        null_TK = null_TK * (torch.arange(null_TK.shape[1], device=null_TK.device) < n_null_T1)
        weight_TZ = torch.zeros_like(scores.null_TZ).scatter(1, column_TK, null_TK)
        return weight_TZ if self.gain is None else weight_TZ * self.gain()

"""Zero-computation experts: null columns that return the token itself (LongCat-Flash, arXiv 2509.01322, eq. 1 and 2).

y_t = sum over the chosen real experts of weight_i E_i(x_t) + (sum of the chosen null columns' weights) x_t. Like null
columns they make no rows.

LongCat moves the selection bias of each real expert i by mu (K_e / (K N) - T_i / (K T_all)) and never that of the null
columns, with K_e real experts wanted among K slots, N experts and T_i of T_all tokens. That is `bias_rate` = mu: it
holds the number of real experts and their balance at once. Without it the two are apart: the bias common to the null
columns, moved by `BudgetController`, holds the number exactly, and `RouterConfig.selection_bias_step` the balance.

Legend: T tokens, E experts, Z null columns, K slots per token.
"""

import dataclasses

import torch
from torch import Tensor

from routing.policies.null_experts import NullExperts, NullExpertsPolicy
from routing.policy import Scores, Slots
from triton_kernels.native.decode_step import NativeBlock, Watch


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroComputationExperts(NullExperts):
    """Top-k over real and null columns; a null column returns the token itself.

    Attributes:
        k: slots that real and null columns compete for.
        n_null: null columns.
        target_mean: real experts per token that are held in the mean, or None to leave the bias at zero.
        floor: real experts every token gets.
        null_weighs: must be True: it is the null columns' share of the weights that the token returns with.
        start: of what chosen null columns weigh, see `NullExperts`.
        rate: of the controller, per step.
        apart: see `NullExperts`.
        bias_rate: mu of LongCat's controller, which then replaces the budget's in training (leave selection_bias_step
            at 0); calibration stays.
        column_bias: every null column has a selection bias of its own, as those of real experts: published weights
            have them, and nothing here moves them.
    """

    floor: int = 0
    bias_rate: float = 0.0
    column_bias: bool = False

    @property
    def needs_shared_expert(self) -> bool:
        # A token without real experts is returned itself.
        return False

    def build(self, *, n_experts: int, d_model: int, layer_index: int) -> "ZeroComputationPolicy":
        return ZeroComputationPolicy(self, n_experts=n_experts)


class ZeroComputationPolicy(NullExpertsPolicy):
    column_bias_Z: Tensor

    def __init__(self, config: ZeroComputationExperts, *, n_experts: int) -> None:
        if not config.null_weighs:
            raise ValueError(
                "ZeroComputationExperts.null_weighs = False would leave the returned tokens without a weight"
            )
        if config.bias_rate < 0 or (config.bias_rate > 0 and config.target_mean is None):
            raise ValueError(
                f"ZeroComputationExperts.bias_rate = {config.bias_rate} must not be negative, and needs a target_mean"
                f" (is {config.target_mean})"
            )
        super().__init__(config, n_experts=n_experts)
        if config.column_bias:
            self.register_buffer("column_bias_Z", torch.zeros(config.n_null))
        if config.bias_rate > 0:
            # Two controllers of one number would fight.
            assert self.budget is not None
            self.budget.target_mean = None

    def selection_bias_change_E(self, rows_E: Tensor, n_tokens: Tensor) -> Tensor | None:
        config = self.config
        if config.bias_rate == 0:
            return None
        return config.bias_rate / config.k * (config.target_mean / rows_E.shape[0] - rows_E / n_tokens.clamp_min(1))

    def describe(self, block: NativeBlock, watch: Watch) -> None:
        super().describe(block, watch)
        block.returns = True
        if self.config.column_bias:
            block.column_bias = watch.buffer(self, "column_bias_Z", self.config.n_null)

    def rivals(self, null_TZ: Tensor, n_rivals: int) -> tuple[Tensor, Tensor]:
        if not self.config.column_bias:
            return super().rivals(null_TZ, n_rivals)
        rival_TK, column_TK = (null_TZ.detach() + self.column_bias_Z).topk(n_rivals, dim=-1)
        return null_TZ.gather(-1, column_TK), rival_TK

    def select(self, scores: Scores) -> Slots:
        slots = super().select(scores)
        return slots._replace(identity_T=slots.rest_T)

"""The router: scores in fp32, one exchangeable policy, and losses, statistics and budgets read from the assignments it
dispatches.

Legend: T tokens, D model width, E experts, Z null columns, K slots per token.
"""

import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routing.assignments import Assignments
from routing.diagnostics import RoutingStatistics, routing_statistics
from routing.difficulty_head import DifficultyHead, DifficultyHeadPolicy
from routing.expert_choice import ExpertChoice, ExpertChoicePolicy
from routing.losses import ThreeLevelBalance, switch_balance_loss, three_level_balance_loss, z_loss
from routing.null_experts import NullExperts, NullExpertsPolicy
from routing.policy import Policy, Scores, Slots
from routing.random_k import RandomK, RandomKPolicy
from routing.relu import ReLU, ReLUPolicy
from routing.selection_bias import updated_selection_bias
from routing.skipping import Skipping, SkippingPolicy
from routing.threshold import LearnedThreshold, LearnedThresholdPolicy, ScoreThreshold, ScoreThresholdPolicy
from routing.top_k import TopK, TopKPolicy
from routing.top_p import TopP, TopPPolicy
from routing.zero_computation import ZeroComputationExperts, ZeroComputationPolicy
from triton_kernels.experts.expert_slots import router_scores

PolicyConfig = (
    TopK
    | TopP
    | NullExperts
    | ZeroComputationExperts
    | RandomK
    | ReLU
    | ScoreThreshold
    | LearnedThreshold
    | DifficultyHead
    | Skipping
    | ExpertChoice
)
POLICIES: dict[type, Callable[..., Policy]] = {
    TopK: TopKPolicy,
    TopP: TopPPolicy,
    NullExperts: NullExpertsPolicy,
    ZeroComputationExperts: ZeroComputationPolicy,
    RandomK: RandomKPolicy,
    ReLU: ReLUPolicy,
    ScoreThreshold: ScoreThresholdPolicy,
    LearnedThreshold: LearnedThresholdPolicy,
    DifficultyHead: DifficultyHeadPolicy,
    Skipping: SkippingPolicy,
    ExpertChoice: ExpertChoicePolicy,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """score: softmax over experts or sigmoid of each. renormalise: a token's weights sum to one, however many experts
    it has. balance_coefficient, z_coefficient: of the Switch and z losses. selection_bias_step: step of balancing by
    bias, 0 for none. three_level_balance: a further balance loss over groups of experts, or None."""

    policy: PolicyConfig = dataclasses.field(default_factory=TopK)
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = True
    balance_coefficient: float = 1e-2
    z_coefficient: float = 1e-3
    selection_bias_step: float = 0.0
    three_level_balance: ThreeLevelBalance | None = None


@dataclasses.dataclass(frozen=True)
class Routing:
    """What the router decided. losses are scalars, already weighted; probs_TE is the softmax over real experts, fp32,
    differentiable. identity_T: what the token itself weighs beside its experts' outputs, or None."""

    assignments: Assignments
    probs_TE: Tensor
    losses: dict[str, Tensor]
    identity_T: Tensor | None = None

    @cached_property
    def statistics(self) -> RoutingStatistics:
        return routing_statistics(self.assignments, self.probs_TE)


class Router(nn.Module):
    """Scores the experts for each token and lets its policy choose.

    Null columns exist once a policy was NullExperts; other policies ignore them.
    """

    load_E: Tensor
    step_rows_E: Tensor
    step_tokens: Tensor
    selection_bias_E: Tensor

    def __init__(self, config: RouterConfig, *, d_model: int, n_experts: int, layer_index: int):
        super().__init__()
        if config.score not in ("softmax", "sigmoid"):
            raise ValueError(f"RouterConfig.score = {config.score!r} is not one of 'softmax', 'sigmoid'")
        self.config, self.d_model, self.n_experts, self.layer_index = config, d_model, n_experts, layer_index
        self.weight_ED = nn.Parameter(torch.empty(n_experts, d_model))
        self.null_weight_ZD: nn.Parameter | None = None
        # Rows per expert of the last step (in the checkpoint) and of the step under way (between checkpoints).
        self.register_buffer("load_E", torch.zeros(n_experts))
        self.register_buffer("step_rows_E", torch.zeros(n_experts), persistent=False)
        self.register_buffer("step_tokens", torch.zeros(()), persistent=False)
        self.register_buffer("selection_bias_E", torch.zeros(n_experts))
        self.set_policy(config.policy)
        self.init_weights(torch.Generator().manual_seed(layer_index))

    def init_weights(self, generator: torch.Generator) -> None:
        """Logits of standard deviation 1 on inputs of root mean square 1, at any width.

        Null columns have a generator of their own: what is drawn next must not depend on whether the method has any.
        """
        null_generator = torch.Generator(generator.device).manual_seed(generator.initial_seed() + 1)
        for weight, source in ((self.weight_ED, generator), (self.null_weight_ZD, null_generator)):
            if weight is not None:
                weight.data.copy_(
                    torch.randn(weight.shape, generator=source, device=source.device) * self.d_model**-0.5
                )
        self.load_E.zero_()
        self.selection_bias_E.zero_()
        # A policy's own parameters and buffers start from constants.
        self.set_policy(self.policy.config)

    def set_policy(self, policy: PolicyConfig) -> None:
        """Run the same weights under another policy. Its budget starts anew: calibrate or train it."""
        if type(policy) not in POLICIES:
            raise ValueError(
                f"{policy!r} is not a routing policy; known: {', '.join(kind.__name__ for kind in POLICIES)}"
            )
        module = POLICIES[type(policy)](
            policy, n_experts=self.n_experts, d_model=self.d_model, layer_index=self.layer_index
        )
        if isinstance(policy, NullExperts):
            if self.null_weight_ZD is None:
                # Until they are trained, null columns have logit zero: the budget's bias makes one bar of them.
                self.null_weight_ZD = nn.Parameter(
                    torch.zeros(policy.n_null, self.d_model, device=self.weight_ED.device)
                )
            elif policy.n_null != self.null_weight_ZD.shape[0]:
                raise ValueError(
                    f"NullExperts.n_null = {policy.n_null}, but this router has {self.null_weight_ZD.shape[0]} null"
                    " columns"
                )
        self.policy = module.to(self.weight_ED.device).train(self.training)

    def calibrate(self, target_mean: float) -> None:
        """The next forward sets the policy's threshold so that its own tokens use exactly `target_mean` experts on
        average (ties aside)."""
        if self.policy.budget is None:
            raise ValueError(
                f"{type(self.policy).__name__} of layer {self.layer_index} has a fixed number of experts: nothing to"
                " calibrate"
            )
        self.policy.budget.calibrate(target_mean)

    def forward(self, x_TD: Tensor) -> Routing:
        scores = self.scores(x_TD)
        slots, weight_TK = self.decide(scores)
        assignments = Assignments.from_slots(slots.expert_TK, weight_TK, slots.keep_TK, n_experts=self.n_experts)
        if self.training:
            self.step_rows_E += assignments.rows_per_expert_E()
            self.step_tokens += assignments.n_tokens
        losses = {
            "balance": self.config.balance_coefficient * switch_balance_loss(self.load_E, scores.probs_TE),
            "z": self.config.z_coefficient * z_loss(scores.logits_TE),
            **self.policy.losses(scores, self.load_E),
        }
        if self.config.three_level_balance is not None:
            losses["three_level_balance"] = three_level_balance_loss(
                self.config.three_level_balance, self.load_E, scores.probs_TE
            )
        identity_T = None if slots.identity_T is None else slots.identity_T / self._total_T1(slots)[:, 0]
        return Routing(assignments, scores.probs_TE, losses, identity_T)

    def decide(self, scores: Scores) -> tuple[Slots, Tensor]:
        """The policy's slots and their weight_TK; plain top-k on a GPU takes both from one kernel."""
        if not self.is_plain_top_k_on_gpu(scores):
            slots = self.policy.select(scores)
            return slots, self.weights(slots)
        # No threshold: a level of top-k is -inf.
        options = {
            "k": self.policy.config.k,
            "score": self.config.score,
            "renormalise": self.config.renormalise,
            "backend": "triton",
        }
        fused = router_scores(scores.logits_TE, self.selection_bias_E, scores.logits_TE.new_zeros(()), **options)
        return Slots(fused.expert_TK, fused.weight_TK), fused.weight_TK

    def is_plain_top_k_on_gpu(self, scores: Scores) -> bool:
        """fp32, top-k, no groups. The levels of other policies pass through Python on their way to a budget."""
        config, logits_TE = self.policy.config, scores.logits_TE
        return (
            logits_TE.is_cuda
            and logits_TE.dtype == torch.float32
            and isinstance(config, TopK)
            and config.top_groups == config.n_groups
        )

    def scores(self, x_TD: Tensor) -> Scores:
        """Logits and scores in fp32 (fp64 for fp64 inputs). Raises ValueError if any is NaN or infinite."""
        x_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
        use_null = self.null_weight_ZD is not None and isinstance(self.policy, NullExpertsPolicy)
        weight = (
            torch.cat([self.weight_ED, self.null_weight_ZD])
            if use_null and self.null_weight_ZD is not None
            else self.weight_ED
        )
        logits = F.linear(x_TD, weight.to(x_TD.dtype))
        self._refuse_non_finite(logits)
        logits_TE = logits[:, : self.n_experts]
        probs_TE = logits_TE.softmax(dim=-1)
        if self.config.score == "sigmoid":
            scores = logits.sigmoid()
        else:
            scores = logits.softmax(dim=-1) if use_null else probs_TE
        scores_TE = scores[:, : self.n_experts]
        return Scores(
            x_TD=x_TD,
            logits_TE=logits_TE,
            probs_TE=probs_TE,
            scores_TE=scores_TE,
            selection_TE=scores_TE.detach() + self.selection_bias_E.to(scores.dtype),
            null_TZ=scores[:, self.n_experts :] if use_null else None,
        )

    def weights(self, slots: Slots) -> Tensor:
        """weight_TK: the scores of the chosen, renormalised over them (null columns included, if the policy says
        so)."""
        return _kept_score_TK(slots) / self._total_T1(slots)

    def _total_T1(self, slots: Slots) -> Tensor:
        """What a token's scores are divided by."""
        score_TK = _kept_score_TK(slots)
        if not self.config.renormalise:
            return score_TK.new_ones(score_TK.shape[0], 1)
        total_T1 = score_TK.sum(dim=-1, keepdim=True)
        if slots.rest_T is not None:
            total_T1 = total_T1 + slots.rest_T[:, None]
        return total_T1.clamp_min(torch.finfo(score_TK.dtype).tiny)

    def begin_step(self, step: int, seed: int) -> None:
        """Before a training step of one or more forwards."""
        self.step_rows_E.zero_()
        self.step_tokens.zero_()
        if self.policy.budget is not None:
            self.policy.budget.begin_step()
        self.policy.begin_step(step, seed)

    @torch.no_grad()
    def after_step(self) -> None:
        """After the optimizer: load, selection bias and budget move by what the step's forwards dispatched. Without
        forwards nothing moves."""
        if self.config.selection_bias_step > 0:
            self.selection_bias_E.copy_(
                updated_selection_bias(self.selection_bias_E, self.step_rows_E, step=self.config.selection_bias_step)
            )
        change_E = self.policy.selection_bias_change_E(self.step_rows_E, self.step_tokens)
        if change_E is not None:
            self.selection_bias_E += torch.where(self.step_tokens > 0, change_E, 0.0)
        self.load_E.copy_(torch.where(self.step_rows_E.sum() > 0, self.step_rows_E, self.load_E))
        # NaN without tokens, which every comparison a policy makes answers with False.
        mean_experts = self.step_rows_E.sum() / self.step_tokens
        self.policy.after_step(mean_experts)
        if self.policy.budget is not None:
            self.policy.budget.after_step(mean_experts)
        self.step_rows_E.zero_()
        self.step_tokens.zero_()

    def _refuse_non_finite(self, logits: Tensor) -> None:
        finite = torch.isfinite(logits).all()
        if logits.device.type == "cuda":
            # The host must not wait here: the device itself stops the run.
            torch._assert_async(finite)  # pyright: ignore[reportPrivateImportUsage]
        elif not finite:
            raise ValueError(
                f"router of layer {self.layer_index}: scores are not finite (NaN or infinity in its input or its"
                " weights)"
            )


def _kept_score_TK(slots: Slots) -> Tensor:
    return slots.score_TK if slots.keep_TK is None else slots.score_TK * slots.keep_TK

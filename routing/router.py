"""The router: scores in fp32, one exchangeable policy, and losses, statistics and budgets read from the assignments it
dispatches.

Legend: T tokens, D model width, E experts, Z null columns, K slots per token.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from foundation.exact_buffers import ExactBuffers
from foundation.numbers import check_numbers
from routing.assignments import Assignments
from routing.diagnostics import RoutingStatistics, routing_statistics
from routing.losses import ThreeLevelBalance, switch_balance_loss, three_level_balance_loss, z_loss
from routing.policies import AnyPolicy
from routing.policies.top_k import TopK
from routing.policy import FusedRule, Policy, PolicyConfig, Scores, Slots, check_is_policy
from routing.selection_bias import updated_selection_bias
from routing.sequences import Sequences, followed
from triton_kernels.experts.expert_slots import router_scores
from triton_kernels.experts.native import routes_natively
from triton_kernels.native.projection import project

SCORES = ("softmax", "sigmoid")


class NonFiniteScoresError(ValueError):
    """A router's scores are NaN or infinite: its input or its weights are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How tokens choose their experts, and what keeps the experts' loads even.

    Attributes:
        policy: the rule that turns scores into experts, one of `routing/policies/`.
        score: softmax over experts or sigmoid of each.
        bias: added to the experts' logits, learnt; for a bias that selects and never weighs see `selection_bias_step`.
        renormalise: a token's weights sum to one, however many experts it has.
        renormalise_eps: added to the sum that they are divided by (LFM2, arXiv 2511.23404, has 1e-6).
        scaling: what all weights are multiplied by at last (arXiv 2412.19437).
        balance_coefficient: of the Switch loss.
        z_coefficient: of the z-loss.
        selection_bias_step: step of balancing by bias, 0 for none.
        three_level_balance: a further balance loss over groups of experts, or None.

    Raises:
        ValueError: for an unknown score, a policy that is none, or a number that is not finite or negative.
    """

    policy: AnyPolicy = dataclasses.field(default_factory=TopK)
    score: Literal["softmax", "sigmoid"] = "softmax"
    bias: bool = False
    renormalise: bool = True
    renormalise_eps: float = 0.0
    scaling: float = 1.0
    balance_coefficient: float = 1e-2
    z_coefficient: float = 1e-3
    selection_bias_step: float = 0.0
    three_level_balance: ThreeLevelBalance | None = None

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"RouterConfig.score = {self.score!r} is not one of {', '.join(map(repr, SCORES))}")
        check_is_policy(self.policy)
        check_numbers(self, renormalise_eps=0, balance_coefficient=0, z_coefficient=0, selection_bias_step=0)
        if not self.scaling > 0:
            raise ValueError(f"RouterConfig.scaling: {self.scaling}; legal: above 0")
        for part in (self.policy, self.three_level_balance):
            if part is not None:
                check_numbers(part)


@dataclasses.dataclass(frozen=True)
class Routing:
    """What the router decided.

    Attributes:
        assignments: which experts compute which tokens.
        probs_TE: softmax over real experts, at least fp32, differentiable.
        losses_of: what gives the losses: scalars by name, already weighted. Nobody asks for them while text is
            generated.
        identity_T: what the token itself weighs beside its experts' outputs, or None.
        constant_TD: what is added to its experts' outputs, or None.
        scores: what was decided on, for whoever decides again (`routing.levels`).
        sums_BX: of a policy that follows sequences, what their next tokens are to find in `Sequences.before_BX`.
    """

    assignments: Assignments
    probs_TE: Tensor
    losses_of: Callable[[], dict[str, Tensor]]
    identity_T: Tensor | None = None
    constant_TD: Tensor | None = None
    scores: Scores | None = None
    sums_BX: Tensor | None = None

    @cached_property
    def losses(self) -> dict[str, Tensor]:
        return self.losses_of()

    @cached_property
    def statistics(self) -> RoutingStatistics:
        return routing_statistics(self.assignments, self.probs_TE)


class Router(ExactBuffers):
    """Scores the experts for each token and lets its policy choose.

    Null columns exist once a policy had some; other policies ignore them. Construction draws nothing: `init_weights`
    does.

    Args:
        d_model: width of the tokens.
        n_experts: real experts.
        layer_index: what random draws and messages name the layer by.
        has_shared_expert: whether the layer around it gives every token something beside the router's experts. Alone,
            a router may leave a token with nothing.

    Raises:
        ValueError: for a policy that does not fit, see `set_policy`.
    """

    load_E: Tensor
    step_rows_E: Tensor
    step_tokens: Tensor
    selection_bias_E: Tensor
    policy: Policy

    def __init__(
        self,
        config: RouterConfig,
        *,
        d_model: int,
        n_experts: int,
        layer_index: int,
        has_shared_expert: bool = True,
    ) -> None:
        super().__init__()
        self.config, self.d_model, self.n_experts, self.layer_index = config, d_model, n_experts, layer_index
        self.has_shared_expert = has_shared_expert
        self.weight_ED = nn.Parameter(torch.empty(n_experts, d_model))
        self.bias_E = nn.Parameter(torch.zeros(n_experts)) if config.bias else None
        self.null_weight_ZD: nn.Parameter | None = None
        # Rows per expert of the last step (in the checkpoint) and of the step under way (between checkpoints).
        self.register_buffer("load_E", torch.zeros(n_experts))
        self.register_buffer("step_rows_E", torch.zeros(n_experts), persistent=False)
        self.register_buffer("step_tokens", torch.zeros(()), persistent=False)
        self.register_buffer("selection_bias_E", torch.zeros(n_experts))
        self.set_policy(config.policy)

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
        if self.bias_E is not None:
            nn.init.zeros_(self.bias_E)
        self.load_E.zero_()
        self.selection_bias_E.zero_()
        # A policy's own parameters and buffers start from constants.
        self.set_policy(self.policy.config)

    def set_policy(self, policy: PolicyConfig) -> None:
        """Run the same weights under another policy. Its budget starts anew: calibrate or train it.

        Raises:
            ValueError: for what is no policy, for a setting that makes no sense, for a policy that may leave a token
                with nothing in a layer without a shared expert, and for another number of null columns than there
                are. The router then stays as it is.
        """
        module = self.module_of(policy)
        if policy.null_columns and self.null_weight_ZD is None:
            # Until they are trained, null columns have logit zero: the budget's bias makes one bar of them.
            self.null_weight_ZD = nn.Parameter(
                torch.zeros(policy.null_columns, self.d_model, device=self.weight_ED.device)
            )
        self.policy = module.to(self.weight_ED.device).train(self.training)

    def module_of(self, policy: PolicyConfig) -> Policy:
        """The module that `set_policy` would install, or its refusal; the router stays as it is."""
        check_is_policy(policy)
        name = type(policy).__name__
        if policy.needs_shared_expert and not self.has_shared_expert:
            raise ValueError(
                f"{name}.floor = 0 needs a shared expert (MoEConfig.d_shared > 0): a token may be left without experts"
            )
        n_null = 0 if self.null_weight_ZD is None else self.null_weight_ZD.shape[0]
        if policy.null_columns and n_null and policy.null_columns != n_null:
            raise ValueError(f"{name}.n_null = {policy.null_columns}, but this router has {n_null} null columns")
        return policy.build(n_experts=self.n_experts, d_model=self.d_model, layer_index=self.layer_index)

    def calibrate(self, target_mean: float) -> None:
        """The next forward sets the policy's threshold so that its own tokens use exactly `target_mean` experts on
        average (ties aside).

        Raises:
            ValueError: for a policy without a threshold; the forward raises it for a mean out of reach.
        """
        if self.policy.budget is None:
            raise ValueError(
                f"{type(self.policy).__name__} of layer {self.layer_index} has a fixed number of experts: nothing to"
                " calibrate"
            )
        self.policy.budget.calibrate(target_mean)

    def forward(self, x_TD: Tensor, sequences: Sequences | None = None) -> Routing:
        """Routes the tokens x_TD [T, D] of any floating dtype, by default those of one sequence; in training their
        number and rows are counted. Autocast changes nothing: with rounded logits a token goes to other experts."""
        with torch.autocast(x_TD.device.type, enabled=False):
            return self._route(x_TD, sequences)

    def _route(self, x_TD: Tensor, sequences: Sequences | None) -> Routing:
        scores, sums_BX = self.scores(x_TD), None
        if self.policy.config.follows_sequences:
            scores, sums_BX = followed(self.policy, scores, sequences)
        slots, weight_TK = self.decide(scores)
        if self.config.scaling != 1.0:
            weight_TK = weight_TK * self.config.scaling
        assignments = Assignments.from_slots(slots.expert_TK, weight_TK, slots.keep_TK, n_experts=self.n_experts)
        if self.training:
            self.step_rows_E += assignments.rows_per_expert_E()
            self.step_tokens += assignments.n_tokens
        identity_T, constant_TD, scaling = slots.identity_T, slots.constant_TD, self.config.scaling
        identity_T = None if identity_T is None else identity_T / self._total_T1(slots)[:, 0] * scaling
        constant_TD = None if constant_TD is None else constant_TD * (scaling / self._total_T1(slots))
        losses_of = partial(self.losses, scores)
        return Routing(assignments, scores.probs_TE, losses_of, identity_T, constant_TD, scores, sums_BX)

    def losses(self, scores: Scores) -> dict[str, Tensor]:
        """`Routing.losses` of these scores."""
        losses = {
            "balance": self.config.balance_coefficient * switch_balance_loss(self.load_E, scores.probs_TE),
            "z": self.config.z_coefficient * z_loss(scores.logits_TE),
            **self.policy.losses(scores, self.load_E),
        }
        if (levels := self.config.three_level_balance) is not None:
            losses["three_level_balance"] = three_level_balance_loss(levels, self.load_E, scores.probs_TE)
        return losses

    def decide(self, scores: Scores) -> tuple[Slots, Tensor]:
        """The policy's slots and their weight_TK; one kernel gives both where the policy names a rule of it."""
        rule = self.policy.config.fused_rule
        if rule is None or not self.takes_the_kernel(scores):
            slots = self.policy.choose(scores)
            return slots, self.weights(slots)
        slots, level_TK = self._decide_fused(scores, rule)
        # A calibration takes its threshold from the kernel's own levels: those of `select` differ by rounding, which
        # would move the slots that lie at the threshold.
        if self.policy.budget is not None and self.policy.budget.observe(level_TK):
            slots, _ = self._decide_fused(scores, rule)
        return slots, slots.score_TK

    def takes_the_kernel(self, scores: Scores) -> bool:
        """Whether a decision that a kernel can take is left to it: in fp32, on CUDA or by the form in C on a CPU, and
        the number of experts is the policy's own."""
        logits_TE = scores.logits_TE
        here = logits_TE.is_cuda or routes_natively(logits_TE, len(logits_TE))
        plain = not self.config.renormalise_eps and not self.policy.told_by_token
        return here and plain and logits_TE.dtype == torch.float32

    def _decide_fused(self, scores: Scores, rule: FusedRule) -> tuple[Slots, Tensor]:
        """Slots whose score_TK are their weights already, and level_TK."""
        logits_TE, budget = scores.logits_TE, self.policy.budget
        fused = router_scores(
            logits_TE,
            self.selection_bias_E,
            # Without a budget there is no threshold: every level is -inf.
            logits_TE.new_zeros(()) if budget is None else budget.threshold,
            k=rule.k,
            rule=rule.rule,
            score=self.config.score,
            renormalise=self.config.renormalise,
            floor=rule.floor,
        )
        keep_TK = None if budget is None else fused.keep_TK
        return Slots(fused.expert_TK, fused.weight_TK, keep_TK), fused.level_TK

    def scores(self, x_TD: Tensor) -> Scores:
        """Logits and scores in fp32 (fp64 for fp64 inputs).

        Raises:
            NonFiniteScoresError: if any is NaN or infinite, or what they are compared with is NaN. On a GPU, where
                asking would make the host wait, an assertion on the device stops the run instead.
        """
        x_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
        null_weight_ZD = self.own_null_weight_ZD
        weight = self.weight_ED if null_weight_ZD is None else torch.cat([self.weight_ED, null_weight_ZD])
        logits = project(x_TD, weight)
        if self.bias_E is not None:
            # Null columns have none.
            logits = logits + functional.pad(self.bias_E, (0, logits.shape[1] - self.n_experts))
        self._refuse_non_finite(logits)
        return self.scores_of(x_TD, logits)

    @property
    def own_null_weight_ZD(self) -> Tensor | None:
        # Columns that another policy left here are none of this one's business.
        return self.null_weight_ZD if self.policy.config.null_columns else None

    def scores_of(self, x_TD: Tensor, logits: Tensor) -> Scores:
        """What follows from the logits of all columns."""
        use_null = logits.shape[1] > self.n_experts
        logits_TE = logits[:, : self.n_experts]
        probs_TE = logits_TE.softmax(dim=-1)
        if self.config.score == "sigmoid":
            scores = logits.sigmoid()
        elif use_null and self.policy.config.null_columns_apart:
            scores = (logits - logits_TE.logsumexp(dim=-1, keepdim=True)).exp()
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
        return slots.kept_score_TK / self._total_T1(slots)

    def _total_T1(self, slots: Slots) -> Tensor:
        """What a token's scores are divided by."""
        score_TK = slots.kept_score_TK
        if not self.config.renormalise:
            return score_TK.new_ones(score_TK.shape[0], 1)
        total_T1 = score_TK.sum(dim=-1, keepdim=True)
        if slots.rest_T is not None:
            total_T1 = total_T1 + slots.rest_T[:, None]
        return (total_T1 + self.config.renormalise_eps).clamp_min(torch.finfo(score_TK.dtype).tiny)

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
        # NaN without tokens: every comparison says False.
        mean_experts = self.step_rows_E.sum() / self.step_tokens
        self.policy.after_step(mean_experts)
        if self.policy.budget is not None:
            self.policy.budget.after_step(mean_experts)
        self.step_rows_E.zero_()
        self.step_tokens.zero_()

    def _refuse_non_finite(self, logits: Tensor) -> None:
        # Thresholds, biases, bars and slopes: compared with a NaN, every slot would look as good as another.
        limits = [
            x
            for x in (self.selection_bias_E, *self.policy.parameters(), *self.policy.buffers())
            if x.is_floating_point()
        ]
        if logits.device.type == "cuda":
            finite = torch.isfinite(logits).all()
            for limit in limits:
                finite = finite & ~limit.isnan().any()
            # The host must not wait here: the device itself stops the run.
            torch._assert_async(finite)  # pyright: ignore[reportPrivateImportUsage]
        # The sum of finite numbers is finite, NaN and infinity stay in it, and it is one operator.
        elif not math.isfinite(float(logits.detach().sum())) or any(limit.isnan().any() for limit in limits):
            raise self.non_finite()

    def non_finite(self) -> NonFiniteScoresError:
        """The error for scores of which nothing can be chosen, naming the layer."""
        return NonFiniteScoresError(
            f"router of layer {self.layer_index}: scores are not finite (NaN or infinity in its input, its"
            " weights, its biases or its thresholds)"
        )

"""What a routing policy is: a config that owns its facts, and the module it builds, which turns one token's scores into
its set of experts.

Legend: T tokens, D model width, E experts, Z null columns, K slots per token.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from foundation.serialize import Family, kinds
from routing.budget import BudgetController
from triton_kernels.experts.expert_slots import RULES
from triton_kernels.native.decode_step import NativeBlock, NotInOneCall, Watch


class FusedRule(NamedTuple):
    """The arguments with which `triton_kernels.experts.expert_slots.router_scores` takes a policy's decision.

    Attributes:
        rule: what a slot's level is: "top_k", "top_p" or "threshold".
        k: slots per token.
        floor: slots that are used whatever their level.
    """

    rule: str
    k: int
    floor: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig(Family):
    """Base of all policies' configs: what the rest of the code asks a policy, so that nobody asks for its class.

    A new policy is one file in `routing/policies/`: a frozen dataclass derived from this one, which answers what its
    defaults get wrong and says in the first line of its docstring what it is, and the `Policy` that it builds.
    """

    # Whether a decision depends on the other tokens of a batch: such a policy cannot generate text, nor decide for a
    # part of the batch.
    needs_whole_batch: ClassVar[bool] = False
    # Whether training moves it by statistics of a step's tokens that `routing.over_processes` does not know: it trains
    # in one process.
    own_statistics: ClassVar[bool] = False
    # Whether it decides by what came before in a token's document, see `routing.sequences`.
    follows_sequences: ClassVar[bool] = False

    @property
    def held_mean(self) -> float | None:
        """Experts per token that a budget holds in the mean and calibration restores; None without such a target."""
        return None

    @property
    def assumed_experts(self) -> float:
        """Real experts per token in the mean that estimates assume before anything has run."""
        raise NotImplementedError

    @property
    def fixed_experts(self) -> int | None:
        """The number of experts of every token, in training and at inference alike; None where there is no such one."""
        return None

    @property
    def evaluated_experts(self) -> float | None:
        """Experts per token, in the mean outside training, that the policy asks for; None where its threshold alone
        decides."""
        return self.held_mean if self.fixed_experts is None else self.fixed_experts

    @property
    def varies_by_token(self) -> bool:
        """Whether two tokens of a batch may have different numbers of experts."""
        return True

    @property
    def needs_shared_expert(self) -> bool:
        """Whether a token may be left with nothing at all unless the layer has an expert that all tokens share.

        Such a token would leave the layer as zero, and its router without a gradient.
        """
        return False

    @property
    def null_columns(self) -> int:
        """Columns of the router beside those of the real experts, each with weights of its own."""
        return 0

    @property
    def null_columns_apart(self) -> bool:
        """Whether the softmax of the real experts is as if there were no null columns, which are measured by it."""
        return False

    @property
    def fused_rule(self) -> FusedRule | None:
        """How the fused kernel takes this policy's decision; None if it cannot.

        On a GPU the kernel then stands for `Policy.select`, so a policy derived from another one that decides
        differently must say so here.
        """
        return None

    def of_number(self, k: int) -> "PolicyConfig | None":
        """The same policy with another number of experts, the same for every token; None: plain top-k stands in."""
        return None

    def build(self, *, n_experts: int, d_model: int, layer_index: int) -> "Policy":
        """The module of one layer.

        Raises:
            ValueError: for a setting that makes no sense, alone or for so many experts.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """What the router knows about each token, all in at least fp32.

    Attributes:
        x_TD: the router's input.
        logits_TE: of the real experts.
        probs_TE: softmax of logits_TE: what balance losses and probability-mass policies read, whatever the score
            function.
        scores_TE: what an expert weighs before renormalisation: softmax (over null columns too where there are any that
            do not stand apart) or sigmoid.
        selection_TE: detached; scores plus the selection bias: what ranks experts, and never weighs them.
        null_TZ: scores of the null columns, or None.
        past_TX: of a policy that follows sequences, the sum of what it remembers of each token's document so far, the
            token itself included, and behind it their number; None: all tokens are one sequence.
    """

    x_TD: Tensor
    logits_TE: Tensor
    probs_TE: Tensor
    scores_TE: Tensor
    selection_TE: Tensor
    null_TZ: Tensor | None = None
    past_TX: Tensor | None = None

    @property
    def centred_TE(self) -> Tensor:
        """Log-probabilities: the logits without what those of a token have in common, which no softmax sees."""
        return self.logits_TE - self.logits_TE.logsumexp(dim=-1, keepdim=True)

    def of_token(self, token: int) -> "Scores":
        """The same for one token, as a batch of it."""
        one = slice(token, token + 1)
        return Scores(
            x_TD=self.x_TD[one],
            logits_TE=self.logits_TE[one],
            probs_TE=self.probs_TE[one],
            scores_TE=self.scores_TE[one],
            selection_TE=self.selection_TE[one],
            null_TZ=None if self.null_TZ is None else self.null_TZ[one],
            past_TX=None if self.past_TX is None else self.past_TX[one],
        )


class Slots(NamedTuple):
    """A policy's decision, best expert first.

    Attributes:
        expert_TK: int64.
        score_TK: what each expert weighs before renormalisation, differentiable.
        keep_TK: bool, or None if every slot is used.
        rest_T: score of chosen columns that compute nothing but take their share of the weight, or None.
        identity_T: the part of rest_T whose columns return the token itself, or None.
        constant_TD: what chosen columns give beside rows and the token, before renormalisation, or None.
    """

    expert_TK: Tensor
    score_TK: Tensor
    keep_TK: Tensor | None = None
    rest_T: Tensor | None = None
    identity_T: Tensor | None = None
    constant_TD: Tensor | None = None

    @property
    def kept_score_TK(self) -> Tensor:
        """score_TK, zero where the slot is not used."""
        return self.score_TK if self.keep_TK is None else self.score_TK * self.keep_TK


class Policy(nn.Module):
    """Base of all policies' modules.

    Attributes:
        config: what it was built from.
        budget: the threshold of a policy that compares levels with one; None for the others.
        counts_T: int64 [T] or None. Where it is set, token t gets its counts_T[t] best experts, whatever the policy
            would have given it. A study's counterfactual; one batch long, so never in a checkpoint.
    """

    config: Any
    budget: BudgetController | None
    counts_T: Tensor | None

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config, self.budget, self.counts_T = config, None, None

    @property
    def asked_experts(self) -> float | None:
        """Experts per token, in the mean, that the policy was told to use; None where its threshold alone decides."""
        return self.config.evaluated_experts

    @property
    def told_by_token(self) -> bool:
        """Whether numbers of experts, or thresholds, of single tokens come from outside."""
        return self.counts_T is not None or (self.budget is not None and self.budget.threshold_T1 is not None)

    @property
    def is_told(self) -> bool:
        """Whether numbers of experts come from outside, or the threshold is none yet or not one for all."""
        return self.told_by_token or (self.budget is not None and self.budget.calibrates)

    @property
    def decides_alone(self) -> bool:
        """Whether a token's experts now depend on nothing but the token itself."""
        config = self.config
        return not (self.training or self.is_told or config.needs_whole_batch or config.follows_sequences)

    def choose(self, scores: Scores) -> Slots:
        """The experts of each token, as many as `counts_T` says where it is set: what the router calls.

        Raises:
            ValueError: for a number of experts beyond the policy's slots.
        """
        slots = self.select(scores)
        if self.counts_T is None:
            return slots
        n_slots = slots.expert_TK.shape[1]
        if (most := int(self.counts_T.max())) > n_slots:
            raise ValueError(f"{most} experts for a token: {type(self.config).__name__} fills at most {n_slots} slots")
        # A policy that keeps all its slots knows nothing of how many.
        return slots._replace(keep_TK=self.counted(slots.expert_TK)) if slots.keep_TK is None else slots

    def select(self, scores: Scores) -> Slots:
        """Choose the experts of each token."""
        raise NotImplementedError

    def remembered(self, scores: Scores, place_T: Tensor) -> Tensor:
        """What each token adds to its document's sum, [T, X], of a policy that follows sequences.

        Args:
            place_T: how many tokens of its document came before each, int64.
        """
        raise NotImplementedError

    def describe(self, block: NativeBlock, watch: Watch) -> None:
        """Fills in how the policy decides in a decode step that is one call of C. As with `PolicyConfig.fused_rule`, a
        policy derived from another one that decides differently must say so here.

        Raises:
            NotInOneCall: where it decides by more than scores, a bias and a threshold; the step then asks its router.
        """
        rule = self.config.fused_rule
        own = {*self.parameters(), *self.buffers()} - set([] if self.budget is None else self.budget.buffers())
        if rule is None or self.config.null_columns or own:
            raise NotInOneCall(type(self).__name__)
        block.rule, block.slots, block.floor = RULES.index(rule.rule), rule.k, rule.floor

    def counted(self, level_TK: Tensor) -> Tensor:
        """The slots that `counts_T` asks for, bool [T, K]."""
        assert self.counts_T is not None
        return torch.arange(level_TK.shape[1], device=level_TK.device) < self.counts_T[:, None]

    def within_budget(self, level_TK: Tensor) -> Tensor:
        """Which slots are used, bool [T, K]: those whose level is at or below the budget's threshold, or, where it is
        set, as many as `counts_T` says."""
        if self.counts_T is not None:
            return self.counted(level_TK)
        assert self.budget is not None
        return self.budget.keep(level_TK)

    def losses(self, scores: Scores, load_E: Tensor) -> dict[str, Tensor]:
        """Losses of the policy's own, already weighted; none by default.

        Args:
            load_E: rows per expert of the last step.
        """
        return {}

    def begin_step(self, step: int, seed: int) -> None:
        """Called before a training step; what random draws depend on."""

    def selection_bias_change_E(self, rows_E: Tensor, n_tokens: Tensor) -> Tensor | None:
        """What the policy adds to the router's selection bias after a step in which n_tokens made rows_E; None by
        default."""
        return None

    def after_step(self, mean_experts: Tensor) -> None:
        """Called after a training step that routed tokens.

        Args:
            mean_experts: dispatched rows per token, a scalar on the device.
        """


class Gain(nn.Module):
    """A learned factor g >= 0 by which what a policy adds weighs in a trunk that was trained without it.

    Its root is what is learned: it passes through zero without getting stuck there, and a gradient reaches it at any
    start but zero itself.

    Args:
        start: g before any training.

    Raises:
        ValueError: for a start outside (0, 1).
    """

    def __init__(self, start: float) -> None:
        super().__init__()
        if not 0.0 < start < 1.0:
            raise ValueError(f"start = {start} is outside (0, 1]; 1 is without a gain")
        # Of one dimension, as optimizers expect it.
        self.root_1 = nn.Parameter(torch.tensor([start**0.5]))

    def forward(self) -> Tensor:
        return self.root_1.square()


def gain_from(start: float) -> Gain | None:
    """What a policy's config asks for by `start`; None where what it adds weighs as it is."""
    return None if start == 1.0 else Gain(start)


def best(scores: Scores, k: int) -> tuple[Tensor, Tensor]:
    """The k experts of highest selection score, best first, and the scores they weigh: (expert_TK, score_TK)."""
    expert_TK = torch.topk(scores.selection_TE, k, dim=-1)[1]
    return expert_TK, scores.scores_TE.gather(-1, expert_TK)


def check_is_policy(policy: object) -> None:
    """Refuses what is no routing policy's config by a ValueError that names the policies."""
    if not isinstance(policy, PolicyConfig):
        raise ValueError(f"{policy!r} is not a routing policy; known: {', '.join(kinds(PolicyConfig))}")


def check_k(name: str, k: int, n_experts: int, *, lowest: int = 1) -> None:
    """Refuses a number of experts, named `name`, that is outside [lowest, n_experts] by a ValueError."""
    if not lowest <= k <= n_experts:
        raise ValueError(f"{name} = {k} is outside [{lowest}, {n_experts}] (n_experts = {n_experts})")


def check_bounds(*, floor: int, cap: int, n_experts: int, target_mean: float | None) -> None:
    """Refuses floors, caps (experts per token) and a target of the mean that do not fit together by a ValueError."""
    check_k("cap", cap, n_experts)
    if not 0 <= floor <= cap:
        raise ValueError(f"floor = {floor} must lie in [0, cap = {cap}]")
    if target_mean is not None and not max(floor, 0) <= target_mean <= cap:
        raise ValueError(f"target_mean = {target_mean} experts per token is out of reach: floor = {floor}, cap = {cap}")

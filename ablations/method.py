"""What a method is: a name, a question, and one change to the configuration of the baseline's model."""

import dataclasses
from collections.abc import Callable
from typing import Literal

from lm.config import ModelConfig
from routing.policy import PolicyConfig
from staged_training.boundary import different_blocks

# Kinds that leave the model as it is: they measure noise, earn no verdict and are no method whose price counts.
CONTROLS = ("seed", "rounding")
# What a method's own part in the weights is multiplied by at the fork, null columns' scores for one, see
# `routing.policy.Gain`: so little that the trunk's function is kept, and enough that a gradient reaches it.
START = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One thing to compare with the baseline.

    Attributes:
        name: of the file it lives in, without `.py`.
        question: what the comparison will answer, in one sentence that ends with a question mark.
        change: from the baseline's model to the method's; below a frozen boundary the trunk's layers stay, whatever it
            returns.
        seed_shift: added to every branch seed; not zero only where the point is to see other seeds.
        rounding: its branches start from weights that differ by rounding, see `staged_training.fork`.
        length: how many times as many tokens as the others' its branches train on; more than once only in a control
            that is known to be better for it.
        known: how it is known to come out. Such a control asks nothing of the method: it shows what a run can see.
    """

    name: str
    question: str
    change: Callable[[ModelConfig], ModelConfig]
    seed_shift: int = 0
    rounding: bool = False
    length: int = 1
    known: Literal["worse", "better"] | None = None

    @property
    def is_control(self) -> bool:
        """Whether it measures noise, or whether a run sees what is known, instead of answering a question about a
        model."""
        return bool(self.rounding or self.seed_shift or self.known)

    def kind(self, baseline: ModelConfig) -> str:
        """What the method changes.

        Args:
            baseline: the model that it changes, which is also the trunk's.

        Returns:
            "architecture" where a block cannot take the trunk's weights (another letter or another shape of a weight,
            by the definition of `staged_training.boundary`, which then makes the blocks above the boundary fresh in
            every branch), "attention" for another configuration of the same kinds, "routing" for any other change of
            the model, "tokens" where it trains longer, one of `CONTROLS`, or "nothing".
        """
        changed = self.change(baseline)
        if different_blocks(baseline, changed):
            return "architecture"
        if changed.attentions != baseline.attentions:
            return "attention"
        # Written otherwise is not yet changed: of a pattern that is longer than the model its head is left.
        if _resolved(changed) != _resolved(baseline):
            return "routing"
        if self.rounding:
            return "rounding"
        if self.length > 1:
            return "tokens"
        return "seed" if self.seed_shift else "nothing"

    def has_budget(self, baseline: ModelConfig) -> bool:
        """Whether the number of experts depends on the token and is held in the mean."""
        return self.change(baseline).moe.router.policy.held_mean is not None


def _resolved(config: ModelConfig) -> ModelConfig:
    """The one way to write a model down, block by block."""
    return config.with_blocks([config.block(layer) for layer in range(config.n_layers)])


def with_policy(config: ModelConfig, policy: PolicyConfig) -> ModelConfig:
    """The model with another routing policy in every layer; a branch keeps the trunk's below its boundary."""
    router = dataclasses.replace(config.moe.router, policy=policy)
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, router=router))


def with_plan(config: ModelConfig, layer_plan: str) -> ModelConfig:
    """The model with another layer plan, repeated to its depth, see `attention.plan`."""
    return dataclasses.replace(config, layer_plan=layer_plan)


def experts_of(config: ModelConfig) -> int:
    """The baseline's experts per token, which every routing method holds in the mean.

    Raises:
        ValueError: where the baseline's policy has no such number: it is not a plain top-k.
    """
    policy = config.moe.router.policy
    if policy.fixed_experts is None:
        raise ValueError(f"methods change a baseline of plain top-k routing, this one's policy is {policy!r}")
    return policy.fixed_experts

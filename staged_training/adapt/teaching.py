"""What the stage teaches, and what each of its steps trains and holds."""

import dataclasses
from typing import Literal

from foundation.numbers import check_numbers
from lm.budget import CALIBRATION_TOKENS
from lm.model import LanguageModel
from routing.budget import BudgetController
from staged_training.adapt.model import AdaptMethod, trained_names
from staged_training.schedule import Schedule, Stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teaching:
    """What is taught, and how.

    Attributes:
        method: how the number of experts varies: "zero_experts" (null columns), "top_p", "threshold" (one bar on the
            probability), "difficulty" (a head predicts the number), "random_k" (any fixed number afterwards).
        mean: real experts per token in the mean; a whole number for random_k.
        tokens: of the stage.
        batch_size: rows of a batch.
        seq_len: tokens of a row.
        learning_rate: its peak, behind the warm-up.
        warmup_share: share of the steps that warm up.
        decay_share: share of the steps, the last ones, in which the rate decays to zero.
        router_share: share of the steps, the first ones, that train routers alone, with what their policies add.
        then: what the steps behind them train: "experts" with their routers, "everything", or "routers" only.
        ramp_share: share of the steps over which the budget falls from the original's k to the mean.
        distill_share: share of the original's distribution in the loss, the rest being the text's own tokens.
        temperature: of the distributions that are compared.
        calibration_tokens: of the training text, that no step sees, to set budgets on; at most a twentieth of it.
        first_batch: position in the sequence of batches that the stage begins at: behind what the original was
            trained on, if that was in the order of the same seed.
        seed: order of the batches, routers' draws.

    Raises:
        ValueError: for a number outside its range.
    """

    method: AdaptMethod = "zero_experts"
    mean: float = 6.0
    tokens: int = 400_000
    batch_size: int = 8
    seq_len: int = 256
    learning_rate: float = 1e-3
    warmup_share: float = 0.05
    decay_share: float = 0.6
    router_share: float = 0.2
    then: Literal["experts", "everything", "routers"] = "experts"
    ramp_share: float = 0.3
    distill_share: float = 0.5
    temperature: float = 1.0
    calibration_tokens: int = CALIBRATION_TOKENS
    first_batch: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, mean=0, tokens=1, batch_size=1, seq_len=1, calibration_tokens=1, first_batch=0, seed=0)
        for name in ("warmup_share", "decay_share", "router_share", "ramp_share", "distill_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Teaching.{name}: {getattr(self, name)}, must be a share, from 0 to 1")
        if self.warmup_share + self.decay_share > 1:
            raise ValueError(
                f"Teaching.decay_share: {self.decay_share}, warm-up ({self.warmup_share}) and decay share the steps"
            )
        for name in ("learning_rate", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Teaching.{name}: {getattr(self, name)}, must be above 0")

    @property
    def n_steps(self) -> int:
        """Updates of the stage.

        Raises:
            ValueError: where the tokens are not one batch.
        """
        n_steps = self.tokens // (self.batch_size * self.seq_len)
        if n_steps < 1:
            raise ValueError(
                f"Teaching.tokens: {self.tokens}, a batch has {self.batch_size} x {self.seq_len}; legal: one at least"
            )
        return n_steps

    @property
    def stage(self) -> Stage:
        """Length and schedule."""
        n_steps = self.n_steps
        warmup = round(n_steps * self.warmup_share)
        decay = min(round(n_steps * self.decay_share), n_steps - warmup)
        return Stage(
            n_batches=n_steps, schedule=Schedule(peak=self.learning_rate, warmup_steps=warmup, decay_steps=decay)
        )

    @property
    def router_steps(self) -> int:
        """Steps that train routers alone."""
        return self.n_steps if self.then == "routers" else round(self.n_steps * self.router_share)

    @property
    def ramp_steps(self) -> int:
        """Steps over which the budget falls."""
        return round(self.n_steps * self.ramp_share)

    def mean_at(self, step: int, k: int) -> float:
        """The budget of a step, from 0, of a model that used k experts."""
        return self.mean if step >= self.ramp_steps else k + (self.mean - k) * step / self.ramp_steps


def budgets_of(model: LanguageModel) -> list[BudgetController]:
    """Those that hold a mean."""
    policies = [router.policy for router in model.routers()]
    return [policy.budget for policy in policies if policy.budget is not None and policy.config.held_mean is not None]


class Phases:
    """What a step trains and which mean it holds, as functions of its number."""

    def __init__(self, model: LanguageModel, teach: Teaching, k: int) -> None:
        self.model, self.teach, self.k = model, teach, k
        self.routers, self.rest = trained_names(model, "routers"), trained_names(model, teach.then)
        self.budgets = budgets_of(model)

    def __call__(self, step: int) -> None:
        trained = self.routers if step < self.teach.router_steps else self.rest
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in trained)
        before, now = (self.teach.mean_at(max(each, 0), self.k) for each in (step - 1, step))
        for budget in self.budgets:
            budget.move_target(before, now)
            # A threshold that follows a falling budget by what the last steps needed would run past it: as long as it
            # falls, the step's own levels set it.
            budget.calibrate(now if step < self.teach.ramp_steps else None)

"""A run when its training is over, and what its `result.json` says unless the caller has something else to say."""

import dataclasses
from collections.abc import Callable
from typing import Any

from lm.accounting import model_cost
from lm.evaluate import WHOLE, Evaluation, Share
from lm.model import LanguageModel
from staged_training.data import Batches
from staged_training.loop import StageResult
from staged_training.plan import Plan
from staged_training.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A trunk or a branch when its training is over and saved.

    Attributes:
        run: which it is.
        plan: that it belongs to.
        model: trained; its frozen blocks are the trunk's.
        valid: batches of the whole validation text, for `boundary`; of several processes each has rows of its own.
        share: which rows of them this process has.
        evaluation: of the whole validation text.
        training: what the loop reports.
        mean_experts: per block, over training; below the boundary the trunk's.
    """

    run: Run
    plan: Plan
    model: LanguageModel
    valid: Batches
    evaluation: Evaluation
    training: StageResult
    mean_experts: tuple[float, ...]
    share: Share = WHOLE

    @property
    def boundary(self) -> int:
        """The first block that was trained."""
        return self.run.boundary


Summarise = Callable[[TrainedRun], dict[str, Any]]


def summarise(trained: TrainedRun) -> dict[str, Any]:
    """The `result.json` of a run, unless the caller of `run_plan` has something else to say."""
    cost = model_cost(trained.model.config, length=trained.plan.seq_len, mean_experts=trained.mean_experts)
    return {
        "method": trained.run.method,
        "trunk_seed": trained.plan.trunk_seed,
        "branch_seed": trained.run.branch_seed,
        "bits_per_byte": trained.evaluation.bits_per_byte,
        "valid_tokens": trained.evaluation.tokens,
        "valid_bytes": trained.evaluation.n_bytes,
        "mean_experts": trained.evaluation.mean_experts,
        "total_parameters": cost.total_parameters,
        "active_parameters": cost.active_parameters,
        "steps": trained.training.steps,
        "skipped_checkpoints": trained.training.skipped,
    }

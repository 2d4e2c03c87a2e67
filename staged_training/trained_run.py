"""A run when its training is over, and what its `result.json` says unless the caller has something else to say."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm.accounting import model_cost
from lm.evaluate import Evaluation
from lm.model import LanguageModel
from staged_training.data import Batches
from staged_training.loop import StageResult
from staged_training.plan import Branch, Plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A trunk or a branch when its training is over and saved.

    Attributes:
        branch: None for the trunk.
        model: trained; its frozen blocks are the trunk's.
        valid: batches of the whole validation text, for `boundary`.
        mean_experts: per block, over training; below the boundary the trunk's.
    """

    plan: Plan
    branch: Branch | None
    folder: Path
    model: LanguageModel
    valid: Batches
    evaluation: Evaluation
    training: StageResult
    mean_experts: tuple[float, ...]

    @property
    def boundary(self) -> int:
        return self.branch.boundary if self.branch is not None else 0


Summarise = Callable[[TrainedRun], dict[str, Any]]


def summarise(run: TrainedRun) -> dict[str, Any]:
    """The `result.json` of a run, unless the caller of `run_plan` has something else to say."""
    cost = model_cost(run.model.config, length=run.plan.seq_len, mean_experts=run.mean_experts)
    return {
        "method": run.branch.method if run.branch is not None else "trunk",
        "trunk_seed": run.plan.trunk_seed,
        "branch_seed": run.branch.seed if run.branch is not None else None,
        "bits_per_byte": run.evaluation.bits_per_byte,
        "valid_tokens": run.evaluation.tokens,
        "valid_bytes": run.evaluation.n_bytes,
        "mean_experts": run.evaluation.mean_experts,
        "total_parameters": cost.total_parameters,
        "active_parameters": cost.active_parameters,
        "steps": run.training.steps,
        "skipped_checkpoints": run.training.skipped,
    }

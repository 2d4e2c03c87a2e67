"""What a plan will take in time and memory, measured on a few of its own steps before it starts."""

import dataclasses
from collections.abc import Callable
from typing import Any

from foundation.environment import peak_memory
from foundation.timing import median_seconds
from lm.model import LanguageModel
from staged_training.data import prefix_activations
from staged_training.execute import Execution
from staged_training.fork import fork
from staged_training.optimizer import build_optimizer, update
from staged_training.record import RESULT
from staged_training.step import clipped_gradients


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds of what is left to run, by kind of work, and the peak memory of the process (of the GPU, where there is
    one) in bytes."""

    trunk: float
    caching: float
    branches: float
    evaluation: float
    peak_bytes: int

    @property
    def total(self) -> float:
        """Seconds."""
        return self.trunk + self.caching + self.branches + self.evaluation

    def __str__(self) -> str:
        parts = ", ".join(
            f"{name} {getattr(self, name):.0f} s" for name in ("trunk", "caching", "branches", "evaluation")
        )
        return (
            f"estimated time {self.total:.0f} s ({parts}), peak memory {self.peak_bytes / 2**30:.2f} GiB, measured on"
            " the first steps"
        )


def estimate(execution: Execution, *, steps: int = 2) -> Estimate:
    """Times `steps` steps of the trunk, of each method and of the frozen prefix on untrained weights, after one step to
    warm up.

    What is finished counts nothing, a stage under way counts whole. Nothing is written, and no state of the run is
    touched.
    """
    plan = execution.plan
    trunk_done = (execution.trunk_folder / RESULT).exists()
    pending = [branch for branch in plan.branches if not (execution.folder_of(branch) / RESULT).exists()]
    if trunk_done and not pending:
        return Estimate(trunk=0.0, caching=0.0, branches=0.0, evaluation=0.0, peak_bytes=peak_memory(execution.device))
    tokens_BT, targets_BT = execution.train_tokens[0]
    boundary, n_valid = plan.boundary, len(execution.valid_tokens)

    trunk = LanguageModel(plan.model).init_weights(plan.trunk_seed).to(execution.device)
    step_seconds = 0.0 if trunk_done else _training(trunk, execution, tokens_BT, targets_BT, 0, steps)
    trunk.requires_grad_(False).eval()
    prefix_seconds = (
        _typical(lambda: prefix_activations(trunk, tokens_BT, boundary), execution, steps)
        if boundary and pending
        else 0.0
    )
    x_BTD = prefix_activations(trunk, tokens_BT, boundary) if boundary else tokens_BT
    method_seconds = {}
    for branch in {branch.method: branch for branch in pending}.values():
        method_seconds[branch.method] = _training(fork(trunk, branch), execution, x_BTD, targets_BT, boundary, steps)

    cached = execution.config.cache and boundary > 0
    recomputed = 0.0 if cached else prefix_seconds
    n_cached = n_valid + max((branch.stage.n_batches for branch in pending), default=0)
    # A forward pass is a third of a step's products.
    evaluated = step_seconds / 3 + sum(method_seconds[branch.method] / 3 + recomputed for branch in pending)
    return Estimate(
        trunk=step_seconds * plan.trunk.n_batches,
        caching=prefix_seconds * n_cached if cached else 0.0,
        branches=sum((method_seconds[branch.method] + recomputed) * branch.stage.n_batches for branch in pending),
        evaluation=evaluated * n_valid,
        peak_bytes=peak_memory(execution.device),
    )


def _training(
    model: LanguageModel, execution: Execution, inputs: Any, targets_BT: Any, boundary: int, steps: int
) -> float:
    optimizer = build_optimizer(model, execution.plan.optimizer, boundary)
    model.train()

    def step() -> None:
        # The same draws in every step, so that all steps are as long.
        model.begin_step(0, 0)
        clipped_gradients(model, optimizer, inputs, targets_BT, boundary=boundary, clip=execution.plan.optimizer.clip)
        update(optimizer, 1e-5)
        model.after_step(boundary)

    return _typical(step, execution, steps)


def _typical(work: Callable[[], Any], execution: Execution, steps: int) -> float:
    """Median seconds; the first call, which also allocates and compiles, does not count."""
    return median_seconds(work, repeats=steps, warm_up=1, device=execution.device.type)

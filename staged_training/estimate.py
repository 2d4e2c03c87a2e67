"""What a plan will take in time and memory, measured on a few of its own steps before it starts."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from foundation.environment import peak_memory
from foundation.timing import median_seconds
from lm.evaluate import evaluate
from lm.model import LanguageModel
from staged_training.data import prefix_activations
from staged_training.execute import Execution
from staged_training.fork import fork
from staged_training.optimizer import build_optimizer, update
from staged_training.record import RESULT
from staged_training.step import clipped_gradients
from staged_training.validation import VALIDATED, looks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds of what is left to run, by kind of work, and the peak memory of the process (of the GPU, where there is
    one) in bytes. The trunk's evaluation is in the trunk's."""

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


def estimate(execution: Execution, *, steps: int = 3, jobs: int = 1) -> Estimate:
    """Times `steps` steps of the trunk, of each method and of the frozen prefix, and as many batches of their
    evaluation, on untrained weights, after one step to warm up.

    What is finished counts nothing, a stage under way counts whole. Nothing is written, and no state of the run is
    touched.

    Args:
        jobs: branches that run side by side and share the threads; the trunk has them all.
    """
    plan = execution.plan
    trunk_done = (execution.trunk_folder / RESULT).exists()
    pending = [branch for branch in plan.branches if not (execution.folder_of(branch) / RESULT).exists()]
    if trunk_done and not pending:
        return Estimate(trunk=0.0, caching=0.0, branches=0.0, evaluation=0.0, peak_bytes=peak_memory(execution.device))
    tokens_BT, targets_BT = execution.train_tokens[0]
    boundary, n_valid = plan.boundary, len(execution.valid_tokens)

    cached = execution.config.cache and boundary > 0
    trunk = LanguageModel(plan.model).init_weights(plan.trunk_seed).to(execution.device)
    trunk_seconds = 0.0
    if not trunk_done:
        trunk_seconds = _training(trunk, execution, tokens_BT, targets_BT, 0, steps) * plan.trunk.n_batches
        looked_at = n_valid + looks(plan.trunk.n_batches, execution.config.log_every) * VALIDATED
        trunk_seconds += _evaluating(trunk, execution, tokens_BT, targets_BT, 0, steps) * looked_at
    trunk.requires_grad_(False).eval()

    def prefix() -> float:
        if not boundary or not pending:
            return 0.0
        return _typical(trunk, lambda: prefix_activations(trunk, tokens_BT, boundary), execution, steps)

    caching = prefix() * (n_valid + max((branch.stage.n_batches for branch in pending), default=0)) if cached else 0.0
    x_BTD = prefix_activations(trunk, tokens_BT, boundary) if boundary else tokens_BT
    branches = evaluation = 0.0
    with _share_of_threads(jobs):
        recomputed = 0.0 if cached else prefix()
        for branch in {branch.method: branch for branch in pending}.values():
            model, same = fork(trunk, branch), [each for each in pending if each.method == branch.method]
            step = _training(model, execution, x_BTD, targets_BT, boundary, steps) + recomputed
            branches += step * sum(each.stage.n_batches for each in same) / jobs
            batch = _evaluating(model, execution, x_BTD, targets_BT, boundary, steps) + recomputed
            looked_at = n_valid + looks(branch.stage.n_batches, execution.config.log_every) * VALIDATED
            evaluation += batch * looked_at * len(same) / jobs
    return Estimate(
        trunk=trunk_seconds,
        caching=caching,
        branches=branches,
        evaluation=evaluation,
        peak_bytes=peak_memory(execution.device),
    )


@contextlib.contextmanager
def _share_of_threads(jobs: int) -> Iterator[None]:
    """As many threads as each of `jobs` processes has."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // jobs))
    try:
        yield
    finally:
        torch.set_num_threads(before)


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

    return _typical(model, step, execution, steps)


def _evaluating(
    model: LanguageModel, execution: Execution, inputs: Any, targets_BT: Any, boundary: int, steps: int
) -> float:
    batch = [(inputs, targets_BT)]
    return _typical(model, lambda: evaluate(model, batch, n_bytes=1, boundary=boundary), execution, steps)


def _typical(model: LanguageModel, work: Callable[[], Any], execution: Execution, steps: int) -> float:
    """Median seconds; the first call, which also allocates and compiles, does not count."""
    with model.its_threads():
        return median_seconds(work, repeats=steps, warm_up=1, device=execution.device.type)

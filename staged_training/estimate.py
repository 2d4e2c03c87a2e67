"""What a plan will take in time and memory, measured on a few of its own steps before it starts."""

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from foundation.environment import peak_memory
from foundation.timing import median_seconds
from lm.evaluate import evaluate
from lm.model import LanguageModel
from staged_training.data import prefix_activations
from staged_training.dealing import dealt
from staged_training.execute import Execution
from staged_training.fork import fork
from staged_training.optimizer import build_optimizer, update
from staged_training.record import RESULT
from staged_training.step import clipped_gradients
from staged_training.validation import VALIDATED, looks

# Seconds of a processor that a process takes until it has imported what trains.
IMPORTED = time.process_time()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds of what is left to run, by kind of work, and the peak memory (of all processes together; of the GPU,
    where there is one) in bytes. The trunk's evaluation is in the trunk's; `starting` is what processes of their own
    take before they train."""

    trunk: float
    caching: float
    branches: float
    evaluation: float
    starting: float
    peak_bytes: int

    @property
    def total(self) -> float:
        """Seconds."""
        return self.trunk + self.caching + self.branches + self.evaluation + self.starting

    def __str__(self) -> str:
        parts = ", ".join(
            f"{name} {getattr(self, name):.0f} s" for name in ("trunk", "caching", "branches", "evaluation", "starting")
        )
        return (
            f"estimated time {self.total:.0f} s ({parts}), peak memory {self.peak_bytes / 2**30:.2f} GiB, measured on"
            " the first steps"
        )


def estimate(
    execution: Execution, *, steps: int = 3, jobs: int = 1, budgets: int = 0, budget_batches: int = 0
) -> Estimate:
    """Times `steps` steps of the trunk, of each method and of the frozen prefix, and as many batches of their
    evaluation, on untrained weights, after one step to warm up.

    What is finished counts nothing, a stage under way counts whole. Nothing is written, and no state of the run is
    touched.

    Args:
        jobs: branches that run side by side and share the threads; the trunk has them all. Each is timed while as many
            others are under way: cores share caches and memory. One where several processes train each run together:
            all of them call this, and each says what it measures.
        budgets, budget_batches: how many other mean numbers of experts a trained branch is evaluated at, and on how
            many batches each.
    """
    plan, processes = execution.plan, execution.processes
    base_bytes = peak_memory(execution.device)
    trunk_done = (execution.trunk_folder / RESULT).exists()
    pending = [branch for branch in plan.branches if not (execution.folder_of(branch) / RESULT).exists()]
    if trunk_done and not pending:
        return Estimate(trunk=0.0, caching=0.0, branches=0.0, evaluation=0.0, starting=0.0, peak_bytes=base_bytes)
    tokens_BT, targets_BT = processes.own_rows(execution.train_tokens, plan.batch_size)[0]
    boundary, n_valid, n_calibration = plan.boundary, len(execution.valid_tokens), len(plan.calibration_batches())
    jobs = max(1, min(jobs, len(pending)))

    cached = execution.config.cache and boundary > 0
    trunk = processes.shard(LanguageModel(plan.model).init_weights(plan.trunk_seed), execution.device)
    # What branches fork from.
    whole = LanguageModel(plan.model).init_weights(plan.trunk_seed) if processes.many else trunk
    trunk_seconds = 0.0
    if not trunk_done:
        step = _training(trunk, execution, tokens_BT, targets_BT, 0)
        trunk_seconds = _typical(trunk, [step], execution, steps) * plan.trunk.n_batches
        looked_at = n_valid + looks(plan.trunk.n_batches, execution.config.log_every) * VALIDATED
        looked_at += n_calibration * _calibrations(trunk, 0)
        trunk_seconds += _typical(trunk, [_evaluating(trunk, tokens_BT, targets_BT, 0)], execution, steps) * looked_at
    trunk.requires_grad_(False).eval()

    def prefix(side_by_side: int) -> float:
        if not boundary or not pending:
            return 0.0
        work = functools.partial(prefix_activations, trunk, tokens_BT, boundary)
        return _typical(trunk, [work] * side_by_side, execution, steps)

    caching = 0.0
    if cached:
        caching = prefix(1) * (n_valid + max((branch.stage.n_batches for branch in pending), default=0))
    x_BTD = prefix_activations(trunk, tokens_BT, boundary) if boundary else tokens_BT
    # Of each method, seconds of a step and of a branch's evaluation.
    taken: dict[str, tuple[float, float]] = {}
    with _share_of_threads(jobs):
        per_batch = prefix(jobs)
        recomputed = 0.0 if cached else per_batch
        for branch in {branch.method: branch for branch in pending}.values():
            models = [processes.shard(fork(whole, branch), execution.device) for _ in range(jobs)]
            work = [_training(model, execution, x_BTD, targets_BT, boundary) for model in models]
            step = _typical(models[0], work, execution, steps) + recomputed
            work = [_evaluating(model, x_BTD, targets_BT, boundary) for model in models]
            batch = _typical(models[0], work, execution, steps) + recomputed
            looked_at = n_valid + looks(branch.stage.n_batches, execution.config.log_every) * VALIDATED
            # Thresholds are set where a branch starts and where it ends, and for every other budget.
            calibrations = 2 * _calibrations(models[0], boundary) + budgets * _has_budget(models[0], boundary)
            looked_at += budgets * min(budget_batches, n_valid) + calibrations * n_calibration
            taken[branch.method] = step, batch * looked_at

    # The process that takes longest.
    lengths = [branch.stage.n_batches for branch in pending]
    shares = [[pending[number] for number in share] for share in dealt(lengths, jobs)]
    spent = [
        (
            sum(taken[branch.method][0] * branch.stage.n_batches for branch in share),
            # Every process computes the text that thresholds are set on as it enters the blocks that train.
            sum(taken[branch.method][1] for branch in share) + per_batch * n_calibration,
        )
        for share in shares
    ]
    branches, evaluation = max(spent, key=sum)
    starting = IMPORTED if jobs > 1 else 0.0
    return Estimate(
        trunk=trunk_seconds,
        caching=caching,
        branches=branches,
        evaluation=evaluation,
        starting=starting,
        peak_bytes=peak_memory(execution.device)
        + (jobs * base_bytes if jobs > 1 and execution.device.type == "cpu" else 0),
    )


def _calibrations(model: LanguageModel, boundary: int) -> int:
    """1 where a policy from block `boundary` on holds a mean number of experts by thresholds that are set on text."""
    return int(any(router.policy.config.held_mean is not None for router in model.routers(boundary)))


def _has_budget(model: LanguageModel, boundary: int) -> int:
    """1 where another mean number of experts takes other thresholds, and not another k."""
    return int(any(router.policy.budget is not None for router in model.routers(boundary)))


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
    model: LanguageModel, execution: Execution, inputs: Any, targets_BT: Any, boundary: int
) -> Callable[[], Any]:
    optimizer = build_optimizer(model, execution.plan.optimizer, boundary)

    def step() -> None:
        model.train()
        # The same draws in every step, so that all steps are as long.
        model.begin_step(0, 0)
        clipped_gradients(
            model,
            optimizer,
            inputs,
            targets_BT,
            boundary=boundary,
            clip=execution.plan.optimizer.clip,
            processes=execution.processes,
        )
        update(optimizer, 1e-5)
        model.after_step(boundary)

    return step


def _evaluating(model: LanguageModel, inputs: Any, targets_BT: Any, boundary: int) -> Callable[[], Any]:
    return lambda: evaluate(model, [(inputs, targets_BT)], n_bytes=1, boundary=boundary)


def _typical(model: LanguageModel, works: list[Callable[[], Any]], execution: Execution, steps: int) -> float:
    """Median seconds of the first, while the others are done again and again; the first call, which also allocates and
    compiles, does not count."""
    device, over = execution.device.type, threading.Event()

    def again(work: Callable[[], Any]) -> None:
        while not over.is_set():
            work()

    neighbours = [threading.Thread(target=again, args=(work,), daemon=True) for work in works[1:] if device == "cpu"]
    with model.its_threads():
        try:
            for neighbour in neighbours:
                neighbour.start()
            return median_seconds(works[0], repeats=steps, warm_up=1, device=device)
        finally:
            over.set()
            for neighbour in neighbours:
                neighbour.join()

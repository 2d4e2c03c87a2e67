"""The training loop: one function, from a model and an order of batches to a trained model, that can be killed at any
moment.

Legend: B batch, T tokens, D model width.

Everything a step depends on is the state of the last checkpoint, the configuration and the step's number, so a run that
was killed and started again by the same command goes through the same numbers, bit for bit.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from foundation.command import CannotGoOn
from foundation.stopping import Interrupted, StopSignals
from lm.model import LanguageModel
from moe.freed_memory import keep_freed_memory
from routing.router import NonFiniteScoresError
from staged_training.data import Batches
from staged_training.diagnostics import step_diagnostics
from staged_training.merging import WeightAverage
from staged_training.optimizer import build_optimizer, restore_optimizer, update
from staged_training.processes import ALONE, Processes
from staged_training.progress import Progress
from staged_training.run import Run
from staged_training.step import Objective, clipped_gradients, next_token


class NonFiniteLossError(CannotGoOn):
    """The loss or the gradient is NaN or infinite; names the step, the data position and the last good checkpoint."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageResult:
    """What the loop reports of a stage that came to its end.

    Attributes:
        steps: updates done in all, those before an interruption included.
        seconds: spent in steps that are part of the result.
        mean_experts: per trained block, real experts per token over the whole stage.
        checkpoint: where the result lies.
        skipped: corrupt checkpoints that were passed over when the stage was resumed.
    """

    steps: int
    seconds: float
    mean_experts: tuple[float, ...]
    checkpoint: Path
    skipped: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hooks:
    """What is called on the way through a stage.

    Attributes:
        before_step: ahead of every step with its number; it may say which of the parameters train, and which mean the
            budgets hold, as functions of that number alone.
        validate: bits per byte of some validation text with the model as it is, asked for behind every step that ends
            an interval of progress; changes nothing of the model.
        at_end: behind the last step and ahead of its checkpoint, which holds what it does to the model.
    """

    before_step: Callable[[int], object] | None = None
    validate: Callable[[], float] | None = None
    at_end: Callable[[], object] | None = None


NO_HOOKS = Hooks()


def train_stage(
    run: Run,
    model: LanguageModel,
    batches: Batches,
    *,
    save_every: int,
    progress: Progress,
    hooks: Hooks = NO_HOOKS,
    inherited: Mapping[str, Tensor] | None = None,
    objective: Objective = next_token,
    processes: Processes = ALONE,
) -> StageResult:
    """Trains blocks [boundary, L), norm and head (everything when the run's boundary is 0), or the rest of a stage that
    was interrupted.

    Args:
        run: what to train, in which order, and where its checkpoints, metrics and diagnostics go.
        model: with the weights the stage starts from; overwritten by a checkpoint where there is one.
        batches: inputs and targets_BT by batch number.
        save_every: steps between checkpoints; there is always one at the end.
        inherited: state of the optimizer that the stage starts from, see `fork.inherited_state`; none by default.
        objective: what a step minimises beside the routers' losses.
        processes: that train together; `model` is then this process's part, and `batches` have its rows.

    Raises:
        NonFiniteLossError: the weights on the disk are from before it.
        Interrupted: after a stop signal, with everything saved.
        checkpoint.CheckpointMismatchError: when the checkpoints are of another stage or another model.
    """
    # As `python -m moe bench` times the experts: their pages are not cleared anew in every step.
    keep_freed_memory()
    stage, order, boundary = run.stage, run.order, run.boundary
    optimizer = build_optimizer(model, run.optimizer, boundary)
    step, seconds, experts_sum, skipped = 0, 0.0, np.zeros(model.config.n_layers - boundary), ()
    average = WeightAverage(model, stage, boundary)
    if (saved := processes.restore(run, model, optimizer, average)) is not None:
        step, seconds, skipped = saved.step, saved.state["seconds"], saved.skipped
        experts_sum = np.array(saved.state["experts_sum"])
        print(f"{run.label} continues at step {step} of {stage.n_batches} from {saved.path}", flush=True)
    elif inherited:
        restore_optimizer(model, optimizer, boundary, dict(inherited))
    last_saved = saved.path if saved is not None else None
    print(
        "{}: experts computed by {} ({})".format(run.label, *model.expert_backend(progress.tokens_per_step)), flush=True
    )

    def save() -> Path:
        # A checkpoint that is ahead of its metrics would leave a gap in them: resuming starts behind it.
        logs = metrics.flush()
        state = {"position": step, "seconds": seconds, "experts_sum": experts_sum.tolist(), "logs": logs}
        return processes.save(run, step, model, optimizer, average, state=state)

    metrics = processes.metrics(run.folder, step)
    if stage.n_batches == 0 and saved is None:
        # A trunk that nothing trains: its branches start from the checkpoint of its first weights.
        if hooks.at_end is not None:
            hooks.at_end()
        last_saved = save()
    model.train()
    with StopSignals() as stop, model.its_threads():
        while step < stage.n_batches:
            began = time.perf_counter()
            learning_rate = stage.schedule.value(step, stage.n_batches)
            where = f"step {step}, data position {step}, batch {order[step]}; last good checkpoint: {last_saved}"
            # Draws are a function of seed and step, so a resumed run draws what an uninterrupted one does.
            model.begin_step(step, run.seed)
            if hooks.before_step is not None:
                hooks.before_step(step)
            inputs, targets_BT = batches[order[step]]
            try:
                numbers = clipped_gradients(
                    model,
                    optimizer,
                    inputs,
                    targets_BT,
                    boundary=boundary,
                    clip=run.optimizer.clip,
                    objective=objective,
                    diagnose=progress.ends_interval(step + 1),
                    processes=processes,
                )
            except (NonFiniteScoresError, RuntimeError) as error:
                # Routers refuse such scores before they become a loss. On a GPU an assertion on the device does it,
                # which reaches the host as a plain RuntimeError that only its text tells from others.
                if not isinstance(error, NonFiniteScoresError) and "device-side assert" not in str(error):
                    raise
                metrics.close()
                raise NonFiniteLossError(f"{error}, at {where}") from error
            if not numbers.finite:
                metrics.close()
                raise NonFiniteLossError(
                    f"loss {numbers.loss}, routing loss {numbers.routing_loss}, gradient norm {numbers.grad_norm} at"
                    f" {where}"
                )
            update(optimizer, learning_rate)
            # Behind the update and ahead of `after_step`: biases and budgets move by the counts of the whole batch.
            processes.count_together(model.routers(boundary))
            model.after_step(boundary)
            step += 1
            average.after_update(step)
            experts_sum += numbers.mean_experts
            taken = time.perf_counter() - began
            seconds += taken
            record = {
                "step": step,
                "loss": numbers.loss,
                "routing_loss": numbers.routing_loss,
                "grad_norm": numbers.grad_norm,
                "lr": learning_rate,
            }
            record["mean_experts"] = sum(numbers.mean_experts) / len(numbers.mean_experts)
            metrics.write(record, {"step": step, "seconds": taken})
            if numbers.statistics:
                measured = None if hooks.validate is None else hooks.validate()
                metrics.write_diagnostics(step_diagnostics(step, model.routers(boundary), numbers.statistics, measured))
            progress.step(record)
            # Read once: a signal that comes after this line is the next step's.
            stopping = processes.agreed(stop.signal) is not None
            if step == stage.n_batches and hooks.at_end is not None:
                hooks.at_end()
            if step % save_every == 0 or step == stage.n_batches or stopping:
                last_saved = save()
            if stopping:
                break
    metrics.close()
    if (stop_signal := processes.agreed(stop.signal)) is not None:
        message = f"{run.label}: saved at step {step} of {stage.n_batches} in {last_saved}; the same command continues"
        raise Interrupted(stop_signal, message)
    assert last_saved is not None
    means = tuple((experts_sum / max(step, 1)).tolist())
    return StageResult(steps=step, seconds=seconds, mean_experts=means, checkpoint=last_saved, skipped=skipped)

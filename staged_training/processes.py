"""What the training loop asks of the processes it runs in: here, of the only one. `staged_training.many_processes`
answers for several."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lm.model import LanguageModel
from routing.router import Router
from staged_training import checkpoint
from staged_training.data import Batches, TokenBatches
from staged_training.merging import WeightAverage
from staged_training.optimizer import optimizer_tensors, restore_optimizer
from staged_training.progress import MetricsFile, problem_of_logs
from staged_training.record import locked
from staged_training.run import Run

Made = TypeVar("Made")


class Processes:
    """One process: everything is its own, and whole."""

    # Whether models are cut over several processes.
    many = False
    # Whether this process is the one that prints and writes.
    first = True

    def from_first(self, make: Callable[[], Made]) -> Made:
        """What `make` returns on the first process, or raises there, on all."""
        return make()

    def exclusive(self, folder: Path) -> contextlib.AbstractContextManager[None]:
        """Keeps other runs out of `folder`."""
        return locked(folder)

    def shard(self, model: LanguageModel) -> LanguageModel:
        """This process's part of a model that is whole, and the same, in all of them."""
        return model

    def whole(self, model: LanguageModel) -> LanguageModel | None:
        """The inverse of `shard`, on the first process; None on the others. All call it."""
        return model

    def own_rows(self, batches: TokenBatches) -> Batches:
        """This process's rows of every batch."""
        return batches

    def mean(self, values: Tensor) -> Tensor:
        """Of what each process measured on its own tokens."""
        return values

    def agreed(self, signal: int | None) -> int | None:
        """The stop signal that any process got, the same on all."""
        return signal

    def count_together(self, routers: list[Router]) -> None:
        """What routers counted in a step becomes what all processes' routers counted."""

    def metrics(self, folder: Path, step: int) -> MetricsFile:
        """The files of a run that is at `step`."""
        return MetricsFile(folder, step)

    def restore(
        self, run: Run, model: LanguageModel, optimizer: torch.optim.AdamW, average: WeightAverage
    ) -> checkpoint.Checkpoint | None:
        """Continues from the run's newest checkpoint, if there is any.

        Raises:
            checkpoint.CheckpointMismatchError: when it is of another stage or another model.
        """
        if (saved := checkpoint.load_latest(run.checkpoints, continuable(run))) is not None:
            checkpoint.refuse_other_identity(saved, run.identity)
            checkpoint.restore_model(model, saved.weights, str(saved.path))
            restore_optimizer(model, optimizer, run.boundary, average.restore(saved.optimizer))
            # A run that is at its end writes no further checkpoint, which would do it.
            checkpoint.drop_others(run.checkpoints, saved.step)
        return saved

    def save(
        self,
        run: Run,
        step: int,
        model: LanguageModel,
        optimizer: torch.optim.AdamW,
        average: WeightAverage,
        *,
        state: dict[str, Any],
    ) -> Path:
        """Writes a checkpoint of the run; returns its folder."""
        return checkpoint.save(
            run.checkpoints,
            step,
            weights=checkpoint.model_tensors(model),
            optimizer={**optimizer_tensors(model, optimizer, run.boundary), **average.tensors()},
            state={"identity": run.identity, **state},
        )


def continuable(run: Run) -> checkpoint.Problem:
    """Refuses checkpoints whose steps the run's files do not hold as they were: a curve would have a hole."""
    return lambda saved: problem_of_logs(run.folder, saved.step, saved.state.get("logs", {}))


ALONE = Processes()

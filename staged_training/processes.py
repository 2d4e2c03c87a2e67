"""What training and evaluation ask of the processes they run in: here, of the only one.
`staged_training.many_processes` answers for several.

Legend: B batch, T tokens, D model width.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lm.config import ModelConfig
from lm.evaluate import WHOLE, Share
from lm.model import LanguageModel
from routing.router import Router
from staged_training import checkpoint
from staged_training.data import Batches
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

    def place(self, device: torch.device) -> torch.device:
        """Where this process computes, which is `device` unless each has one of its own."""
        return device

    def from_first(self, make: Callable[[], Made]) -> Made:
        """What `make` returns on the first process, or raises there, on all."""
        return make()

    def exclusive(self, folder: Path, *, wait: bool = False) -> contextlib.AbstractContextManager[None]:
        """Keeps other runs out of `folder`, see `record.locked`."""
        return locked(folder, wait=wait)

    def check(self, model: ModelConfig, batch_size: int) -> None:
        """Refuses a model or a batch that cannot be cut over the processes, by a ValueError that names what does not
        fit."""

    def shard(self, model: LanguageModel, device: torch.device) -> LanguageModel:
        """This process's part, on its device, of a model that is whole, and the same, in all of them; made of the whole
        one, which is gone."""
        return model.to(device)

    def whole(self, model: LanguageModel) -> LanguageModel | None:
        """The inverse of `shard`, on the first process; None on the others. All call it."""
        return model

    def own_rows(self, batches: Batches, batch_size: int) -> Batches:
        """This process's rows of every batch."""
        return batches

    def rows_of(self, whole_BT: Tensor) -> Tensor:
        """This process's rows of a batch that all have."""
        return whole_BT

    def all_rows(self, x_BTD: Tensor) -> Tensor:
        """The whole batch of which every process has its rows."""
        return x_BTD

    def share(self, batch_size: int, seq_len: int) -> Share:
        """What `own_rows` leaves a process to evaluate."""
        return WHOLE

    def align(self, model: LanguageModel) -> None:
        """Controllers that every process has set by itself become those of the first, to the last bit."""

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

"""What the training loop asks of the processes it runs in: here, of the only one. `staged_training.many_processes`
answers for several."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm.model import LanguageModel
from routing.router import Router
from staged_training import checkpoint
from staged_training.optimizer import optimizer_tensors, restore_optimizer
from staged_training.progress import MetricsFile


class Processes:
    """One process: everything is its own, and whole."""

    def mean(self, values: Tensor) -> Tensor:
        """Of what each process measured on its own tokens."""
        return values

    def agreed(self, signal: int | None) -> int | None:
        """The stop signal that any process got, the same on all."""
        return signal

    def count_together(self, routers: list[Router]) -> None:
        """What routers counted in a step becomes what all processes' routers counted."""

    def metrics(self, folder: Path, step: int) -> MetricsFile:
        return MetricsFile(folder, step)

    def restore(
        self,
        checkpoints: Path,
        model: LanguageModel,
        optimizer: torch.optim.AdamW,
        *,
        boundary: int,
        identity: dict[str, Any],
    ) -> checkpoint.Checkpoint | None:
        """Continues from the newest checkpoint, if there is any.

        Raises:
            checkpoint.CheckpointMismatchError: when it is of another stage or another model.
        """
        if (saved := checkpoint.load_latest(checkpoints)) is not None:
            checkpoint.refuse_other_identity(saved, identity)
            checkpoint.restore_model(model, saved.weights, str(saved.path))
            restore_optimizer(model, optimizer, boundary, saved.optimizer)
            checkpoint.restore_random_states(saved)
        return saved

    def save(
        self,
        checkpoints: Path,
        step: int,
        model: LanguageModel,
        optimizer: torch.optim.AdamW,
        *,
        boundary: int,
        state: dict[str, Any],
    ) -> Path:
        """Writes a checkpoint; returns its folder."""
        tensors = {
            "weights": checkpoint.model_tensors(model),
            "optimizer": optimizer_tensors(model, optimizer, boundary),
        }
        return checkpoint.save(checkpoints, step, **tensors, state=state)


ALONE = Processes()

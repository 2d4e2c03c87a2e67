"""A finished trunk, as its branches fork from it: from its last checkpoint, whoever wrote that."""

import logging
import shutil

import torch

from foundation.files import CorruptFileError
from lm.model import LanguageModel
from staged_training import checkpoint
from staged_training.plan import Plan
from staged_training.processes import Processes
from staged_training.record import reopen_run
from staged_training.run import Run

log = logging.getLogger(__name__)


def restored_trunk(plan: Plan, run: Run, processes: Processes, device: torch.device) -> LanguageModel | None:
    """The trunk of a finished run; None where its last checkpoint is gone or damaged, and the run reopened: training
    what is missing gives the same weights again. All processes call it, and each has all of it.

    Args:
        device: where one process has it; several have it on the CPU.
    """
    if (saved := processes.from_first(lambda: _last(run))) is None:
        return None
    saved = checkpoint.with_tensors(saved)
    model = LanguageModel(plan.model).init_weights(plan.trunk_seed)
    if not processes.many:
        model.to(device)
    checkpoint.restore_model(model, saved.weights, str(saved.path))
    return model


def _last(run: Run) -> checkpoint.Checkpoint | None:
    try:
        saved = checkpoint.newest(run.checkpoints)
    except CorruptFileError:
        # Each has been named in a warning, and none can be of use any more.
        saved = None
        shutil.rmtree(run.checkpoints)
    if saved is not None and saved.step == run.stage.n_batches:
        checkpoint.refuse_other_identity(saved, run.identity)
        return saved
    log.warning(
        "%s: its checkpoint at step %d, which branches start from, is missing or damaged; training %s",
        run.folder,
        run.stage.n_batches,
        "again from the start" if saved is None else f"on from step {saved.step}",
    )
    reopen_run(run.folder)
    return None

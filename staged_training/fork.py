"""From the trunk to a branch: which states are taken over, and what makes a fork impossible.

Taken from the trunk: the blocks below the boundary, whole (frozen), and above it the weights and the routers' load and
bias, unless the blocks there are fresh; the embedding, last norm and head always; and of every weight that is taken and
trained, the optimizer's state. A branch of the baseline with nothing frozen is thus the trunk's own training gone on
with, as a warmup-stable-decay schedule means it; with moments of its own it spends its first steps on the noise of
single batches, and a short one ends behind the trunk it came from (notes/LOG.md). Not taken: the schedule (its own,
from its own step 0) and the state of a routing policy (its budget starts anew). The data continue where the trunk
stopped.

A branch may start with its weights changed by about as much as rounding does: beside its twin without, it shows what
rounding alone makes of a run.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lm.model import LanguageModel
from staged_training.boundary import added_weights
from staged_training.checkpoint import CheckpointMismatchError, model_tensors
from staged_training.optimizer import STATE_KEYS, trained_parameters
from staged_training.plan import Branch

# One standard deviation, relative to each weight: neighbouring fp32 numbers differ by 6e-8 to 1.2e-7.
ROUNDING = 1e-7
# Keeps these draws apart from those of the initial weights.
_ROUNDING_STREAM = 1 << 32


@torch.no_grad()
def fork(trunk: LanguageModel, branch: Branch) -> LanguageModel:
    """The model a branch starts from.

    Raises:
        checkpoint.CheckpointMismatchError: when a weight that should come from the trunk is not there or has another
            shape, naming each.
    """
    model = LanguageModel(branch.model).init_weights(branch.seed).to(trunk.embedding_VD.device)
    own, theirs, own_start = model_tensors(model), model_tensors(trunk), _own_start(model, trunk, branch)
    problems = []
    for name, tensor in own.items():
        if name in own_start:
            continue
        if name not in theirs or theirs[name].shape != tensor.shape:
            problems.append(
                f"{name} {list(tensor.shape)} (the trunk has {list(theirs[name].shape) if name in theirs else 'none'})"
            )
        else:
            # Into memory of its own: the branch trains, the trunk serves the branches after it.
            tensor.copy_(theirs[name])
    if problems:
        raise CheckpointMismatchError(
            f"{branch.name} cannot take these weights from the trunk: {'; '.join(problems[:8])}"
        )
    if branch.rounding:
        generator = torch.Generator().manual_seed(_ROUNDING_STREAM + branch.seed)
        frozen = model.frozen_names(branch.boundary)
        for name, weight in model.named_parameters():
            if name not in frozen:
                noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.device)
                # In fp64, or a factor this near to 1 would itself be rounded.
                weight.copy_(weight.double() * (1 + ROUNDING * noise))
    return model


def inherited_state(
    model: LanguageModel, trunk: LanguageModel, branch: Branch, trunk_state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The optimizer's state that a branch goes on with: the trunk's, of every weight that it takes over and trains.

    Args:
        model: what `fork` made.
        trunk_state: of the trunk's last checkpoint, see `optimizer.optimizer_tensors`; averaged weights beside it are
            passed over.
    """
    taken = {name for name, _ in trained_parameters(model, branch.boundary)} - _own_start(model, trunk, branch)
    keys = ((name, name.partition(":")) for name in trunk_state)
    return {name: trunk_state[name] for name, (key, _, weight) in keys if key in STATE_KEYS and weight in taken}


def _own_start(model: LanguageModel, trunk: LanguageModel, branch: Branch) -> frozenset[str]:
    """Names of what the branch brings along instead of taking it over."""
    above = model.names_in(model.blocks[branch.boundary :])
    if branch.fresh:
        return above
    policies = model.names_in(router.policy for router in model.routers(branch.boundary))
    return policies | (above & set(added_weights(trunk.config, branch.model)))

"""Weight merging in place of a decay of the learning rate (WSM, arXiv 2507.17634).

The rate stays at its peak over the steps that would decay, and the weights w_1 ... w_N after each of these N updates
are averaged:

    merged = sum over j of c_j w_j,   c_j = s((j - 1) / N) - s(j / N)

with s(t) the decay's shape, from 1 at t = 0 to 0 at t = 1. Update j then counts as much in `merged` as it moves weights
under the decay, s((j - 1) / N): what differs is only where gradients are taken. For the linear shape c_j = 1 / N, the
plain mean; for "1-sqrt" c_j = sqrt(j / N) - sqrt((j - 1) / N).

Parameters are averaged. Buffers are not: a selection bias or a load is what the last step left, and thresholds are
calibrated on the merged weights when the stage has ended (`execute.Execution`).
"""

import torch
from torch import Tensor

from lm.model import LanguageModel
from staged_training.optimizer import trained_parameters
from staged_training.schedule import Stage

_PREFIX = "merged:"


class WeightAverage:
    """The sum so far, of as many elements as there are trained parameters; empty, and of no effect, where the stage
    does not merge.

    Attributes:
        sums: by parameter name, cut over processes as the parameter is.
    """

    def __init__(self, model: LanguageModel, stage: Stage, boundary: int) -> None:
        self.stage = stage
        self.parameters = dict(trained_parameters(model, boundary)) if stage.schedule.merges else {}
        self.sums = {name: torch.zeros_like(parameter) for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def after_update(self, n_updates: int) -> None:
        """Adds the weights as they are after `n_updates` of the stage; behind its last they become the average."""
        if not (share := self.stage.schedule.merged_share(n_updates, self.stage.n_batches)):
            return
        for name, parameter in self.parameters.items():
            self.sums[name].add_(parameter, alpha=share)
            if n_updates == self.stage.n_batches:
                parameter.copy_(self.sums[name])

    def tensors(self) -> dict[str, Tensor]:
        """The sums as a checkpoint stores them."""
        return {f"{_PREFIX}{name}": total for name, total in self.sums.items()}

    def restore(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Puts back what `tensors` returned; returns the rest of a checkpoint's tensors."""
        for name, total in self.sums.items():
            total.copy_(tensors[f"{_PREFIX}{name}"])
        return {name: tensor for name, tensor in tensors.items() if not name.startswith(_PREFIX)}

"""One training step: forward through what trains, backward, clipping. What the loop repeats and the estimate times.

Legend: B batch, T tokens.
"""

import dataclasses
import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lm.model import LanguageModel, Output
from routing.diagnostics import RoutingStatistics
from staged_training.optimizer import clip_gradients
from staged_training.processes import ALONE, Processes


class Forward(NamedTuple):
    """What an objective makes of a batch.

    Attributes:
        minimised: fp32 scalar, what the step goes down on; routers' losses come on top.
        loss: mean loss of the text's own tokens in nats, which the step is known by.
    """

    output: Output
    minimised: Tensor
    loss: Tensor


class Objective(Protocol):
    """A forward pass through what trains, and what is minimised of it."""

    def __call__(self, model: LanguageModel, inputs: Any, targets_BT: Tensor, boundary: int) -> Forward: ...


def next_token(model: LanguageModel, inputs: Any, targets_BT: Tensor, boundary: int) -> Forward:
    """The loss of the text's own tokens."""
    output = model.run(inputs, boundary, targets_BT)
    return Forward(output, output.loss, output.loss)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepNumbers:
    """What a step is known by, over the tokens of all processes.

    Attributes:
        loss: mean over the tokens, in nats.
        routing_loss: sum of the routers' weighted losses.
        grad_norm: before clipping.
        mean_experts: per trained block, real experts per token.
        statistics: per trained block, counts divided by the number of processes; empty unless asked for.
    """

    loss: float
    routing_loss: float
    grad_norm: float
    mean_experts: tuple[float, ...]
    statistics: tuple[RoutingStatistics, ...] = ()

    @property
    def finite(self) -> bool:
        """Whether the step may change the weights."""
        return all(map(math.isfinite, (self.loss, self.routing_loss, self.grad_norm)))


def clipped_gradients(
    model: LanguageModel,
    optimizer: torch.optim.AdamW,
    inputs: Any,
    targets_BT: Tensor,
    *,
    boundary: int,
    clip: float,
    objective: Objective = next_token,
    diagnose: bool = False,
    processes: Processes = ALONE,
) -> StepNumbers:
    """Leaves the clipped gradient of the objective plus routing losses in the trained parameters.

    Args:
        inputs: as the objective reads them: tokens_BT, or with a boundary the x_BTD that crosses it.
        diagnose: also count what the routers did.
        processes: whose tokens, as many in each, count as one batch.
    """
    output, minimised, loss = objective(model, inputs, targets_BT, boundary)
    routing_loss = output.routing_loss
    (minimised + routing_loss).backward()
    grad_norm = clip_gradients(optimizer, clip)
    experts = [
        routing.assignments.expert_offsets[-1].float() / routing.assignments.n_tokens for routing in output.routings
    ]
    # The only wait for the device in a step: all its numbers in one transfer, before the weights change.
    loss_value, routing_value, norm_value, *expert_values = processes.mean(
        torch.stack([loss, routing_loss, grad_norm, *experts]).detach()
    ).tolist()
    statistics = ()
    if diagnose:
        vectors = processes.mean(torch.stack([routing.statistics.to_vector() for routing in output.routings]))
        statistics = tuple(RoutingStatistics.from_vector(vector) for vector in vectors.cpu())
    return StepNumbers(
        loss=loss_value,
        routing_loss=routing_value,
        grad_norm=norm_value,
        mean_experts=tuple(expert_values),
        statistics=statistics,
    )

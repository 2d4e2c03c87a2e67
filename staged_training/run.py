"""One stage of training as a plan means it.

`Plan.trunk_run` and `Plan.branch_run` make it. Whoever trains, evaluates or records it need not ask which of the two it
is.
"""

import dataclasses
from pathlib import Path
from typing import Any

from staged_training.optimizer import OptimizerConfig
from staged_training.schedule import Stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A trunk or a branch on its way from starting weights to a record.

    Attributes:
        label: begins every line that is printed.
        method: "trunk", or the branch's.
        branch_seed: None for the trunk.
        stage: how many updates under which schedule.
        optimizer: of the weights that train.
        seed: of the routers' draws.
        boundary: first block that trains; 0 trains everything, the embedding included.
        order: the batch number of every step.
        identity: everything the trained weights depend on, as JSON has it; a folder or checkpoint of anything else is
            refused.
        folder: where checkpoints, metrics, costs and result lie.
    """

    label: str
    method: str
    branch_seed: int | None
    stage: Stage
    optimizer: OptimizerConfig
    seed: int
    boundary: int
    order: tuple[int, ...]
    identity: dict[str, Any]
    folder: Path

    def __post_init__(self) -> None:
        assert len(self.order) == self.stage.n_batches, (len(self.order), self.stage.n_batches)

    @property
    def checkpoints(self) -> Path:
        """The folder that holds them."""
        return self.folder / "checkpoints"

"""Learning rate: warm-up, stable, decay to zero or weights that are merged instead, as a pure function of the step.

Warm-up / stable / decay is from MiniCPM (arXiv 2404.06395): the stable part can be left at any step by a short decay,
which is what makes a trunk with many branches possible. The 1-sqrt decay is from arXiv 2405.18392. There is no
scheduler object: nothing to save, nothing to restore wrongly.
"""

import dataclasses
import math
from typing import Literal, get_args

from foundation.numbers import check_numbers
from foundation.serialize import nearest

Anneal = Literal["decay", "merge"]
ANNEALS: tuple[Anneal, ...] = get_args(Anneal)
DECAY_SHAPES = ("linear", "1-sqrt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """A rise, a plateau, and a decay that may be missing.

    Attributes:
        peak: learning rate of the stable part.
        warmup_steps: steps of linear rise; the last of them runs at the peak.
        decay_steps: last steps of the stage, falling from the peak; 0 keeps the peak to the end.
        decay_shape: "linear" (1 - t) or "1-sqrt" (1 - sqrt(t)), t from 0 to 1 over the decay.
        anneal: "decay", or "merge": the rate stays at the peak, and the weights of the last `decay_steps` are averaged
            so that every update counts as much as under the decay (staged_training/merging.py).

    Raises:
        ValueError: for an unknown shape or way to anneal, a peak that is not positive or a negative number of steps.
    """

    peak: float = 3e-3
    warmup_steps: int = 0
    decay_steps: int = 0
    decay_shape: str = "linear"
    anneal: Anneal = "decay"

    def __post_init__(self) -> None:
        for name, legal in (("decay_shape", DECAY_SHAPES), ("anneal", ANNEALS)):
            if (value := getattr(self, name)) not in legal:
                raise ValueError(f"Schedule.{name}: {value!r} is not known; {nearest(value, legal)}")
        check_numbers(self, warmup_steps=0, decay_steps=0)
        if not self.peak > 0:
            raise ValueError(f"Schedule.peak: {self.peak}, must be positive")

    def value(self, step: int, n_steps: int) -> float:
        """Learning rate of update `step` (from 0) of a stage of `n_steps`; 0 at `n_steps` when it decays."""
        if step < self.warmup_steps:
            # From one share of the peak instead of zero: an update at rate 0 would be a batch read for nothing.
            return self.peak * ((step + 1) / self.warmup_steps)
        if not self.decay_steps or self.merges:
            return self.peak
        return self.peak * self._decayed(step, n_steps)

    @property
    def merges(self) -> bool:
        """Whether weights are averaged at the end."""
        return self.anneal == "merge" and self.decay_steps > 0

    def merged_share(self, n_updates: int, n_steps: int) -> float:
        """Share of the weights after `n_updates` in the average of a stage of `n_steps`; the shares add up to 1."""
        return self._decayed(n_updates - 1, n_steps) - self._decayed(n_updates, n_steps) if self.merges else 0.0

    def _decayed(self, step: int, n_steps: int) -> float:
        """What the decay leaves of the peak at update `step`, from 1 to 0."""
        t = min(1.0, max(0.0, (step - (n_steps - self.decay_steps)) / self.decay_steps))
        return 1 - t if self.decay_shape == "linear" else 1 - math.sqrt(t)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of training: so many batches, one update each, under one schedule.

    Raises:
        ValueError: for ramps longer than the stage. A stage without a batch is that of a trunk which nothing trains.
    """

    n_batches: int
    schedule: Schedule

    def __post_init__(self) -> None:
        check_numbers(self, n_batches=0)
        ramps = self.schedule.warmup_steps + self.schedule.decay_steps
        if ramps > self.n_batches:
            raise ValueError(f"Stage: warm-up and decay take {ramps} steps, the stage has {self.n_batches}")

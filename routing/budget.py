"""Budgets: hold the mean number of experts per token at a target.

Every policy with a variable number of experts is written as one inequality: slot j of token t is used if `level_TK[t,
j] <= threshold`. For top-p the level is the probability mass ahead of the slot, for null experts the lead of the null
column it competes with. The budget then is a quantile: the threshold under which the wanted share of all levels lies.
Slots that must be used (the floor) have level -inf.

Legend: T tokens, K slots per token (the cap).
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


def exact_threshold(level_TK: Tensor, target_mean: float) -> Tensor:
    """The smallest threshold for which round(target_mean * T) of the levels lie at or below it (more only if levels tie
    at the threshold).

    Args:
        level_TK: floating point.
        target_mean: slots per token.

    Returns:
        A scalar of the levels' dtype; -inf if the target is met by the forced slots alone or is 0.

    Raises:
        ValueError: if the target is out of reach, above K, or there are no tokens.
    """
    n_tokens, n_slots = level_TK.shape
    if n_tokens == 0:
        raise ValueError("a threshold cannot be calibrated on 0 tokens")
    if not 0.0 <= target_mean <= n_slots:
        raise ValueError(
            f"target_mean = {target_mean} experts per token is out of reach: the policy fills at most {n_slots} slots"
        )
    wanted = round(target_mean * n_tokens)
    if wanted == 0:
        return level_TK.new_full((), -torch.inf)
    return level_TK.detach().reshape(-1).kthvalue(wanted)[0]


# Share of the slots that rounding may put beyond a bound, as it does where a sum of probabilities passes one.
ROUNDING = 1e-3
# Share of a step's error in the number of experts that the aim takes over, and how far, as a share of the target, it
# may go.
AIM_RATE, AIM_RANGE = 0.05, 0.2


class BudgetController(nn.Module):
    """The threshold, how training moves it, and how calibration sets it.

    Training: each step compares the threshold with the exact one of the step's own levels, takes `rate` of the
    difference, and remembers a part of it as drift. The difference is the budget's error in units of the threshold, so
    this is proportional-integral control whose gain needs no tuning to the scale of the scores; the drift term leaves
    no lag behind scores that sharpen steadily, and its share is the one of critical damping. The levels of all forwards
    of a step (gradient accumulation) count as one set, and so do those of all processes, see `routing.over_processes`.

    Batches differ, and the number of experts is no linear function of the threshold: a threshold that is right for the
    average batch is off in the average number (measured: 1.5 % too many). So the number aimed at is itself moved,
    slowly, by the error in the number dispatched.

    Attributes:
        threshold: buffer, fp32 scalar: saved with the checkpoint, changed at run time without reloading.
        drift: buffer, fp32 scalar: its expected change per step.
        aim: buffer, fp32 scalar: experts per token for which the next step's exact threshold is taken, so that the
            mean is `target_mean`.
        target_mean: experts per token that training holds; None where training leaves the threshold alone.
        lowest, highest: bounds of the threshold.
        rate: share of a step's error that is taken at once, in (0, 1].
        threshold_T1: in place of the threshold where it is set, one for each token of a forward pass (or one for all):
            texts that are generated side by side have budgets of their own. Never in a checkpoint.
    """

    threshold: Tensor
    drift: Tensor
    aim: Tensor
    threshold_T1: Tensor | None

    def __init__(self, *, target_mean: float | None, initial: float, lowest: float, highest: float, rate: float):
        super().__init__()
        if not 0.0 < rate <= 1.0:
            raise ValueError(f"rate = {rate} is outside (0, 1]")
        self.target_mean, self.lowest, self.highest, self.rate = target_mean, lowest, highest, rate
        self.threshold_T1 = None
        self.register_buffer("threshold", torch.tensor(initial, dtype=torch.float32))
        self.register_buffer("drift", torch.zeros(()))
        self.register_buffer("aim", torch.tensor(target_mean or 0.0, dtype=torch.float32))
        # The levels of the step's forwards, and their exact threshold where other processes' levels count too: both
        # between checkpoints.
        self.step_levels: list[Tensor] = []
        self.step_exact: Tensor | None = None
        self.n_slots = float("inf")
        self._calibrate_to: float | None = None
        # Told the levels of each decision while somebody asks for them.
        self._listener: Callable[[Tensor], object] | None = None

    @property
    def limit(self) -> Tensor:
        """What levels are compared with: the threshold, or what single tokens have in its place."""
        return self.threshold if self.threshold_T1 is None else self.threshold_T1

    def keep(self, level_TK: Tensor) -> Tensor:
        """Which slots are used, bool. The levels are observed first, see `observe`."""
        self.observe(level_TK)
        # What cannot be compared is kept: dropped, a NaN would become a token that no expert computes.
        return ~(level_TK.detach() > self.limit)

    def observe(self, level_TK: Tensor) -> bool:
        """Learns a forward's levels: in training they are remembered for `after_step`; after `calibrate` they set the
        threshold.

        Returns:
            Whether they did set it: what was decided with the threshold before must be decided again.

        Raises:
            ValueError: for a calibration out of reach; the request is then forgotten.
        """
        level_TK = level_TK.detach()
        if self._listener is not None:
            self._listener(level_TK)
            return False
        if self._calibrate_to is not None:
            target_mean, self._calibrate_to = self._calibrate_to, None
            exact = exact_threshold(level_TK, target_mean)
            self._refuse_beyond_bounds(level_TK, target_mean)
            self.threshold.copy_(exact.clamp(self.lowest, self.highest))
            self.drift.zero_()
            return True
        if self.training and self.target_mean is not None and level_TK.shape[0] > 0:
            self.step_levels.append(level_TK)
            self.n_slots = level_TK.shape[1]
        return False

    def _refuse_beyond_bounds(self, level_TK: Tensor, target_mean: float) -> None:
        """Raises ValueError for a mean that no threshold between the bounds gives: it would be held nowhere, and
        nobody would know."""
        n_tokens = level_TK.shape[0]
        wanted = round(target_mean * n_tokens)
        least, most = (int((level_TK <= bound).sum()) for bound in (self.lowest, self.highest))
        if wanted < least:
            raise ValueError(
                f"target_mean = {target_mean} experts per token is out of reach: the policy always uses"
                f" {least / n_tokens:g}"
            )
        if wanted * (1 - ROUNDING) > most:
            raise ValueError(
                f"target_mean = {target_mean} experts per token is out of reach: at {self.highest:g}, the highest"
                f" threshold, the policy uses {most / n_tokens:g}"
            )

    def calibrate(self, target_mean: float | None) -> None:
        """The next forward first sets the threshold so that the mean number of experts on its own tokens is exact, then
        routes with it; None withdraws the request.

        One forward of a whole model over held-out text therefore calibrates all layers, each on the inputs that
        calibrated layers below give.
        """
        self._calibrate_to = target_mean

    @contextlib.contextmanager
    def overheard(self) -> Iterator[list[Tensor]]:
        """The level_TK of each decision taken inside the block, which teaches the budget nothing."""
        levels: list[Tensor] = []
        self._listener = levels.append
        try:
            yield levels
        finally:
            self._listener = None

    @property
    def calibrates(self) -> bool:
        """Whether the next forward sets the threshold."""
        return self._calibrate_to is not None

    def move_target(self, before: float, now: float) -> None:
        """Training holds `now` experts per token from here on, where it held `before`. The number aimed at moves along,
        which is all of this that a checkpoint holds: whoever moves the target by a function of the step continues."""
        self.target_mean = now
        self.aim += now - before

    def begin_step(self) -> None:
        self.step_levels, self.step_exact = [], None

    @torch.no_grad()
    def after_step(self, mean_experts: Tensor) -> None:
        """Moves the threshold by what the step's forwards observed.

        Args:
            mean_experts: rows dispatched per token of the step, a scalar on the device.
        """
        exact, levels = self.step_exact, self.step_levels
        if exact is None and levels:
            exact = _kth_level(torch.cat(levels), self.aim)
        self.begin_step()
        if exact is None:
            return
        assert self.target_mean is not None
        # The clamp keeps the integral finite where the target lies at the floor, whose levels are -inf.
        error = exact.clamp(self.lowest, self.highest).to(self.threshold.dtype) - self.threshold
        self.drift += (2 - self.rate - 2 * (1 - self.rate) ** 0.5) * error
        self.threshold.copy_((self.threshold + self.rate * error + self.drift).clamp(self.lowest, self.highest))
        self.aim += AIM_RATE * (self.target_mean - mean_experts)
        self.aim.clamp_((1 - AIM_RANGE) * self.target_mean, min((1 + AIM_RANGE) * self.target_mean, self.n_slots))


def _kth_level(level_TK: Tensor, mean: Tensor) -> Tensor:
    """`exact_threshold` for a mean that only the device knows."""
    wanted = (mean.double() * level_TK.shape[0]).round().long().clamp(0, level_TK.numel())
    sorted_N = level_TK.flatten().sort()[0]
    return torch.where(wanted > 0, sorted_N[(wanted - 1).clamp_min(0)], -torch.inf)

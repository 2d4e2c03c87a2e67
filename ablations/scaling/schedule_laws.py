"""Laws of the loss at every step of one model under any learning-rate schedule.

S is the integral of the rate, S_k what it is at the k-th fall of the rate, and the gain from a fall grows with the
training that follows it:

- momentum (Tissue 2024, arXiv 2408.11029): L0 + A S^-alpha - B sum_k fall_k (1 - lambda^(steps since)) / (1 - lambda);
- multi_power (Luo 2025, arXiv 2503.12811): L0 + A S^-alpha - B sum_k fall_k G(C rate_k^-gamma (S - S_k)) with
  G(x) = 1 - (1 + x)^-beta;
- relaxation (ours): (L0 + A S^-alpha) (1 - B sum_k fall_k G(C rate_k^(-1/2) (S - S_k))) with G(x) = x / (1 + x).

In ours the gain is a share of the loss instead of a number of nats, because gradient noise is as large as the loss that
makes it; and the powers that three curves cannot tell (beta, gamma) are held at 1 and 1/2. It has five parameters, the
Multi-Power Law seven.

Legend: P rows of a curve, J falls of its rate, T linear terms.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from ablations.scaling.schedules import Falls, Schedule
from ablations.scaling.variable_projection import Projected, projected_search


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """One recorded run.

    Attributes:
        name: of its file.
        step_P, loss_P: its rows.
        schedule: over steps.
    """

    name: str
    step_P: np.ndarray
    loss_P: np.ndarray
    schedule: Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """What a law sees of a curve: the integral of the rate in thousands of steps, and the falls."""

    area_P: np.ndarray
    falls: Falls


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleLaw:
    """A form.

    Attributes:
        parameters: outer ones, in the order of `columns`; L0 and A, and B where it is linear, are solved for.
        start, low, high: of the outer parameters.
        columns: the terms whose non-negative combination is the loss, [P, T].
        linear: names of their coefficients.
    """

    name: str
    parameters: tuple[str, ...]
    start: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    columns: Callable[[Seen, Sequence[float]], np.ndarray]
    linear: tuple[str, ...]


STEPS = 1000.0


def see(curve: Curve) -> Seen:
    """A curve in the units of the laws."""
    falls = curve.schedule.falls(curve.step_P)
    return Seen(
        area_P=curve.schedule.area(curve.step_P) / STEPS,
        falls=dataclasses.replace(falls, area_PJ=falls.area_PJ / STEPS, since_PJ=falls.since_PJ / STEPS),
    )


def _power(seen: Seen, alpha: float) -> np.ndarray:
    return np.stack([np.ones(len(seen.area_P)), seen.area_P**-alpha], axis=1)


def _momentum(seen: Seen, outer: Sequence[float]) -> np.ndarray:
    alpha, log_rate = outer
    gain_P = -np.expm1(-np.exp(log_rate) * seen.falls.since_PJ) @ seen.falls.size_J
    return np.concatenate([_power(seen, alpha), -gain_P[:, None]], axis=1)


def _multi_power(seen: Seen, outer: Sequence[float]) -> np.ndarray:
    alpha, log_c, beta, gamma = outer
    x_PJ = np.exp(log_c) * seen.falls.rate_J**-gamma * seen.falls.area_PJ
    gain_P = (1 - (1 + x_PJ) ** -beta) @ seen.falls.size_J
    return np.concatenate([_power(seen, alpha), -gain_P[:, None]], axis=1)


def relaxed(falls: Falls, c: float) -> np.ndarray:
    """Share of each fall's gain that has come, summed over the falls, [P]: see `relaxation` above."""
    x_PJ = c * falls.area_PJ / np.sqrt(falls.rate_J)
    return (x_PJ / (1 + x_PJ)) @ falls.size_J


def _relaxation(seen: Seen, outer: Sequence[float]) -> np.ndarray:
    alpha, log_c, b = outer
    return _power(seen, alpha) * (1 - b * relaxed(seen.falls, float(np.exp(log_c))))[:, None]


SCHEDULE_LAWS = {
    law.name: law
    for law in (
        ScheduleLaw(
            name="momentum",
            parameters=("alpha", "log_rate"),
            start=(0.5, 0.0),
            low=(0.05, -6.0),
            high=(3.0, 6.0),
            columns=_momentum,
            linear=("L0", "A", "B"),
        ),
        ScheduleLaw(
            name="multi_power",
            parameters=("alpha", "log_c", "beta", "gamma"),
            start=(0.5, 0.0, 0.5, 0.5),
            low=(0.05, -10.0, 0.02, 0.0),
            high=(3.0, 10.0, 3.0, 2.0),
            columns=_multi_power,
            linear=("L0", "A", "B"),
        ),
        ScheduleLaw(
            name="relaxation",
            parameters=("alpha", "log_c", "B"),
            start=(0.5, 0.0, 0.04),
            low=(0.05, -10.0, 0.0),
            high=(3.0, 10.0, 0.9),
            columns=_relaxation,
            linear=("L0", "A"),
        ),
    )
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleFit:
    """A schedule law with its numbers; `values` by name, the linear ones first."""

    law: ScheduleLaw
    values: dict[str, float]
    objective: float

    def predict(self, curve: Curve) -> np.ndarray:
        """The loss at every row of a curve, [P]."""
        linear_T = np.array([self.values[name] for name in self.law.linear])
        return self.law.columns(see(curve), [self.values[name] for name in self.law.parameters]) @ linear_T


def fit_curves(curves: Sequence[Curve], law: ScheduleLaw, delta: float) -> ScheduleFit:
    """The law fitted to all rows of the curves.

    Args:
        delta: where Huber's function of log residuals turns linear.
    """
    seen = [see(curve) for curve in curves]
    loss_P = np.concatenate([curve.loss_P for curve in curves])
    found: Projected = projected_search(
        lambda outer_X: np.concatenate([law.columns(one, list(outer_X)) for one in seen]),
        loss_P,
        np.ones(len(loss_P)),
        start_X=np.array(law.start),
        bounds=(law.low, law.high),
        delta=delta,
    )
    values = dict(zip((*law.linear, *law.parameters), map(float, (*found.linear_T, *found.outer_X))))
    return ScheduleFit(law=law, values=values, objective=found.objective)

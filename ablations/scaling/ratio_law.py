"""A law of the loss at every step of models of several sizes: the form that predicts larger ones.

    L = E + (A N^-a + B N^-b (S / 20 N)^-c) (1 - F sum_k fall_k G(C (S - S_k) / (N sqrt(rate_k)))),  G(x) = x / (1 + x)

N is the size in units of 1e9 parameters, S the integral of the learning rate over tokens in units of its peak, so
S / 20 N is how many times the tokens of Chinchilla's rule have been seen at the full rate. The last factor is the
`relaxation` law of `schedule_laws.py`. A power of tokens per parameter beside a power of the size fits a ladder whose
batch and rate grow with the size; a power of tokens alone misses its losses by several times as much.

Larger batches waste tokens: S is divided by (batch / what the ladder takes at this size)^OMEGA.

Legend: P rows of a run, V parameters.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import optimize

from ablations.scaling.schedule_laws import relaxed
from ablations.scaling.schedules import Falls, Schedule, warmup_cosine

UNIT = 1e9
CHINCHILLA = 20.0
OMEGA = 0.2
# Rows with fewer tokens per parameter than this still feel the warm-up; the law is not fitted to them.
FROM_TOKENS_PER_PARAMETER = 2.5
# Of log loss, where the fit turns from squares to absolute values.
SOFT = 1e-3
NAMES = ("E", "log_A", "a", "log_B", "b", "c", "F", "log_C")
START = (0.4, 0.15, -1.2, 0.1, 0.4, 0.08, 2.5)
LOW = (-6.0, 0.02, -5.0, -0.5, 0.02, 0.0, -8.0)
HIGH = (3.0, 1.0, 3.0, 1.0, 2.0, 1.0, 10.0)
# A start for E, as a share of the lowest loss.
E_SHARE = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """How a model is trained.

    Attributes:
        size: its name, "1B" say.
        params: of the model, as the ladder counts them.
        tokens: that it is trained on in all.
        warmup: tokens over which the rate rises.
        floor: of the cosine, as a share of the peak.
        batch: tokens of a batch over what the ladder's rule gives at this size, 1 on the rule.
    """

    size: str
    params: float
    tokens: float
    warmup: float
    floor: float
    batch: float = 1.0

    @property
    def multiple(self) -> float:
        """Tokens in units of 20 per parameter, to two digits: 0.5, 1, 2, ..."""
        return float(f"{self.tokens / self.params / CHINCHILLA:.2g}")

    @property
    def schedule(self) -> Schedule:
        """Over tokens."""
        return warmup_cosine(self.tokens, self.warmup, self.floor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run of the ladder: its setting, and its rows."""

    name: str
    setting: Setting
    tokens_P: np.ndarray
    loss_P: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """What the law sees of places in a run's training.

    Attributes:
        size: log of parameters / 1e9.
        ratio_P: log of S / 20 N, corrected for the batch.
        falls: of the rate, their areas in tokens at the full rate per parameter.
    """

    size: float
    ratio_P: np.ndarray
    falls: Falls


def see(setting: Setting, tokens_P: np.ndarray) -> Seen:
    """Places in the training of a model, in the units of the law."""
    falls = setting.schedule.falls(tokens_P)
    area_P = setting.schedule.area(tokens_P) / setting.params
    return Seen(
        size=float(np.log(setting.params / UNIT)),
        ratio_P=np.log(area_P / CHINCHILLA) - OMEGA * np.log(setting.batch),
        falls=dataclasses.replace(falls, area_PJ=falls.area_PJ / setting.params),
    )


def loss_of(values: Sequence[float], seen: Seen) -> np.ndarray:
    """The law, [P].

    Args:
        values: in the order of `NAMES`.
    """
    constant, log_a, a, log_b, b, c, f, log_c = values
    reducible_P = np.exp(log_a - a * seen.size) + np.exp(log_b - b * seen.size - c * seen.ratio_P)
    return constant + reducible_P * (1 - f * relaxed(seen.falls, float(np.exp(log_c))))


def fit_ladder(runs: Sequence[Run], *, constant: float | None = None) -> np.ndarray:
    """The law fitted to all rows of all runs behind their warm-up; every run counts the same.

    Args:
        constant: E, where it is held.

    Returns:
        Parameters in the order of `NAMES`, [V].

    Raises:
        ValueError: for fewer than two sizes.
    """
    if len({run.setting.params for run in runs}) < 2:
        raise ValueError("the runs are of one size; a law across sizes needs at least 2, and 4 to say much")
    seen, log_losses, weights = [], [], []
    for run in runs:
        settled_P = run.tokens_P >= FROM_TOKENS_PER_PARAMETER * run.setting.params
        if settled_P.any():
            seen.append(see(run.setting, run.tokens_P[settled_P]))
            log_losses.append(np.log(run.loss_P[settled_P]))
            weights.append(np.full(int(settled_P.sum()), settled_P.sum() ** -0.5))
    log_loss_P, weight_P = np.concatenate(log_losses), np.concatenate(weights)
    lowest = float(np.exp(log_loss_P.min()))

    def residuals(values_V: np.ndarray) -> np.ndarray:
        return weight_P * (np.concatenate([np.log(loss_of(list(values_V), one)) for one in seen]) - log_loss_P) / SOFT

    low, high = (0.0, 0.95 * lowest) if constant is None else (constant - 1e-9, constant + 1e-9)
    start_V = np.array([E_SHARE * lowest if constant is None else constant, *START])
    found = optimize.least_squares(
        residuals,
        start_V,
        bounds=((low, *LOW), (high, *HIGH)),
        x_scale=np.maximum(0.1, 0.3 * np.abs(start_V)),
        loss="soft_l1",
        max_nfev=200,
    )
    return found.x

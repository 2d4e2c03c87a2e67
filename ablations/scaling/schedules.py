"""Learning-rate schedules as laws of the loss see them: what the rate adds up to, and where it falls.

Legend: K knots, P places along training, J falls of the rate.
"""

import dataclasses

import numpy as np

# The rate of a row that is lower than the row before by more than this fell at once; less is interpolated.
JUMP = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """A rate that is linear between knots, in units of a reference rate.

    Attributes:
        at_K: steps or tokens, ascending from 0; two knots at one place are a jump.
        rate_K: rate there.
    """

    at_K: np.ndarray
    rate_K: np.ndarray

    @property
    def area_K(self) -> np.ndarray:
        """Integral of the rate up to each knot."""
        pieces = np.diff(self.at_K) * (self.rate_K[1:] + self.rate_K[:-1]) / 2
        return np.concatenate([[0.0], np.cumsum(pieces)])

    def area(self, at_P: np.ndarray) -> np.ndarray:
        """Integral of the rate up to each place, [P]: steps (or tokens) at the full rate that make as much."""
        index_P = np.clip(np.searchsorted(self.at_K, at_P, side="right") - 1, 0, len(self.at_K) - 2)
        width_P = self.at_K[index_P + 1] - self.at_K[index_P]
        into_P = at_P - self.at_K[index_P]
        slope_P = np.divide(
            self.rate_K[index_P + 1] - self.rate_K[index_P], width_P, out=np.zeros(len(at_P)), where=width_P > 0
        )
        return self.area_K[index_P] + into_P * (self.rate_K[index_P] + slope_P * into_P / 2)

    def falls(self, at_P: np.ndarray) -> "Falls":
        """Every change of the rate after its first peak, and what followed it up to each place."""
        peak = int(np.argmax(self.rate_K))
        change = -np.diff(self.rate_K)
        of = np.nonzero(change)[0]
        of = of[of >= peak]
        area_K = self.area_K
        middle_J = (area_K[of] + area_K[of + 1]) / 2
        when_J = (self.at_K[of] + self.at_K[of + 1]) / 2
        area_P = self.area(at_P)
        return Falls(
            size_J=change[of],
            # Laws take the rate to negative powers; a schedule may end at zero.
            rate_J=np.maximum(self.rate_K[of + 1], 1e-3),
            area_PJ=np.maximum(area_P[:, None] - middle_J, 0.0),
            since_PJ=np.maximum(at_P[:, None] - when_J, 0.0),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Falls:
    """Where a rate falls; rises are negative.

    Attributes:
        size_J: by how much, in units of the reference rate.
        rate_J: the rate after the fall.
        area_PJ: integral of the rate from the fall to each place, zero before it.
        since_PJ: steps or tokens from the fall to each place, zero before it.
    """

    size_J: np.ndarray
    rate_J: np.ndarray
    area_PJ: np.ndarray
    since_PJ: np.ndarray


def warmup_cosine(total: float, warmup: float, floor: float, knots: int = 60) -> Schedule:
    """A linear rise from 0 to 1, then half a cosine down to `floor`.

    Args:
        total: length of training in steps or tokens, and `warmup` of the rise.
        knots: of the cosine.
    """
    share_K = np.linspace(0.0, 1.0, knots + 1)
    rate_K = floor + (1 - floor) * 0.5 * (1 + np.cos(np.pi * share_K))
    return Schedule(
        at_K=np.concatenate([[0.0], warmup + (total - warmup) * share_K]), rate_K=np.concatenate([[0.0], rate_K])
    )


def from_rows(at_P: np.ndarray, rate_P: np.ndarray, warmup: float, reference: float) -> Schedule:
    """The schedule of a recorded curve: a linear rise to its first rate, then what its rows say.

    Args:
        at_P: steps of the rows, ascending.
        rate_P: learning rate of each.
        warmup: steps of the rise.
        reference: rate that counts as 1.
    """
    at, rate = [0.0, warmup], [0.0, float(rate_P[0])]
    for place, value in zip(at_P, rate_P):
        if place <= at[-1]:
            continue
        if value < (1 - JUMP) * rate[-1]:
            at.append(float(place))
            rate.append(rate[-1])
        at.append(float(place))
        rate.append(float(value))
    return Schedule(at_K=np.array(at), rate_K=np.array(rate) / reference)

"""Arms against each other on the same validation text, paired by seed."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ablations.comparison.statistics import t_interval


@dataclasses.dataclass(frozen=True)
class TextRow:
    """A run; `domain` "macro" is the mean of all domains, "micro" all text together."""

    arm: str
    seed: int
    domain: str
    bits_per_byte: float


@dataclasses.dataclass(frozen=True)
class DifferenceRow:
    """An arm's bits per byte minus another's, paired by seed; a 95 % interval by Student's t."""

    arm: str
    against: str
    domain: str
    difference: float
    low: float
    high: float


def differences(rows: Sequence[TextRow], pairs: Sequence[tuple[str, str]]) -> list[DifferenceRow]:
    """By domain, of every pair (arm, against) and the seeds that both have; two at least."""
    value = {(row.arm, row.domain, row.seed): row.bits_per_byte for row in rows}
    found = []
    for arm, against in pairs:
        for domain in dict.fromkeys(row.domain for row in rows):
            seeds = sorted({row.seed for row in rows})
            interval = t_interval([value[arm, domain, seed] - value[against, domain, seed] for seed in seeds])
            assert interval.half_width is not None, "two seeds at least"
            mean, half = interval.mean, interval.half_width
            found.append(DifferenceRow(arm, against, domain, mean, mean - half, mean + half))
    return found


def difference_text(rows: Sequence[TextRow], found: Sequence[DifferenceRow]) -> str:
    """Means by arm and domain, and the differences behind them."""
    arms = list(dict.fromkeys(row.arm for row in rows))
    pairs = list(dict.fromkeys((row.arm, row.against) for row in found))
    heads = "".join(f"{f'{arm} - {against}, 95 %':>36}" for arm, against in pairs)
    lines = [f"{'bits per byte':<20}{''.join(f'{arm[-14:]:>15}' for arm in arms)}{heads}"]
    of: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        of.setdefault((row.arm, row.domain), []).append(row.bits_per_byte)
    for domain in dict.fromkeys(row.domain for row in rows):
        means = "".join(f"{np.mean(of[arm, domain]):>15.4f}" for arm in arms)
        own = {(row.arm, row.against): row for row in found if row.domain == domain}
        cells = (f"{row.difference:+.4f} [{row.low:+.4f}, {row.high:+.4f}]" for row in map(own.__getitem__, pairs))
        lines.append(f"{domain:<20}{means}{''.join(f'{cell:>36}' for cell in cells)}")
    return "\n".join(lines)

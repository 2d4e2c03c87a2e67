"""Whether false verdicts are as rare as they should be, on recorded runs between which there is nothing to find.

The controls of a comparison are baselines; each group of a few of their seeds is a comparison without effect, judged as
a method would be. Groups of one size share no run and are independent; those of different sizes are made of the same
runs, so each size is a statement of its own.
"""

import dataclasses
from collections.abc import Sequence

from ablations.comparison.records import Records
from ablations.comparison.statistics import paired_difference
from ablations.comparison.verdicts import ERROR, bits_by_run, text_of

CALIBRATION_FILE = "calibration.csv"
SEEDS = (1, 2, 3, 5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationRow:
    """One control in comparisons of one size.

    Attributes:
        control: its name.
        seeds: of each comparison.
        comparisons, false_verdicts: how many there were, and how many were told from zero at 5 %.
        low, high: 95 % binomial interval of the share (Clopper and Pearson).
    """

    control: str
    seeds: int
    comparisons: int
    false_verdicts: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """Of false verdicts."""
        return self.false_verdicts / self.comparisons


def calibration_rows(records: Records) -> list[CalibrationRow]:
    """Every control of noise with comparisons of 1, 2, 3 and 5 seeds, as far as its finished runs go."""
    comparison = records.comparison
    text = text_of(records.branches[comparison.baseline])
    baseline = bits_by_run(records.branches[comparison.baseline])
    rows = []
    # A second to import, which only this command needs to wait.
    from scipy import stats

    for control in (name for name in records.methods if name in comparison.controls - comparison.known.keys()):
        bits = bits_by_run(records.branches[control])
        for seeds in SEEDS:
            # A single seed speaks of its own order of the data, and a control of another order has none to share.
            if seeds == 1 and control in comparison.reordered:
                continue
            p_values = []
            for trunk in comparison.trunk_seeds:
                keys = sorted(key for key in bits.keys() & baseline.keys() if key[0] == trunk)
                for start in range(0, len(keys) - seeds + 1, seeds):
                    group = {key: bits[key] for key in keys[start : start + seeds]}
                    # The next pair is the twin that a comparison of one seed has; its own would measure itself.
                    other = keys[(start + seeds) % len(keys)]
                    if seeds == 1 and other in group:
                        continue
                    difference = paired_difference(group, baseline, text, {other: bits[other]})
                    p_values.append(difference.p_value)
            if p_values:
                false = sum(p_value < ERROR for p_value in p_values)
                interval = stats.binomtest(false, len(p_values)).proportion_ci()
                rows.append(
                    CalibrationRow(
                        control=control,
                        seeds=seeds,
                        comparisons=len(p_values),
                        false_verdicts=false,
                        low=float(interval.low),
                        high=float(interval.high),
                    )
                )
    return rows


def calibration_text(rows: Sequence[CalibrationRow]) -> str:
    """One line per row, and what they say together."""
    lines = [f"{'control':<12} {'seeds':>5} {'comparisons':>12} {'false verdicts':>15} {'share':>7}   95 % interval"]
    lines += [
        f"{row.control:<12} {row.seeds:>5} {row.comparisons:>12} {row.false_verdicts:>15} {100 * row.share:>5.1f} %"
        f"   {100 * row.low:.1f} to {100 * row.high:.1f} %"
        for row in rows
    ]
    above = [f"{row.control} with {row.seeds} seed{'s' * (row.seeds > 1)}" for row in rows if row.low > ERROR]
    said = f"above the nominal {100 * ERROR:.0f} %: {', '.join(above)}" if above else "nowhere above the nominal 5 %"
    return "\n".join([*lines, "", f"False verdicts are {said}."])

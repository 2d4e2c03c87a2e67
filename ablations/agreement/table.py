"""The table of the study: one line per setting and family of arms, computed from the table of runs alone."""

import dataclasses
import math
from collections.abc import Sequence

from ablations.agreement.results import FAMILIES, RunRow, cost_share, scores
from ablations.agreement.statistics import agreement


@dataclasses.dataclass(frozen=True, kw_only=True)
class SettingRow:
    """One setting, for the arms of one family; see `statistics.Agreement` for what the numbers are.

    Attributes:
        family: "routing" or "architecture", each with the baseline, or "all".
        arms: how many, the baseline included.
        missing: arms that were left out, separated by spaces.
        flops, seconds: training, as a share of that of these arms' full runs.
    """

    setting: str
    family: str
    arms: int
    missing: str
    pairs: int
    agreeing: int
    separable: int
    separable_agreeing: int
    holm: int
    holm_agreeing: int
    share: float
    share_low: float
    share_high: float
    separable_share: float
    separable_share_low: float
    separable_share_high: float
    tau: float
    tau_low: float
    tau_high: float
    signs: float
    signs_low: float
    signs_high: float
    regret: float
    regret_low: float
    regret_high: float
    flops: float
    seconds: float

    @property
    def reliability(self) -> str:
        """What a report may say of comparisons in this setting."""
        return f"{self.separable_agreeing} of {self.separable} separable pairs as in full runs"


def setting_rows(runs: Sequence[RunRow], settings: Sequence[str], *, seeds: int, resamples: int) -> list[SettingRow]:
    """Every setting with every family of at least two arms beside the baseline.

    Args:
        seeds: of every arm.
        resamples: of the bootstrap.
    """
    rows = []
    for setting in settings:
        for family in FAMILIES:
            found = scores(runs, setting, family, seeds)
            if len(found.arms) < 3:
                continue
            result = agreement(found.truth_AS, found.cheap_AS, resamples)
            cost = cost_share(runs, setting, found.arms)
            rows.append(
                SettingRow(
                    setting=setting,
                    family=family,
                    arms=len(found.arms),
                    missing=" ".join(found.missing),
                    pairs=result.pairs,
                    agreeing=result.agreeing,
                    separable=result.separable,
                    separable_agreeing=result.separable_agreeing,
                    holm=result.holm,
                    holm_agreeing=result.holm_agreeing,
                    share=result.share.value,
                    share_low=result.share.low,
                    share_high=result.share.high,
                    separable_share=result.separable_share.value,
                    separable_share_low=result.separable_share.low,
                    separable_share_high=result.separable_share.high,
                    tau=result.tau.value,
                    tau_low=result.tau.low,
                    tau_high=result.tau.high,
                    signs=result.signs.value,
                    signs_low=result.signs.low,
                    signs_high=result.signs.high,
                    regret=result.regret.value,
                    regret_low=result.regret.low,
                    regret_high=result.regret.high,
                    flops=cost.flops,
                    seconds=cost.seconds,
                )
            )
    return rows


def table_text(rows: Sequence[SettingRow]) -> str:
    """The settings as aligned text, family by family."""
    header = (
        f"{'setting':<34} {'pairs':>9} {'separable':>10} {'share, 95 %':>20} {'Holm':>8} {'tau, 95 %':>21}"
        f" {'signs':>6} {'regret, 95 %':>25} {'FLOPs':>7} {'time':>7}"
    )
    lines = []
    for family in FAMILIES:
        own = [row for row in rows if row.family == family]
        if not own:
            continue
        lines += [f"{arms_of(family)}: {own[0].arms}, the baseline included", header, *map(_line, own), ""]
    return "\n".join(
        [
            *lines,
            "pairs, separable, Holm: pairs of arms ordered as by full runs: of all; of those that full runs tell apart"
            " at 95 % (paired t over seeds); of those left by Holm's correction.",
            "signs: arms on the same side of the baseline; regret: bits per byte lost by taking the arm put first;"
            " FLOPs, time: of training, as shares of the full runs'.",
            "intervals: nested bootstrap over arms and seeds; few seeds make it too narrow in the seeds.",
        ]
    )


def _line(row: SettingRow) -> str:
    low, high = percent(row.separable_share_low), percent(row.separable_share_high)
    return (
        f"{row.setting:<34} {f'{row.agreeing}/{row.pairs}':>9} {f'{row.separable_agreeing}/{row.separable}':>10}"
        f" {percent(row.separable_share):>6} {f'[{low}, {high}]':>13} {f'{row.holm_agreeing}/{row.holm}':>8}"
        f" {row.tau:>+5.2f} [{row.tau_low:>+5.2f}, {row.tau_high:>+5.2f}] {percent(row.signs):>6}"
        f" {row.regret:>8.4f} [{row.regret_low:.4f}, {row.regret_high:.4f}]"
        f" {percent(row.flops):>7} {percent(row.seconds):>7}"
    )


def arms_of(family: str) -> str:
    """A family in words."""
    return f"{family} arms"


def percent(share: float) -> str:
    """A share in words; a dash for NaN."""
    return "-" if math.isnan(share) else f"{100 * share:.0f} %"

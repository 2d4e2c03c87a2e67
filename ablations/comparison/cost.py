"""The cost ledger: what the staged comparison cost, and what training every method from scratch would have cost.

Staged: trunks, caching, branches and evaluation as recorded by the runs (a re-run that skips finished work adds
nothing), and the controls, which calibrate the noise: they are part of the price and no method, so nobody would train
them from scratch.

From scratch: for each method, the FLOPs per token of training its whole network (its own measured mean of experts)
times the tokens of trunk plus branch. Its seconds are an estimate, FLOPs divided by the speed at which the
trunk (without one, the branches) was measured to train; evaluation is left out of it, so the comparison leans against
the staged side.
"""

import dataclasses
import math
from collections.abc import Iterable

from ablations.comparison.records import Cost, Records

ZERO = Cost(flops=0.0, seconds=0.0)
PHASES = ("trunk", "caching", "branches", "evaluation")
CONTROLS = "controls"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostComparison:
    """What the staged comparison cost beside what full trainings would have.

    Attributes:
        phases: of the staged runs, by kind of work; they add up to `staged`.
        per_method: one full training of each method, the baseline included and the controls not.
        seeds: how often each would be repeated: branches per method.
        complete: whether the costs of all trunks are known; otherwise `staged` is less than was spent.
    """

    phases: dict[str, Cost]
    per_method: dict[str, Cost]
    seeds: int
    complete: bool = True

    @property
    def staged(self) -> Cost:
        """All phases together."""
        return total(self.phases.values())

    @property
    def scratch_once(self) -> Cost:
        """Every method trained from scratch with one seed."""
        return total(self.per_method.values())

    @property
    def scratch_all_seeds(self) -> Cost:
        """Every method trained from scratch as often as the staged comparison branched."""
        return Cost(flops=self.scratch_once.flops * self.seeds, seconds=self.scratch_once.seconds * self.seeds)

    @property
    def share_of_once(self) -> float:
        """Staged FLOPs as a share of one full training per method; below 1 is a saving. NaN where not all are known."""
        return self._share_of(self.scratch_once)

    @property
    def share_of_all_seeds(self) -> float:
        """The same of as many full trainings as the staged comparison has branches of methods."""
        return self._share_of(self.scratch_all_seeds)

    def _share_of(self, scratch: Cost) -> float:
        return self.staged.flops / scratch.flops if self.complete else math.nan


def total(costs: Iterable[Cost]) -> Cost:
    """Their sum; nothing costs nothing."""
    return sum(costs, ZERO)


def compare_costs(records: Records) -> CostComparison:
    """The costs of all finished runs, and those of training each method from scratch."""
    controls = records.comparison.controls
    runs = [*records.trunks.values()]
    runs += [run for method, own in records.branches.items() if method not in controls for run in own.values()]
    phases = {phase: total(run.costs.get(phase, ZERO) for run in runs) for phase in PHASES}
    if controls:
        noise = (run for method in controls for run in records.branches.get(method, {}).values())
        phases[CONTROLS] = total(cost for run in noise for cost in run.costs.values())
    tokens = records.comparison.trunk_tokens + records.comparison.branch_tokens
    # The trunk is the one run here that trains a whole network, as a run from scratch would; without one, branches do.
    whole = phases["trunk" if records.comparison.trunk_tokens else "branches"]
    speed = whole.flops / whole.seconds if records.trunks else math.nan
    per_method = {}
    for method in (name for name in records.methods if name not in controls):
        results = records.results[method].values()
        flops = tokens * sum(result.scratch_flops for result in results) / len(results)
        per_method[method] = Cost(flops=flops, seconds=flops / speed)
    return CostComparison(
        phases=phases,
        per_method=per_method,
        seeds=len(records.comparison.trunk_seeds) * len(records.comparison.branch_seeds),
        complete=records.has_all_trunks,
    )


def cost_rows(costs: CostComparison) -> list[tuple[str, float, float]]:
    """What is shown: (what, FLOPs, seconds), in the order of the lines."""
    n = len(costs.per_method)
    lines = [
        *costs.phases.items(),
        ("staged, total", costs.staged),
        (f"from scratch, {n} methods once (estimate)", costs.scratch_once),
    ]
    if costs.seeds > 1:
        lines.append((f"from scratch, {n} methods x {costs.seeds} seeds (estimate)", costs.scratch_all_seeds))
    return [(what, cost.flops, cost.seconds) for what, cost in lines]


def cost_text(costs: CostComparison) -> str:
    """The costs as aligned text, with the ratio that matters as the last line."""
    lines = [f"{'cost ledger':<46} {'FLOPs':>10} {'time':>9} {'of staged':>10}"]
    for what, flops, seconds in cost_rows(costs):
        lines.append(f"{what:<46} {flops:>10.3g} {duration(seconds):>9} {100 * flops / costs.staged.flops:>9.0f}%")
    if not costs.complete:
        lines.append(
            "A trunk is missing or damaged, and its cost unknown: no share of training from scratch can be told."
        )
        return "\n".join(lines)
    lines.append(cost_statement(costs))
    return "\n".join(lines)


def cost_statement(costs: CostComparison) -> str:
    """What was saved, or not, in one sentence; both ways of counting are named."""
    n, plural = len(costs.per_method), "s" * (len(costs.per_method) > 1)
    controls = ", controls included," if CONTROLS in costs.phases else ""
    shares = [f"{100 * costs.share_of_once:.0f} % of the FLOPs of training {n} method{plural} from scratch once each"]
    if costs.seeds > 1:
        shares.append(f"{100 * costs.share_of_all_seeds:.0f} % of training each with {costs.seeds} seeds")
    return f"The staged runs{controls} cost {', '.join(shares)}."


def duration(seconds: float) -> str:
    """Seconds as people read them: `42 s`, `3 min 20 s`, `5 h 07 min`; `-` for NaN."""
    if math.isnan(seconds):
        return "-"
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"

"""What a comparison leaves on disk, read back: table, figures and report are computed from this and from nothing else.

The folder of a comparison holds `comparison.json`: what was compared, and where the run folders lie (relative to it;
see `staged_training.record`). Comparisons share trunks and branches, so the runs lie beside it and not in it. A branch
without `result.json` is unfinished.
"""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any, Literal

from ablations.comparison.statistics import RunKey
from ablations.method import CONTROLS
from foundation.files import CorruptFileError, check_seal, read_json
from foundation.serialize import load_json
from foundation.tables import read_rows
from staged_training.diagnostics import StepDiagnostics, read_diagnostics
from staged_training.progress import METRICS, read_metrics
from staged_training.record import ENVIRONMENT, LEDGER, RESULT, SECTIONS, Ledger, SectionLoss, check_run

COMPARISON_FILE = "comparison.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodSummary:
    """A method as the report names it; `kind` is what it changes, see `Method.kind`, `known` how a control is known to
    come out."""

    name: str
    question: str
    kind: str
    known: Literal["worse", "better"] | None = None

    @property
    def is_control(self) -> bool:
        """Whether it measures noise, or whether the run sees what is known: no method, so it earns no verdict and its
        price is none of a method's."""
        return self.kind in CONTROLS or self.known is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunReference:
    """Where a run lies. `method` is "trunk" for a trunk; `branch_seed` is the seed it is paired by, which a method may
    shift for its draws."""

    method: str
    trunk_seed: int
    branch_seed: int
    folder: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was compared, written before the first step.

    Attributes:
        methods: in the order of the table; the first is the baseline.
        trunk_seeds, branch_seeds: every method has one branch per pair of them.
        n_layers: of the baseline's model.
        boundary: blocks [0, boundary) and the embedding were frozen in every branch.
        fresh: whether the blocks above the boundary started from fresh weights in every branch.
        trunk_tokens, branch_tokens: of one trunk and of one branch.
        tokens_per_step: of trunk and branches.
        bytes_per_token: UTF-8 bytes of the training text by its tokens; turns training losses into bits per byte.
        valid_bytes: UTF-8 bytes of the validation text.
        xz_bits_per_byte: of `xz -9` on that text.
        plan: the plan as it was printed.
        command: that repeats this comparison.
        trunks, branches: all planned runs, finished or not.
        form: see `reliability.form_of`; empty where it was not written down.
        domains: of every document of the validation text; empty where it was not written down.
    """

    methods: tuple[MethodSummary, ...]
    trunk_seeds: tuple[int, ...]
    branch_seeds: tuple[int, ...]
    n_layers: int
    boundary: int
    fresh: bool
    trunk_tokens: int
    branch_tokens: int
    tokens_per_step: int
    bytes_per_token: float
    valid_bytes: int
    xz_bits_per_byte: float
    plan: str
    command: str
    trunks: tuple[RunReference, ...]
    branches: tuple[RunReference, ...]
    form: str = ""
    domains: tuple[str, ...] = ()

    @property
    def controls(self) -> frozenset[str]:
        """Names of the arms that are no methods."""
        return frozenset(method.name for method in self.methods if method.is_control)

    @property
    def known(self) -> dict[str, str]:
        """How the controls of known sign are known to come out, by name."""
        return {method.name: method.known for method in self.methods if method.known is not None}

    @property
    def reordered(self) -> frozenset[str]:
        """Names of the arms that shift their seeds: they see other batches than the baseline."""
        return frozenset(method.name for method in self.methods if method.kind == "seed")

    @property
    def baseline(self) -> str:
        """Name of the method that the others are measured against."""
        return self.methods[0].name

    @property
    def about(self) -> str:
        """What a comparison's answer is confined to."""
        if not self.trunk_tokens:
            return f"{self.trained_blocks}, all of the tokens"
        share = self.branch_tokens / (self.trunk_tokens + self.branch_tokens)
        return f"{self.trained_blocks}, last {100 * share:.0f} % of the tokens"

    @property
    def trained_blocks(self) -> str:
        """The blocks that a method controls, as a reader would say it."""
        last = self.n_layers - 1
        if not self.boundary:
            return "all blocks"
        return f"block {last}" if self.boundary == last else f"blocks {self.boundary}-{last}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetPoint:
    """The same weights evaluated at another mean number of experts per token (in the layers above the boundary), as
    asked for and as used."""

    asked_experts: float
    mean_experts: float
    bits_per_byte: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class BranchResult:
    """`result.json` of a branch: what was measured on it when its training was over.

    Attributes:
        branch_seed: that it is paired by with the baseline's branch; the method may have shifted it for its draws.
        bits_per_byte: of the whole validation text.
        mean_experts: real experts per token and layer, over the layers above the boundary.
        asked_experts: what the method was asked to use in the mean, which need not be the baseline's number.
        experts_histogram: how many (token, layer) pairs above the boundary used 0, 1, 2, ... experts.
        budgets: the same weights at other budgets, ascending in experts.
        active_parameters, forward_flops: per token, of the whole network with the measured experts.
        scratch_flops: per token, forward, backward and update of the whole network: what this method costs when nothing
            is frozen.
        cache_bytes_4k, cache_bytes_64k: cache of one sequence of 4,096 and of 65,536 tokens, divided by its tokens.
        budget_tokens, budget_flops: how much of the validation text each budget was evaluated on, and what all of them
            cost.
    """

    method: str
    trunk_seed: int
    branch_seed: int
    bits_per_byte: float
    mean_experts: float
    asked_experts: float
    experts_histogram: tuple[int, ...]
    budgets: tuple[BudgetPoint, ...]
    total_parameters: int
    active_parameters: float
    forward_flops: float
    scratch_flops: float
    cache_bytes_4k: float
    cache_bytes_64k: float
    budget_tokens: int
    budget_flops: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """FLOPs and wall-clock seconds of one phase of one run."""

    flops: float
    seconds: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(flops=self.flops + other.flops, seconds=self.seconds + other.seconds)


@dataclasses.dataclass(frozen=True)
class RecordedRun:
    """One run folder.

    Attributes:
        folder: of the run.
        losses: of every step, in nats per token.
        experts: of every step, the mean number per token over the blocks that train.
        costs: by kind of work, see `staged_training.record.Ledger`.
        sections: the loss of each section of the validation text.
        diagnostics: of every step that ended an interval of progress; none where the run is from before they were
            written.
    """

    folder: Path
    losses: list[float]
    experts: list[float]
    costs: dict[str, Cost]
    sections: list[SectionLoss]
    diagnostics: list[StepDiagnostics]

    @property
    def bits_per_byte(self) -> float:
        """Of the whole validation text."""
        n_bytes = sum(section.n_bytes for section in self.sections)
        return math.fsum(section.nats for section in self.sections) / (n_bytes * math.log(2))


@dataclasses.dataclass(frozen=True)
class Records:
    """A comparison with all of its runs that have finished.

    Attributes:
        folder: of the comparison.
        environment: of its first run, a trunk's where there is one: commit, versions, device.
        trunks: by trunk seed; without those of `missing` and `damaged`.
        branches, results: the run and the measurements of each finished branch, by method and seeds.
        missing: folders of trunks that finished branches came from, and that are gone: their costs and curves are
            unknown.
        damaged: one sentence for each run that has finished and whose record is not as it was written.
    """

    folder: Path
    comparison: Comparison
    environment: dict[str, Any]
    trunks: dict[int, RecordedRun]
    branches: dict[str, dict[RunKey, RecordedRun]]
    results: dict[str, dict[RunKey, BranchResult]]
    missing: tuple[Path, ...]
    damaged: tuple[str, ...]

    @property
    def has_all_trunks(self) -> bool:
        """Whether the trunk of every finished branch is here, with its costs and its curve."""
        return {trunk_seed for runs in self.results.values() for trunk_seed, _ in runs} <= self.trunks.keys()

    @property
    def methods(self) -> list[str]:
        """Names of the methods with at least one finished branch, in the order of the table."""
        return [method.name for method in self.comparison.methods if self.results.get(method.name)]


def read_records(folder: Path) -> Records:
    """Reads a comparison folder.

    Args:
        folder: `<out>/comparisons/<hash>`.

    Returns:
        What has finished; branches without a result are left out, so a comparison can be looked at while it runs, and
        so are trunks that were removed to free space and runs that are damaged, which are named.

    Raises:
        ValueError: where `folder` holds no comparison, or no finished branch of its baseline.
    """
    if not (folder / COMPARISON_FILE).is_file():
        raise ValueError(f"{folder} holds no {COMPARISON_FILE}: not the folder of a comparison")
    try:
        check_seal(folder)
    except CorruptFileError as error:
        raise CorruptFileError(f"{error}. The command that made the comparison writes it again") from None
    comparison = load_json(Comparison, folder / COMPARISON_FILE)
    branches: dict[str, dict[RunKey, RecordedRun]] = {}
    results: dict[str, dict[RunKey, BranchResult]] = {}
    trunks: dict[int, RecordedRun] = {}
    missing, damaged = [], []
    for reference in (*comparison.branches, *comparison.trunks):
        run_folder, key = run_of(folder, reference), (reference.trunk_seed, reference.branch_seed)
        is_trunk = reference in comparison.trunks
        if not (run_folder / RESULT).is_file():
            if is_trunk:
                missing.append(reference)
            continue
        try:
            run = read_recorded_run(run_folder)
            if is_trunk:
                trunks[reference.trunk_seed] = run
                continue
            measured = load_json(BranchResult, run_folder / RESULT)
        except (ValueError, OSError) as error:
            damaged.append(str(error))
            continue
        # The run's ledger counts the FLOPs of its own evaluation; those of the other budgets are this layer's. It
        # holds their seconds already, because its stopwatch runs until the measurements are done.
        run.costs["evaluation"] += Cost(flops=measured.budget_flops, seconds=0.0)
        branches.setdefault(reference.method, {})[key] = run
        results.setdefault(reference.method, {})[key] = measured
    if comparison.baseline not in results:
        raise ValueError(
            "; ".join([f"{folder}: no finished branch of {comparison.baseline!r}, nothing to compare with", *damaged])
        )
    used = {trunk_seed for runs in results.values() for trunk_seed, _ in runs}
    first = next(iter([*trunks.values(), *branches[comparison.baseline].values()]))
    return Records(
        folder=folder,
        comparison=comparison,
        environment=read_json(first.folder / ENVIRONMENT),
        trunks=trunks,
        branches=branches,
        results=results,
        missing=tuple(run_of(folder, reference) for reference in missing if reference.trunk_seed in used),
        damaged=tuple(damaged),
    )


def run_of(folder: Path, reference: RunReference) -> Path:
    """Where a run of the comparison in `folder` lies."""
    return Path(os.path.normpath(folder / reference.folder))


def read_recorded_run(folder: Path) -> RecordedRun:
    """Reads the folder of a finished run; only what the report needs of it.

    Raises:
        CorruptFileError: where a file is not as it was written.
        ValueError: for a run whose validation text was not measured by sections.
    """
    check_run(folder)
    if not (folder / SECTIONS).is_file():
        raise ValueError(f"{folder} holds no {SECTIONS}: a run of before there was one; remove it and run it again")
    metrics, ledger = read_metrics(folder), Ledger.load(folder)
    try:
        return RecordedRun(
            folder=folder,
            losses=[line["loss"] for line in metrics],
            experts=[line["mean_experts"] for line in metrics],
            costs={kind: Cost(flops=cost["flops"], seconds=cost["seconds"]) for kind, cost in ledger.costs.items()},
            sections=read_rows(folder / SECTIONS, SectionLoss),
            diagnostics=read_diagnostics(folder),
        )
    except (KeyError, TypeError, AttributeError) as error:
        # Only in folders from before there were seals: what has one is as it was written.
        raise CorruptFileError(f"{folder}: {METRICS} or {LEDGER} lacks {error}") from error

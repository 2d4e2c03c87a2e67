"""What the scaling commands can be told, apart from what does it: the command line knows its options without libraries
for figures and statistics."""

import dataclasses
import math
from pathlib import Path

import tyro

from foundation.numbers import check_numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """Which column of a csv holds what.

    Attributes:
        loss: in nats per token, or any unit that is the same in all rows.
        total_params: parameters of the model.
        active_params: parameters that one token uses.
        tokens: trained on.
        flops: of training; where it is given, tokens are flops / (6 total_params) and no column of tokens is read.
        experts: number of experts, read where a law needs it, as the two that follow.
        granularity: width of a dense layer / width of an expert.
        density: share of the experts that a token uses.
        weight: of a point in the objective, 1 / variance of its loss say; all 1 without it.
        run: of curves, the column that names the run; a run's row of most tokens is its point.
    """

    loss: str = "loss"
    total_params: str = "total_params"
    active_params: str = "active_params"
    tokens: str = "tokens"
    flops: str | None = None
    experts: str = "experts"
    granularity: str = "granularity"
    density: str = "density"
    weight: str | None = None
    run: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How to fit a law to points.

    Attributes:
        points: csv, one row per trained model (or per step, see --columns.run); may be compressed with gzip.
        law: total, active, both, granularity, sparsity, routed, triad or experts, see notes/results/scaling.
        drop_highest: so many of the highest losses are left out; nothing else ever is.
        delta: log loss beyond which Huber's function is linear; 1 makes it least squares.
        resamples: of the bootstrap.
        out: folder of tables and figure; only printed without it.
    """

    points: tyro.conf.Positional[Path]
    law: str = "total"
    columns: Columns = dataclasses.field(default_factory=Columns)
    drop_highest: int = 0
    delta: float = 1e-3
    resamples: int = 400
    out: Path | None = None

    def __post_init__(self) -> None:
        check_numbers(self, drop_highest=0, delta=1e-9, resamples=20)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FormsOptions:
    """Compare laws on the points of a ladder by what they say of runs that they were not fitted to.

    Attributes:
        points: csv that `ladder` wrote; rows whose `held_out` is 1 are predicted and not fitted.
        laws: names, see `fit`; all by default.
        resamples: of the bootstrap.
        out: folder of tables and figure; only printed without it.
    """

    points: tyro.conf.Positional[Path]
    laws: tuple[str, ...] = ()
    resamples: int = 200
    out: Path | None = None

    def __post_init__(self) -> None:
        check_numbers(self, resamples=20)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What to train for a number of FLOPs under a fitted law.

    Attributes:
        fit: folder that `fit --out` wrote, of the law "total" or "active".
        flops: of training, one plan each.
        seconds: instead of FLOPs, one plan each.
        flops_per_second: that this machine trains at, as the cost ledger of a run shows it; with --seconds.
        noise: table that `noise --csv` wrote, for batch sizes.
        waste: share of the tokens that a batch may cost beyond those of small batches; with --noise the batch is this
            share of the gradient-noise scale.
        csv: where the table goes as well.
    """

    fit: tyro.conf.Positional[Path]
    flops: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()
    flops_per_second: float | None = None
    noise: Path | None = None
    waste: float = 0.1
    csv: Path | None = None

    def __post_init__(self) -> None:
        check_numbers_without_limit(self, "flops", "seconds", "flops_per_second", "waste")
        if bool(self.flops) == bool(self.seconds):
            raise ValueError("a plan needs either --flops or --seconds, at least one number")
        if bool(self.seconds) != (self.flops_per_second is not None):
            raise ValueError("--seconds and --flops-per-second need each other")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurvesOptions:
    """Fit a law of the loss at every step to curves of one model, and predict curves under other schedules.

    Attributes:
        curves: csv files to fit, each one run: its step, learning rate and loss in a row.
        test: csv files to predict.
        law: relaxation (ours), multi_power (arXiv 2503.12811) or momentum (arXiv 2408.11029).
        warmup: steps of a linear rise from 0 to the first row's rate, where rows begin behind it.
        step_column: name of the column of steps.
        rate_column: name of the column of learning rates.
        loss_column: name of the column of losses.
        delta: log loss beyond which Huber's function is linear; 1 makes it least squares.
        out: folder of tables and figure; only printed without it.
    """

    curves: tyro.conf.Positional[tuple[Path, ...]]
    test: tuple[Path, ...] = ()
    law: str = "relaxation"
    warmup: float = 0.0
    step_column: str = "step"
    rate_column: str = "lr"
    loss_column: str = "loss"
    delta: float = 1e-3
    out: Path | None = None

    def __post_init__(self) -> None:
        check_numbers(self, warmup=0, delta=1e-9)
        if not self.curves:
            raise ValueError("name at least one csv of a curve to fit")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Predict the loss of larger models at every step from a ladder of smaller ones, with 90 % intervals.

    Attributes:
        ladder: csv of all runs, a row per evaluation; at least three sizes, and the same tokens per parameter at each.
        targets: models to predict, as NAME=PARAMS or NAME=PARAMS:TOKENS_PER_BATCH.
        multiples: of 20 tokens per parameter, to predict each target at; those of the ladder.
        loss: names of the columns of losses, each predicted alone.
        run_column: name of the column that names the run.
        params_column: name of the column of parameters; counted alike in targets.
        tokens_column: name of the column of tokens seen so far.
        batch_column: name of the column of tokens per batch.
        batch_power: of the size, with which the ladder's rule of batches grows.
        warmup_per_param: tokens per parameter over which the rate rises; then it is half a cosine.
        floor: of the cosine, as a share of its peak.
        rows: of each predicted run, evenly over its training.
        out: folder of tables and figure; only printed without it.
    """

    ladder: tyro.conf.Positional[Path]
    targets: tuple[str, ...] = ()
    multiples: tuple[float, ...] = (1.0, 2.0, 5.0, 10.0)
    loss: tuple[str, ...] = ("loss",)
    run_column: str = "run"
    params_column: str = "params"
    tokens_column: str = "tokens"
    batch_column: str = "batch_tokens"
    batch_power: float = 2 / 3
    warmup_per_param: float = 1.0
    floor: float = 0.1
    rows: int = 100
    out: Path | None = None

    def __post_init__(self) -> None:
        check_numbers(self, multiples=0.01, batch_power=0, warmup_per_param=0, floor=0, rows=2)
        for target in self.targets:
            name, _, numbers = target.partition("=")
            parts = numbers.split(":")
            if not name or len(parts) > 2 or not all(_positive(part) for part in parts):
                raise ValueError(
                    f"--targets {target}: must be NAME=PARAMS or NAME=PARAMS:TOKENS_PER_BATCH, such as 3B=3.17e9"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Is a method still better at 10 and at 100 times the size? The difference of two laws, from a ladder of each.

    Attributes:
        method: its name in the column of methods.
        points: csv, a row per trained model; the method and the baseline at the same four sizes or more.
        baseline: name of what it is compared with.
        method_column: name of the column of methods.
        scale_column: name of the column of what grows along the ladder, the same for both: the baseline's FLOPs in the
            points of `ladder`; parameters, say.
        loss_column: name of the column of losses.
        seed_column: name of a column of seeds, by which the two are paired beside the scale.
        at: multiples of the ladder's largest scale, at which to say what the laws say.
        draws: of the bootstrap.
        out: folder of table and figure; only printed without it.
    """

    method: tyro.conf.Positional[str]
    points: tyro.conf.Positional[Path]
    baseline: str = "baseline"
    method_column: str = "method"
    scale_column: str = "scale"
    loss_column: str = "loss"
    seed_column: str | None = None
    at: tuple[float, ...] = (1.0, 10.0, 100.0)
    draws: int = 2000
    out: Path | None = None

    def __post_init__(self) -> None:
        check_numbers(self, at=1e-3, draws=100)
        if self.method == self.baseline:
            raise ValueError(f"{self.method} is the baseline; name a method to compare with it")


def _positive(text: str) -> bool:
    try:
        return math.isfinite(float(text)) and float(text) > 0
    except ValueError:
        return False


def check_numbers_without_limit(config: object, *names: str) -> None:
    """Refuses what is no positive finite number; FLOPs may be larger than `check_numbers` lets sizes be.

    Raises:
        ValueError: naming field and value.
    """
    for name in names:
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not (math.isfinite(number) and number > 0):
                raise ValueError(f"{type(config).__name__}.{name}: {number}, must be a positive finite number")

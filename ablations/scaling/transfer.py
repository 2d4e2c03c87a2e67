"""`python -m ablations scaling transfer`: whether the best learning rate of a small model is that of larger ones, with
CompleteP (`lm/parametrization.py`) and without.

    <out>/trunks/<hash>/     the runs
    <out>/scaling/<hash>/    transfer.csv (a row per run), optima.csv, transfer.png, transfer.txt

Every sweep begins with the same rates and goes on at an end where its lowest loss lies. What is finished is not trained
again, and the tables are written anew behind every run.
"""

import dataclasses
import itertools
import math
import shutil
from pathlib import Path

import numpy as np

from ablations.agreement.cost import speed
from ablations.comparison.cost import duration
from ablations.scaling.figure_transfer import draw_transfer
from ablations.scaling.ladder_plan import widened
from ablations.scaling.optimum import draw_optima, fit_parabola, interval
from ablations.scaling.transfer_options import TransferOptions
from corpus.prepare import PreparedCorpus, prepare
from foundation.files import fingerprint, write_text
from foundation.tables import write_rows
from lm.options import ModelOptions
from staged_training.execute import Execution
from staged_training.flops import planned
from staged_training.plan import Plan
from staged_training.record import RESULT
from staged_training.staging import corpus_facts, make_whole_plan
from staged_training.sweep import run_one

TRANSFER_FILE, OPTIMA_FILE, FIGURE_FILE, REPORT_FILE = "transfer.csv", "optima.csv", "transfer.png", "transfer.txt"
STANDARD, COMPLETE = "standard", "complete_p"
# A rate within this factor of the best loses little: what counts as the same optimum.
WITHIN = 1.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferRow:
    """A finished run; loss is bits per byte of the validation text, infinite where training did not stay finite."""

    parametrization: str
    width: int
    depth: int
    experts: int
    seed: int
    learning_rate: float
    loss: float
    seconds: float
    flops: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimumRow:
    """The best rate of one model.

    Attributes:
        rates: that were tried.
        optimum: by the parabola; low_95 and high_95 bound its interval.
        times_base: optimum / that of the base model; its interval low_times and high_times.
        lowest: loss at the optimum.
        lost: what the base's optimum loses to it, in bits per byte, by the parabola.
    """

    parametrization: str
    width: int
    depth: int
    experts: int
    rates: int
    optimum: float
    low_95: float
    high_95: float
    times_base: float
    low_times: float
    high_times: float
    lowest: float
    lost: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """One model under one parametrization. The base is the same model under both and trained once."""

    parametrization: str
    width: int
    depth: int
    experts: int
    model: ModelOptions

    @property
    def key(self) -> tuple[str, int, int, int]:
        """Names it among the others."""
        return self.parametrization, self.width, self.depth, self.experts


class Study:
    """All sweeps, on one text."""

    def __init__(self, options: TransferOptions) -> None:
        self.options = options
        self.corpus: PreparedCorpus = prepare(options.corpus, options.out / "corpus")
        self.facts = corpus_facts(self.corpus)
        base = widened(options.model, min(options.widths), min(options.depths))
        self.sweeps = [
            Sweep(parametrization=name, width=width, depth=depth, experts=experts, model=_model(base, name, *sizes))
            for name, *sizes in itertools.product(
                (STANDARD, COMPLETE), options.widths, options.depths, options.expert_counts
            )
            for width, depth, experts in [sizes]
        ]
        # All models are made before the first is trained: what does not fit is said at once.
        self.plans = {
            (sweep.key, rate, seed): self.plan(sweep, rate, seed)
            for sweep in self.sweeps
            for rate in options.learning_rates
            for seed in options.seeds
        }
        self.rows: dict[tuple, TransferRow] = {}

    @property
    def folder(self) -> Path:
        """Of tables and figure, named by the runs that are planned."""
        return self.options.out / "scaling" / fingerprint([plan.trunk_hash for plan in self.plans.values()])[:12]

    def plan(self, sweep: Sweep, rate: float, seed: int) -> Plan:
        """Of one run."""
        config = sweep.model.config(self.corpus.tokenizer.vocab_size, self.corpus.tokenizer.boundary_id)
        return make_whole_plan(self.options.staging(rate), self.facts, config, seed=seed)

    def execution(self, plan: Plan) -> Execution:
        """Of one run."""
        return Execution(plan, self.corpus, self.options.out, self.options.execution)

    def losses(self, sweep: Sweep) -> dict[float, float]:
        """Mean loss over seeds of each rate that was tried, ascending rates."""
        found: dict[float, list[float]] = {}
        for row in self.rows.values():
            if (row.parametrization, row.width, row.depth, row.experts) == sweep.key:
                found.setdefault(row.learning_rate, []).append(row.loss)
        return {rate: float(np.mean(found[rate])) for rate in sorted(found)}

    def next_rate(self, sweep: Sweep) -> float | None:
        """Beyond the end where the lowest loss lies; None where it lies inside or enough was tried."""
        losses = self.losses(sweep)
        rates = list(losses)
        best = min(range(len(rates)), key=lambda index: losses[rates[index]])
        if len(rates) >= self.options.most_rates or 0 < best < len(rates) - 1:
            return None
        return rates[0] ** 2 / rates[1] if best == 0 else rates[-1] ** 2 / rates[-2]

    def train(self, sweep: Sweep, rate: float) -> None:
        """Every seed at one rate; the table is written behind each."""
        for seed in self.options.seeds:
            plan = self.plans.get((sweep.key, rate, seed)) or self.plan(sweep, rate, seed)
            execution = self.execution(plan)
            found = run_one(execution)
            # Nothing goes on from there.
            shutil.rmtree(plan.trunk_run(execution.trunk_folder).checkpoints, ignore_errors=True)
            self.rows[sweep.key, rate, seed] = TransferRow(
                parametrization=sweep.parametrization,
                width=sweep.width,
                depth=sweep.depth,
                experts=sweep.experts,
                seed=seed,
                learning_rate=float(f"{rate:.6g}"),
                loss=found.bits_per_byte,
                seconds=found.seconds,
                flops=found.flops,
            )
            write_rows(self.folder / TRANSFER_FILE, TransferRow, self.rows.values())


def transfer_command(options: TransferOptions) -> list[OptimumRow]:
    """Prints the cost, trains what is not finished, and says where the optima lie.

    Raises:
        ValueError: for options, text or sizes that do not fit, and sweeps without three finite losses around the
            lowest.
        foundation.stopping.Interrupted: after a stop signal, with everything saved; the same call continues.
    """
    study = Study(options)
    print(cost_text(study), flush=True)
    if options.dry_run:
        return []
    # The rates of all models first, from the middle outwards: a study that is stopped has the most to say.
    middle = len(options.learning_rates) // 2
    for rate in sorted(options.learning_rates, key=lambda each: abs(options.learning_rates.index(each) - middle)):
        for sweep in study.sweeps:
            study.train(sweep, rate)
    for sweep in study.sweeps:
        while (rate := study.next_rate(sweep)) is not None:
            study.train(sweep, rate)
    rows = optimum_rows(study)
    text = "\n".join([*map(row_line, rows), "", *summary_lines(rows, options)])
    print(text)
    write_rows(study.folder / OPTIMA_FILE, OptimumRow, rows)
    write_text(study.folder / REPORT_FILE, text + "\n")
    draw_transfer(list(study.rows.values()), rows, study.folder / FIGURE_FILE)
    print(f"\ntransfer: {study.folder}")
    return rows


def cost_text(study: Study) -> str:
    """Runs, FLOPs and seconds of what is not finished, measured on a few steps of every size."""
    waiting: dict[str, tuple[Sweep, Plan]] = {}
    for (key, *_), plan in study.plans.items():
        sweep = next(sweep for sweep in study.sweeps if sweep.key == key)
        if not (study.execution(plan).trunk_folder / RESULT).exists():
            waiting.setdefault(plan.trunk_hash, (sweep, plan))
    rates: dict[tuple[int, int, int], float] = {}
    seconds = flops = 0.0
    for sweep, plan in waiting.values():
        size = sweep.key[1:]
        if size not in rates:
            rates[size] = speed(study.execution(plan))
        cost = planned(plan, None, cached=True).training
        seconds, flops = seconds + rates[size] * cost, flops + cost
    every = {plan.trunk_hash for plan in study.plans.values()}
    further = len(study.sweeps) * (study.options.most_rates - len(study.options.learning_rates))
    return (
        f"{len(study.sweeps)} sweeps, {len(every)} runs to begin with, {len(waiting)} to train now: {flops:.3g} FLOP,"
        f" {duration(seconds)} estimated from their first steps; at most"
        f" {further * len(study.options.seeds)} more where an optimum lies beyond the rates"
    )


def optimum_rows(study: Study) -> list[OptimumRow]:
    """Every sweep's optimum with its interval."""
    parabolas = {}
    for sweep in study.sweeps:
        own = [row for (key, *_), row in study.rows.items() if key == sweep.key]
        try:
            parabolas[sweep.key] = fit_parabola([row.learning_rate for row in own], [row.loss for row in own])
        except ValueError as error:
            raise ValueError(f"{sweep_name(sweep.key)}: {error}; see --learning-rates and --most-rates") from error
    freedom = sum(parabola.freedom for parabola in parabolas.values())
    # Without a fourth point anywhere nothing says how far losses scatter, and optima have no intervals.
    variance = sum(parabola.squares for parabola in parabolas.values()) / freedom if freedom else math.inf
    generator = np.random.default_rng(0)
    draws = {
        key: draw_optima(parabola, variance, freedom, study.options.draws, generator)
        if freedom
        else np.full(study.options.draws, math.nan)
        for key, parabola in parabolas.items()
    }
    rows = []
    for sweep in study.sweeps:
        # The base has the first number of experts.
        base = (
            sweep.parametrization,
            min(study.options.widths),
            min(study.options.depths),
            study.options.expert_counts[0],
        )
        parabola, own = parabolas[sweep.key], draws[sweep.key]
        low, high = interval(own)
        times = np.ones(len(own)) if sweep.key == base else own / draws[base]
        low_times, high_times = interval(times)
        rows.append(
            OptimumRow(
                parametrization=sweep.parametrization,
                width=sweep.width,
                depth=sweep.depth,
                experts=sweep.experts,
                rates=len(study.losses(sweep)),
                optimum=parabola.optimum,
                low_95=low,
                high_95=high,
                times_base=parabola.optimum / parabolas[base].optimum,
                low_times=low_times,
                high_times=high_times,
                lowest=parabola.lowest,
                lost=parabola(parabolas[base].optimum) - parabola.lowest,
            )
        )
    return rows


def sweep_name(key: tuple) -> str:
    """In words."""
    name, width, depth, experts = key
    return f"{name}, width {width}, {depth} layers, {experts} experts"


def row_line(row: OptimumRow) -> str:
    """An optimum in one line."""
    name = sweep_name((row.parametrization, row.width, row.depth, row.experts))
    return (
        f"{name:<52} {row.optimum:.2e} ({row.low_95:.2e} to {row.high_95:.2e}), {row.times_base:.2f}x the base's"
        f" ({row.low_times:.2f} to {row.high_times:.2f}); its rate would lose {row.lost:.4f}"
    )


def summary_lines(rows: list[OptimumRow], options: TransferOptions) -> list[str]:
    """By parametrization: how far optima lie from the base's, and what they go with."""
    lines = []
    for name in (STANDARD, COMPLETE):
        own = [row for row in rows if row.parametrization == name]
        far = max(own, key=lambda row: abs(math.log(row.times_base)) if math.isfinite(row.times_base) else math.inf)
        inside = [row for row in own if abs(math.log(row.times_base)) <= math.log(WITHIN)]
        beyond = [row for row in own if row.low_times > WITHIN or row.high_times < 1 / WITHIN]
        powers = drifts(own)
        lines.append(
            f"{name}: {len(inside)} of {len(own)} optima within a factor of {WITHIN:g} of the base's, {len(beyond)}"
            f" beyond it with their whole intervals; farthest {far.times_base:.2f}x; optimum as"
            f" {', '.join(f'{axis}^{power:+.2f}' for axis, power in powers.items()) or 'not told'}; the base's rate"
            " loses at most"
            f" {max(row.lost for row in own):.4f} bits per byte, {np.mean([row.lost for row in own]):.4f} in"
            " the mean"
        )
    return lines


def drifts(rows: list[OptimumRow]) -> dict[str, float]:
    """The powers of width, depth and number of experts that the optima go with, by least squares in logarithms; none
    where too few sweeps show an optimum."""
    known = [row for row in rows if math.isfinite(row.optimum)]
    axes = [name for name in ("width", "depth", "experts") if len({getattr(row, name) for row in known}) > 1]
    if len(known) <= len(axes) + 1:
        return {}
    columns = np.array([[1.0, *(math.log(getattr(row, axis)) for axis in axes)] for row in known])
    found, *_ = np.linalg.lstsq(columns, np.log([row.optimum for row in known]))
    return dict(zip(axes, found[1:].tolist()))


def _model(base: ModelOptions, name: str, width: int, depth: int, experts: int) -> ModelOptions:
    model = dataclasses.replace(widened(base, width, depth), n_experts=experts)
    # At the base's sizes the two are one, and trained once.
    if name == STANDARD or (width, depth) == (base.d_model, base.n_layers):
        return dataclasses.replace(model, parametrization=STANDARD)
    return dataclasses.replace(
        model,
        parametrization=COMPLETE,
        base_d_model=base.d_model,
        base_n_layers=base.n_layers,
        base_d_expert=base.d_expert,
        base_k=base.k,
    )

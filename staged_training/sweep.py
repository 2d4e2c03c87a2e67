"""`python -m staged_training sweep`: optimizers and learning rates on equal terms, one recorded run for each.

Every run is one stage over the whole of its budget, with an annealing of its own: bits per byte at fewer tokens, or in
fewer seconds, are those of a shorter run, not of a longer one before its end. Runs lie in `trunks/<hash>` of the
folder; what is finished is not run again.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated

import tyro

from corpus.prepare import CorpusConfig, prepare
from foundation.command import leave_options, refuse_unwritable
from foundation.numbers import check_numbers
from foundation.tables import write_rows
from lm.options import ModelOptions
from staged_training.execute import Execution, ExecutionConfig
from staged_training.loop import NonFiniteLossError
from staged_training.optimizer import Kind
from staged_training.staging import StagingConfig, corpus_facts, make_whole_plan, training_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Trains one model with every optimizer, learning rate, budget and seed that is named.

    Attributes:
        out: folder of the runs; the prepared text is kept in `corpus/` below it.
        optimizers: "adamw", "muon"; the one of `staging` when empty.
        learning_rates: peaks, the same for every optimizer; the one of `staging` when empty.
        token_budgets: each trained from the start; the one of `staging` when empty.
        seeds: runs of each, from seed 0 on: weights, data order, draws.
        csv: one row per run; `sweep.csv` in `out` by default.
        corpus: the text; this machine's Python standard library by default.
        model: the network; its vocabulary is the tokenizer's.
        staging: everything else of a run; the part of its budget behind `trunk_share` anneals.
        execution: saving, printing, tracking; nothing is cached.
    """

    out: Path = Path("runs/sweep")
    optimizers: tuple[Kind, ...] = ()
    learning_rates: tuple[float, ...] = ()
    token_budgets: tuple[int, ...] = ()
    seeds: int = 1
    csv: Path | None = None
    corpus: Annotated[CorpusConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=CorpusConfig)
    model: Annotated[ModelOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=ModelOptions)
    staging: Annotated[StagingConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=StagingConfig)
    execution: Annotated[ExecutionConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=ExecutionConfig
    )

    def __post_init__(self) -> None:
        check_numbers(self, seeds=1, token_budgets=1)
        if not all(rate > 0 for rate in self.learning_rates):
            raise ValueError(f"SweepConfig.learning_rates: {self.learning_rates}, must be above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepRow:
    """A finished run.

    Attributes:
        tokens: trained on.
        bits_per_byte: of the whole validation text; infinite where training did not stay finite.
        seconds: of its training steps, on the machine that trained it.
        flops: of its training.
        run: its folder.
    """

    optimizer: str
    learning_rate: float
    tokens: int
    seed: int
    bits_per_byte: float
    seconds: float
    flops: float
    run: str


def sweep(config: SweepConfig) -> None:
    """Runs whatever is not finished; the table is written anew behind every run.

    Raises:
        ValueError: for text, model or staging that do not fit, or a table that cannot be written.
        foundation.stopping.Interrupted: everything saved; the same call continues.
    """
    table = config.csv or config.out / "sweep.csv"
    refuse_unwritable("--csv", table)
    longest = dataclasses.replace(config.staging, tokens=max(config.token_budgets or (config.staging.tokens,)))
    corpus = training_text(prepare(config.corpus, config.out / "corpus"), longest)
    leave_options(config.out)
    model = config.model.config(corpus.tokenizer.vocab_size, corpus.tokenizer.boundary_id)
    facts = corpus_facts(corpus)
    # All of them before the first is trained: what does not fit is said at once.
    plans = [make_whole_plan(staging, facts, model, seed=seed) for staging, seed in runs_of(config)]
    rows: list[SweepRow] = []
    for number, plan in enumerate(plans, start=1):
        n_tokens = plan.trunk.n_batches * plan.tokens_per_batch
        print(f"run {number} of {len(plans)}: {n_tokens:,} tokens, seed {plan.trunk_seed}", flush=True)
        rows.append(run_one(Execution(plan, corpus, config.out, config.execution)))
        write_rows(table, SweepRow, rows)
    print(f"\n{sweep_text(rows)}\n\ntable: {table}")


def run_one(execution: Execution) -> SweepRow:
    """A run, trained now or before."""
    plan, folder = execution.plan, execution.trunk_folder
    kind, rate = plan.optimizer.kind, plan.trunk.schedule.peak
    run = dataclasses.replace(plan.trunk_run(folder), label=f"{kind} {rate:g}")
    bits_per_byte, cost = math.inf, {"seconds": math.nan, "flops": math.nan}
    try:
        if (record := execution.open(run)) is not None:
            print(f"{run.label}: finished before, taken from {folder}", flush=True)
        else:
            _, record = execution.train_trunk(run)
        bits_per_byte, cost = record.result["bits_per_byte"], record.ledger.costs["trunk"]
    except NonFiniteLossError as error:
        # A rate that is too high is an answer, and no reason to leave the others out.
        print(f"{run.label}: {error}", flush=True)
    return SweepRow(
        optimizer=kind,
        learning_rate=rate,
        tokens=plan.trunk.n_batches * plan.tokens_per_batch,
        seed=plan.trunk_seed,
        bits_per_byte=bits_per_byte,
        seconds=cost["seconds"],
        flops=cost["flops"],
        run=str(folder),
    )


def runs_of(config: SweepConfig) -> Iterable[tuple[StagingConfig, int]]:
    """The staging and seed of every run: smallest budget first, so that a stopped sweep has compared something."""
    for tokens in sorted(config.token_budgets or (config.staging.tokens,)):
        for seed in range(config.seeds):
            for rate in config.learning_rates or (config.staging.learning_rate,):
                for kind in config.optimizers or (config.staging.optimizer.kind,):
                    optimizer = dataclasses.replace(config.staging.optimizer, kind=kind)
                    yield (
                        dataclasses.replace(config.staging, tokens=tokens, learning_rate=rate, optimizer=optimizer),
                        seed,
                    )


def sweep_text(rows: Sequence[SweepRow]) -> str:
    """For people: means over seeds, one line per optimizer, budget and rate; a star marks an optimizer's best rate."""
    by_setting: dict[tuple[str, int, float], list[SweepRow]] = {}
    for row in rows:
        by_setting.setdefault((row.optimizer, row.tokens, row.learning_rate), []).append(row)
    means = {setting: fmean(row.bits_per_byte for row in same) for setting, same in by_setting.items()}
    lines = [f"{'optimizer':<10}{'tokens':>12}{'seconds':>10}{'rate':>10}{'bpb':>9}{'lowest':>9}{'highest':>9}"]
    for (optimizer, tokens, rate), same in sorted(by_setting.items()):
        values = [row.bits_per_byte for row in same]
        mean = means[optimizer, tokens, rate]
        best = min(value for setting, value in means.items() if setting[:2] == (optimizer, tokens))
        lines.append(
            f"{optimizer:<10}{tokens:>12,}{fmean(row.seconds for row in same):>10.1f}{rate:>10g}{mean:>9.4f}"
            f"{min(values):>9.4f}{max(values):>9.4f}{' *' if mean == best else ''}"
        )
    return "\n".join(lines)

"""The runs of a ladder, before any is trained: models, plans, and what they cost."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

from ablations.agreement.cost import speed
from ablations.comparison.cost import duration
from ablations.comparison.registry import find_methods
from ablations.method import Method
from ablations.report.table import with_unit
from ablations.scaling.ladder_options import LadderOptions
from corpus.prepare import PreparedCorpus, prepare
from foundation.files import fingerprint
from lm.accounting import model_cost
from lm.options import ModelOptions
from staged_training.execute import Execution
from staged_training.flops import planned
from staged_training.plan import Plan
from staged_training.record import RESULT
from staged_training.staging import corpus_facts, make_whole_plan

# A dense layer is this many times as wide as the model, for granularity.
DENSE = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rung:
    """One run of the ladder.

    Attributes:
        name: its method and sizes.
        folder: where it lies or will lie.
        held_out: predicted before it is trained.
        total_params, active_params: without the embedding, which is a lookup.
        granularity: width of a dense layer / width of an expert.
        density: share of the experts that a token uses.
        flops: of training.
        scale: FLOPs of the baseline's run of the same sizes, by which methods are paired.
    """

    name: str
    method: str
    seed: int
    plan: Plan
    folder: Path
    held_out: bool
    total_params: float
    active_params: float
    tokens: int
    experts: int
    granularity: float
    density: float
    flops: float
    scale: float

    @property
    def run(self) -> str:
        """Its name, as `points.csv` calls it."""
        return self.name

    @property
    def finished(self) -> bool:
        """Whether it has its result."""
        return (self.folder / RESULT).exists()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ladder:
    """All runs, cheapest first, and the text that they are trained on."""

    options: LadderOptions
    corpus: PreparedCorpus
    rungs: list[Rung]

    @functools.cached_property
    def folder(self) -> Path:
        """Of points and predictions, named by the runs."""
        identity = [[rung.plan.trunk_identity, rung.held_out] for rung in self.rungs]
        return self.options.out / "scaling" / fingerprint(identity)[:12]

    def execution(self, rung: Rung) -> Execution:
        """Of one run."""
        return Execution(rung.plan, self.corpus, self.options.out, self.options.execution)


def prepare_ladder(options: LadderOptions) -> Ladder:
    """Prepares the text and plans all runs; trains nothing.

    Raises:
        ValueError: for text, models or methods that do not fit, and where none but held-out runs are left.
    """
    corpus = prepare(options.corpus, options.out / "corpus")
    rungs = []
    for name in dict.fromkeys(options.methods):
        (method,) = [method for method in find_methods([name]) if method.name == name]
        own = [
            _rung(options, corpus, method, model, tokens, options.seed + number)
            for model, tokens in dict.fromkeys(_models(options))
            for number in range(options.seeds)
        ]
        own.sort(key=lambda rung: rung.flops)
        first_held = len(own) - options.held_out
        if first_held < 1:
            raise ValueError(f"LadderOptions.held_out: {options.held_out} of {len(own)} runs, must leave at least one")
        rungs += [dataclasses.replace(rung, held_out=index >= first_held) for index, rung in enumerate(own)]
    return Ladder(options=options, corpus=corpus, rungs=sorted(rungs, key=lambda rung: rung.flops))


def _models(options: LadderOptions) -> Iterator[tuple[ModelOptions, int]]:
    """Every width and depth at every budget, then experts, at the first."""
    base = options.model
    sizes = [(width, base.n_layers) for width in options.widths] + [(base.d_model, depth) for depth in options.depths]
    for tokens in options.token_budgets:
        for width, depth in sizes:
            yield widened(base, width, depth), tokens
    tokens = options.token_budgets[0]
    for count in options.expert_counts:
        yield dataclasses.replace(base, n_experts=count), tokens
    for k in options.experts_per_token:
        yield dataclasses.replace(base, k=k), tokens
    for width in options.expert_widths:
        yield _granular(base, width), tokens


def _granular(base: ModelOptions, width: int) -> ModelOptions:
    """The base with experts of another width, and as many parameters and as many active ones."""
    numbers = {name: getattr(base, name) * base.d_expert for name in ("n_experts", "k")}
    for name, product in numbers.items():
        if product % width:
            raise ValueError(f"LadderOptions.expert_widths: {width}, {name} would be {product / width:g}")
    return dataclasses.replace(base, d_expert=width, **{name: product // width for name, product in numbers.items()})


def widened(base: ModelOptions, width: int, depth: int) -> ModelOptions:
    """The base at another width: heads as wide as before, as many more of them as the model is wider, and experts as
    many times as wide."""
    scaled = {name: getattr(base, name) * width for name in ("n_heads", "n_kv_heads", "d_expert", "d_shared")}
    for name, product in scaled.items():
        if product % base.d_model:
            raise ValueError(
                f"--widths: {width}, {name} would be {product / base.d_model:g}; a multiple of"
                f" {base.d_model // base.n_kv_heads} fits"
            )
    numbers = {name: product // base.d_model for name, product in scaled.items()}
    return dataclasses.replace(base, d_model=width, n_layers=depth, **numbers)


def _rung(
    options: LadderOptions, corpus: PreparedCorpus, method: Method, model: ModelOptions, tokens: int, seed: int
) -> Rung:
    same = model.config(corpus.tokenizer.vocab_size, corpus.tokenizer.boundary_id)
    config = method.change(same)
    facts, staging = corpus_facts(corpus), options.staging(tokens)
    plan = make_whole_plan(staging, facts, config, seed=seed)
    baseline = make_whole_plan(staging, facts, same, seed=seed)
    cost = model_cost(config, length=options.seq_len, mean_experts=float(model.k))
    # Where experts have another share of the width than the base's.
    granular = model.d_expert * options.model.d_model != options.model.d_expert * model.d_model
    return Rung(
        name=(
            f"{method.name}_w{model.d_model}_l{model.n_layers}_e{model.n_experts}_k{model.k}_t{tokens}"
            f"{f'_f{model.d_expert}' * granular}{f'_s{seed}' * (options.seeds > 1)}"
        ),
        seed=seed,
        method=method.name,
        plan=plan,
        folder=Execution(plan, corpus, options.out, options.execution).trunk_folder,
        held_out=False,
        total_params=float(cost.total_parameters - cost.embedding_parameters),
        active_params=float(cost.active_parameters),
        tokens=plan.trunk.n_batches * plan.tokens_per_batch,
        experts=model.n_experts,
        granularity=DENSE * model.d_model / model.d_expert,
        density=model.k / model.n_experts,
        flops=planned(plan, None, cached=False).training,
        scale=planned(baseline, None, cached=False).training,
    )


def cost_text(ladder: Ladder, to_train: Sequence[Rung]) -> str:
    """All runs with their FLOPs, and the seconds of those that are to train, measured on a few steps of each size."""
    lines = [f"{'run':<44}{'active':>9}{'total':>9}{'tokens':>9}{'FLOPs':>10}"]
    rates: dict[tuple, float] = {}
    seconds = 0.0
    for rung in ladder.rungs:
        state = "finished" if rung.finished else "held out" if rung.held_out else ""
        lines.append(
            f"{rung.name:<44}{with_unit(rung.active_params):>9}{with_unit(rung.total_params):>9}"
            f"{with_unit(rung.tokens):>9}{rung.flops:>10.3g}  {state}".rstrip()
        )
    for rung in to_train:
        key = (rung.method, rung.active_params, rung.total_params)
        if key not in rates:
            rates[key] = speed(ladder.execution(rung))
        seconds += rates[key] * rung.flops
    lines.append(
        f"{len(ladder.rungs)} runs, {len(to_train)} to train now, {duration(seconds)} estimated from their first steps"
    )
    return "\n".join(lines)

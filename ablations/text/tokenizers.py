"""`python -m ablations tokenizers`: the choice of a tokenizer by bits per byte of a small model at equal compute.

A larger vocabulary makes sequences shorter and every token dearer: its share of the head, whose products most of a
small model's are. So each tokenizer's model is trained for as many tokens as a number of FLOPs pays for, on the same
documents, and evaluated on the same validation documents, whose bytes do not depend on a tokenizer.
"""

import dataclasses
from collections.abc import Sequence

from ablations.comparison.statistics import t_interval
from ablations.text.differences import TextRow, difference_text, differences
from ablations.text.options import TokenizerOptions
from ablations.text.runs import MICRO, train_whole
from corpus.prepare import PreparedCorpus, prepare
from foundation.command import leave_options
from foundation.tables import write_rows
from lm.config import ModelConfig
from staged_training.flops import assumed_experts, trunk_flops, whole_flops
from staged_training.plan import Plan
from staged_training.staging import StagingConfig, corpus_facts, make_plan, make_whole_plan, training_text

RUNS_FILE, CHOICE_FILE = "runs.csv", "tokenizer_choice.csv"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChoiceRow:
    """One tokenizer.

    Attributes:
        bytes_per_token: of the validation text.
        tokens: that its model is trained on.
        flops: of that training.
        passes: over the training text.
        bits_per_byte: of the validation text, mean over seeds, with a 95 % interval by Student's t.
        against_best, low_against_best, high_against_best: its difference to the tokenizer of fewest bits, paired by
            seed.
    """

    tokenizer: str
    vocab_size: int
    bytes_per_token: float
    tokens: int
    flops: float
    passes: float
    bits_per_byte: float
    low: float
    high: float
    against_best: float
    low_against_best: float
    high_against_best: float


def choose_tokenizer(options: TokenizerOptions) -> list[ChoiceRow]:
    """Trains what is not finished, prints, and leaves the tables in `out`; fewest bits first.

    Raises:
        ValueError: for text, tokenizers, model or staging that do not fit.
        foundation.stopping.Interrupted: everything saved; the same call continues.
    """
    prepared: dict[str, PreparedCorpus] = {}
    for size in options.vocab_sizes:
        config = dataclasses.replace(options.corpus, vocab_size=size, tokenizer_file=None)
        prepared[f"ours {size}"] = prepare(config, options.out / "corpus")
    for file in options.tokenizer_files:
        config = dataclasses.replace(options.corpus, vocab_size=None, tokenizer_file=file)
        prepared[file] = prepare(config, options.out / "corpus")
    leave_options(options.out)
    plans = {name: plans_of(options, corpus) for name, corpus in prepared.items()}
    rows: list[TextRow] = []
    for seed in range(options.seeds):
        for name, corpus in prepared.items():
            plan = plans[name][seed]
            tokens = plan.trunk.n_batches * plan.tokens_per_batch
            print(f"\n{name}, seed {seed}: {tokens:,} tokens, {flops_of(plan):.3g} FLOPs", flush=True)
            text = training_text(corpus, staging_of(options, tokens))
            found = train_whole(plan, text, options.out, options.execution, corpus.valid_domains())
            rows += [TextRow(name, seed, domain, bits) for domain, bits in found.items()]
            write_rows(options.out / RUNS_FILE, TextRow, rows)
    choice = choice_rows(rows, prepared, plans)
    write_rows(options.out / CHOICE_FILE, ChoiceRow, choice)
    best, *others = (row.tokenizer for row in choice)
    against = differences(rows, [(other, best) for other in others])
    print(f"\n{difference_text(rows, against)}\n\n{choice_text(choice)}\n\ntables: {options.out}")
    return choice


def staging_of(options: TokenizerOptions, tokens: int) -> StagingConfig:
    """The staging of a run of so many tokens."""
    return dataclasses.replace(options.staging, tokens=tokens)


def plans_of(options: TokenizerOptions, corpus: PreparedCorpus) -> list[Plan]:
    """A run of each seed, of as many tokens as the FLOPs pay for."""
    model = options.model.config(corpus.tokenizer.vocab_size, corpus.tokenizer.boundary_id)
    tokens_per_batch = options.staging.batch_size * options.staging.seq_len
    n_batches = int(options.train_flops // batch_flops(options, corpus, model))
    if n_batches < 2:
        raise ValueError(
            f"--train-flops {options.train_flops:g}: less than two batches of a vocabulary of {model.vocab_size};"
            f" legal: at least {2 * batch_flops(options, corpus, model):.2g}"
        )
    staging = staging_of(options, n_batches * tokens_per_batch)
    facts = corpus_facts(training_text(corpus, staging))
    return [make_whole_plan(staging, facts, model, seed=seed) for seed in range(options.seeds)]


def batch_flops(options: TokenizerOptions, corpus: PreparedCorpus, model: ModelConfig) -> float:
    """Of training on one batch."""
    staging = dataclasses.replace(options.staging, mixture=None, epoch_cap=None)
    plan = make_plan(staging, corpus_facts(corpus), model, [])
    return whole_flops(plan, model, assumed_experts(model), n_batches=1)


def flops_of(plan: Plan) -> float:
    """Of a run's training."""
    return trunk_flops(plan, assumed_experts(plan.model))


def choice_rows(
    rows: Sequence[TextRow], prepared: dict[str, PreparedCorpus], plans: dict[str, list[Plan]]
) -> list[ChoiceRow]:
    """Fewest bits first."""
    of: dict[str, list[float]] = {}
    for row in rows:
        if row.domain == MICRO:
            of.setdefault(row.arm, []).append(row.bits_per_byte)
    best = min(of, key=lambda name: sum(of[name]))
    found = []
    for name, bits in of.items():
        own, corpus, plan = t_interval(bits), prepared[name], plans[name][0]
        other = t_interval([a - b for a, b in zip(bits, of[best])])
        assert own.half_width is not None
        assert other.half_width is not None
        tokens = plan.trunk.n_batches * plan.tokens_per_batch
        found.append(
            ChoiceRow(
                tokenizer=name,
                vocab_size=corpus.tokenizer.vocab_size,
                bytes_per_token=corpus.valid.n_bytes / len(corpus.valid),
                tokens=tokens,
                flops=flops_of(plan),
                passes=tokens / len(corpus.train),
                bits_per_byte=own.mean,
                low=own.mean - own.half_width,
                high=own.mean + own.half_width,
                against_best=other.mean,
                low_against_best=other.mean - other.half_width,
                high_against_best=other.mean + other.half_width,
            )
        )
    return sorted(found, key=lambda row: row.bits_per_byte)


def choice_text(rows: Sequence[ChoiceRow]) -> str:
    """One line per tokenizer, fewest bits first."""
    lines = [
        f"{'tokenizer':<24}{'size':>8}{'bytes/token':>13}{'tokens':>12}{'FLOPs':>10}{'bits per byte, 95 %':>28}"
        f"{'against the best':>30}"
    ]
    for row in rows:
        bits = f"{row.bits_per_byte:.4f} [{row.low:.4f}, {row.high:.4f}]"
        against = f"{row.against_best:+.4f} [{row.low_against_best:+.4f}, {row.high_against_best:+.4f}]"
        lines.append(
            f"{row.tokenizer[-24:]:<24}{row.vocab_size:>8,}{row.bytes_per_token:>13.3f}{row.tokens:>12,}"
            f"{row.flops:>10.3g}{bits:>28}{against if row is not rows[0] else '':>30}"
        )
    return "\n".join(lines)

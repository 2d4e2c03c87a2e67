"""From a token budget and a list of methods to a plan."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from corpus.mixed_tokens import MixedTokens
from corpus.prepare import PreparedCorpus
from corpus.shares import capped, read_shares
from foundation.files import fingerprint
from foundation.numbers import check_numbers
from lm.budget import CALIBRATION_TOKENS
from lm.config import ModelConfig
from staged_training.boundary import choose_cut, compose
from staged_training.code import code_behind
from staged_training.optimizer import OptimizerConfig
from staged_training.plan import Branch, CorpusFacts, Plan
from staged_training.schedule import Anneal, Schedule, Stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagingConfig:
    """How a token budget is spent.

    Attributes:
        tokens: budget of one method: trunk plus one branch.
        mixture: the share of every domain in the tokens of the training text: natural, uniform, temperature=2,
            prose=.5,code=.5 or a file of them, .toml or .csv; the text as it was prepared unless told. A document's
            domain is its field `domain`, or the name of its file.
        epoch_cap: how often a mixture reads a domain at the most; what a domain cannot fill goes to the others.
        trunk_share: share of it that is trained once, in the trunk; 0 trains every branch whole, from fresh blocks.
        freeze: share of the parameters below the boundary, frozen in the branches; 0 branches the whole network. Where
            half of them were frozen, branches could not be told from guessing the order of full runs
            (notes/results/agreement).
        batch_size: rows of a batch.
        seq_len: tokens of a row.
        calibration_tokens: of the training text, kept out of training to calibrate budgets on; at most a twentieth of
            it.
        learning_rate: peak, of the trunk and of each branch.
        warmup_share: share of the trunk's steps that warm up; it then stays at the peak. Without a trunk, of every
            branch's.
        whole_decay_share: share of a branch's steps that decay, its last, where there is no trunk.
        branch_warmup_share: the same for a branch with fresh blocks; the rest of the branch decays to zero. Any other
            branch goes on with the trunk's optimizer and decays from its first step on.
        decay_shape: "linear" or "1-sqrt".
        anneal: how a branch ends: "decay" lowers its rate to zero, "merge" keeps the rate and averages the weights of
            the steps that would decay, by the decay's shape (arXiv 2507.17634).
        trunk_merge_share: share of the trunk's steps, its last, whose weights are averaged likewise into those that
            branches start from; 0 for the last weights themselves.

    Raises:
        ValueError: for a share outside its range, a size below 1 or a learning rate that is not positive.
    """

    tokens: int = 500_000
    mixture: str | None = None
    epoch_cap: float | None = None
    trunk_share: float = 0.85
    freeze: float = 0.0
    batch_size: int = 4
    seq_len: int = 256
    calibration_tokens: int = CALIBRATION_TOKENS
    learning_rate: float = 7e-3
    warmup_share: float = 0.05
    whole_decay_share: float = 0.15
    branch_warmup_share: float = 0.1
    decay_shape: str = "linear"
    anneal: Annotated[Anneal, tyro.conf.arg(prefix_name=False)] = "decay"
    trunk_merge_share: float = 0.0
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        shares = ("trunk_share", "freeze", "warmup_share", "whole_decay_share", "branch_warmup_share")
        for name in (*shares, "trunk_merge_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"StagingConfig.{name}: {getattr(self, name)}, must be 0 or more and below 1")
        if self.freeze and not self.trunk_share:
            raise ValueError(f"StagingConfig.freeze: {self.freeze} without a trunk (trunk_share 0); legal: 0")
        if self.warmup_share + self.whole_decay_share > 1:
            raise ValueError(
                f"StagingConfig.whole_decay_share: {self.whole_decay_share} beside a warmup_share of"
                f" {self.warmup_share}, must not be above 1 together"
            )
        if self.learning_rate <= 0:
            raise ValueError(f"StagingConfig.learning_rate: {self.learning_rate}, must be above 0")
        check_numbers(self, tokens=1, batch_size=1, seq_len=1, calibration_tokens=1)
        if self.epoch_cap is not None and not self.epoch_cap > 0:
            raise ValueError(f"StagingConfig.epoch_cap: {self.epoch_cap}, must be above 0")


def training_text(corpus: PreparedCorpus, config: StagingConfig, *, longest: int = 1) -> PreparedCorpus:
    """The corpus with the training text that a staging asks for: as it was prepared, or mixed, and then as long as the
    budget, so that no batch comes twice.

    Args:
        longest: how many times as long as the others the longest branch is.

    Raises:
        ValueError: for a mixture that the corpus does not have.
    """
    if config.mixture is None:
        return corpus
    return mixed_text(corpus, config, read_shares(config.mixture, corpus.domain_tokens()), longest=longest)


def mixed_text(
    corpus: PreparedCorpus, config: StagingConfig, shares: Mapping[str, float], *, longest: int = 1
) -> PreparedCorpus:
    """See `training_text`; with these shares of all domains, which sum to one.

    Raises:
        ValueError: where they cannot be filled within `epoch_cap`.
    """
    tokens_per_batch = config.batch_size * config.seq_len
    total = config.tokens // tokens_per_batch
    branch = total - round(total * config.trunk_share)
    n_batches = total + branch * (longest - 1) + -(-config.calibration_tokens // tokens_per_batch)
    # The last token of a text has no target.
    length = max(n_batches, 2) * tokens_per_batch + 1
    if config.epoch_cap is not None:
        shares = capped(shares, corpus.domain_tokens(), length=length, cap=config.epoch_cap)
    mixed = corpus.mixed(shares, length)
    assert isinstance(mixed.train, MixedTokens)
    print("\n".join(mixed.train.lines()), flush=True)
    return mixed


def corpus_facts(corpus: PreparedCorpus) -> CorpusFacts:
    """What a plan needs to know of a prepared corpus; the hash covers documents, split and tokenizer."""
    hashes = [corpus.manifest.tokenizer_hash, *(split.fingerprint() for split in (corpus.train, corpus.valid))]
    return CorpusFacts(
        content_hash=fingerprint(hashes),
        train_tokens=len(corpus.train),
        train_bytes=corpus.train.n_bytes,
        valid_tokens=len(corpus.valid),
        valid_bytes=corpus.valid.n_bytes,
        mixture=corpus.train.shares if isinstance(corpus.train, MixedTokens) else {},
    )


def make_plan(
    config: StagingConfig,
    corpus: CorpusFacts,
    model: ModelConfig,
    branches: Sequence[tuple[str, ModelConfig, int]],
    *,
    trunk_seed: int = 0,
    rounding: Collection[str] = (),
    lengths: Mapping[str, int] | None = None,
    sources: Mapping[str, Mapping[str, Path]] | None = None,
) -> Plan:
    """A trunk and its branches.

    Args:
        model: the trunk's.
        branches: name of the method, its model as if nothing were frozen, and the seed.
        rounding: names of the methods whose branches start from weights that differ by rounding.
        lengths: by method, how many times as long as the others its branches are.
        sources: by method, files that its results depend on beside those of training, see `code.code_behind`.

    Raises:
        ValueError: when the budget is too small for one batch per stage or the text for two batches, or a method does
            not fit the trunk.
    """
    if config.epoch_cap is not None and config.mixture is None:
        raise ValueError(f"StagingConfig.epoch_cap: {config.epoch_cap} without a mixture; legal: only with one")
    if (config.mixture is None) == bool(corpus.mixture):
        raise ValueError(f"StagingConfig.mixture: {config.mixture}; this command trains on text as it was prepared")
    tokens_per_batch = config.batch_size * config.seq_len
    # The last token of a text has no target.
    if (corpus.train_tokens - 1) // tokens_per_batch < 2:
        raise ValueError(
            f"StagingConfig.batch_size, StagingConfig.seq_len: {config.batch_size} x {config.seq_len} tokens per batch;"
            f" the training text has {corpus.train_tokens} tokens, too few for a batch to train on and one to"
            " calibrate on"
        )
    if model.document_boundary is not None and config.freeze:
        raise ValueError(
            f"StagingConfig.freeze: {config.freeze} with isolated documents: what a frozen prefix stores does not say"
            " where they begin; legal: 0"
        )
    total = config.tokens // tokens_per_batch
    trunk_batches = round(total * config.trunk_share)
    branch_batches = total - trunk_batches
    if branch_batches < 1 or (config.trunk_share and trunk_batches < 1):
        raise ValueError(
            f"StagingConfig.tokens: {config.tokens} is {total} batches of {config.batch_size} x {config.seq_len}, "
            f"too few for a trunk ({config.trunk_share:.0%}) and a branch of at least one batch each"
        )
    trunk = Stage(
        n_batches=trunk_batches,
        schedule=Schedule(
            peak=config.learning_rate,
            warmup_steps=round(trunk_batches * config.warmup_share),
            decay_steps=round(trunk_batches * config.trunk_merge_share),
            decay_shape=config.decay_shape,
            anneal="merge" if config.trunk_merge_share else "decay",
        ),
    )
    n_calibration = max(
        1, min(-(-config.calibration_tokens // tokens_per_batch), corpus.train_tokens // tokens_per_batch // 20)
    )
    cut = choose_cut(model, {name: method for name, method, _ in branches}, config.freeze) if branches else None
    if cut is not None and not config.trunk_share:
        cut = dataclasses.replace(
            cut, fresh=True, reasons=("no trunk: every branch is trained whole, from fresh blocks",)
        )
    return Plan(
        corpus=corpus,
        model=model,
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        n_calibration=n_calibration,
        trunk=trunk,
        trunk_seed=trunk_seed,
        optimizer=config.optimizer,
        branches=tuple(
            Branch(
                method=name,
                seed=seed,
                model=compose(model, method, cut.boundary),
                stage=_branch_stage(config, branch_batches * (lengths or {}).get(name, 1), fresh=cut.fresh),
                boundary=cut.boundary,
                fresh=cut.fresh,
                rounding=name in rounding,
                code=code_behind(compose(model, method, cut.boundary), (sources or {}).get(name)),
            )
            for name, method, seed in branches
            if cut is not None
        ),
        decisions=cut.reasons if cut is not None else (),
        code=code_behind(model),
    )


def _branch_stage(config: StagingConfig, n_batches: int, *, fresh: bool) -> Stage:
    """Decays to the end, where blocks are fresh behind a warm-up; without a trunk it stays at the peak in between."""
    warmup = round(n_batches * config.branch_warmup_share) if fresh else 0
    decay = n_batches - warmup
    if not config.trunk_share:
        warmup, decay = round(n_batches * config.warmup_share), round(n_batches * config.whole_decay_share)
    schedule = Schedule(
        peak=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=decay,
        decay_shape=config.decay_shape,
        anneal=config.anneal,
    )
    return Stage(n_batches=n_batches, schedule=schedule)


def make_whole_plan(config: StagingConfig, corpus: CorpusFacts, model: ModelConfig, *, seed: int) -> Plan:
    """The whole budget in one stage that anneals over the share behind `trunk_share`, without branches.

    Raises:
        ValueError: see `make_plan`.
    """
    plan = make_plan(config, corpus, model, [], trunk_seed=seed)
    n_batches = config.tokens // plan.tokens_per_batch
    schedule = dataclasses.replace(
        plan.trunk.schedule,
        decay_steps=n_batches - plan.trunk.n_batches,
        decay_shape=config.decay_shape,
        anneal=config.anneal,
    )
    return dataclasses.replace(plan, trunk=Stage(n_batches=n_batches, schedule=schedule))

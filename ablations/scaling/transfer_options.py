"""What a study of transfer can be told: which sizes, which learning rates, and for how long."""

import dataclasses
import itertools
from pathlib import Path
from typing import Annotated

import tyro

from corpus.prepare import CorpusConfig
from foundation.numbers import check_numbers
from lm.options import ModelOptions
from staged_training.execute import ExecutionConfig
from staged_training.optimizer import OptimizerConfig
from staged_training.staging import StagingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferOptions:
    """Sweep the learning rate at several widths, depths and numbers of experts, with CompleteP and without: whether
    the best rate of the smallest model is that of the others.

    The smallest width and depth are the base: rates are scaled from there, whatever --base-d-model and the like say.

    Attributes:
        widths: of models; heads and experts' widths grow with them.
        depths: numbers of blocks.
        expert_counts: numbers of experts, of which a token uses --k at each.
        learning_rates: peaks that every sweep begins with, each at least 1.2 times the one before.
        most_rates: a sweep whose lowest loss is its first or last rate goes on beyond it, by the same factor, to so
            many rates.
        seeds: of weights and data order; a sweep is repeated with each.
        draws: for intervals of optima.
        out: folder of all runs, shared with `compare` and `ladder`.
        dry_run: print runs and cost, and train nothing.
        tokens: that every model is trained on.
        batch_size: rows of a batch.
        seq_len: tokens of a row.
        optimizer: AdamW or Muon beside AdamW, and their options.
    """

    widths: tuple[int, ...] = (16, 32, 64)
    depths: tuple[int, ...] = (2, 6)
    expert_counts: tuple[int, ...] = (8, 32)
    learning_rates: tuple[float, ...] = (8e-3, 16e-3, 32e-3, 64e-3)
    most_rates: int = 8
    seeds: tuple[int, ...] = (0,)
    draws: int = 1000
    out: Path = Path("runs")
    dry_run: bool = False
    tokens: int = 24_576
    batch_size: int = 4
    seq_len: int = 128
    optimizer: OptimizerConfig = dataclasses.field(default_factory=lambda: OptimizerConfig(kind="adamw"))
    model: Annotated[ModelOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=lambda: ModelOptions(
            n_layers=2,
            d_model=16,
            layer_plan="SF",
            n_heads=2,
            n_kv_heads=1,
            head_dim=8,
            n_experts=8,
            d_expert=4,
            k=4,
        )
    )
    corpus: Annotated[CorpusConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=lambda: CorpusConfig(vocab_size=1024, valid_share=0.009)
    )
    execution: Annotated[ExecutionConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=ExecutionConfig
    )

    def __post_init__(self) -> None:
        check_numbers(
            self,
            widths=1,
            depths=1,
            expert_counts=1,
            learning_rates=1e-12,
            most_rates=3,
            seeds=0,
            draws=100,
            batch_size=1,
            seq_len=1,
            tokens=1,
        )
        for name in ("widths", "depths", "expert_counts", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"TransferOptions.{name}: empty, must have at least one")
        rates = self.learning_rates
        if len(rates) < 3 or any(after < 1.2 * before for before, after in itertools.pairwise(rates)):
            raise ValueError(
                f"TransferOptions.learning_rates: {rates}, must be at least 3, each at least 1.2 times the one before"
            )

    def staging(self, rate: float) -> StagingConfig:
        """Of a run at one learning rate."""
        return StagingConfig(
            tokens=self.tokens,
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            learning_rate=rate,
            optimizer=self.optimizer,
        )

"""What the ladder can be told: which models it trains, for how long, and which of them it predicts."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from corpus.prepare import CorpusConfig
from foundation.numbers import check_numbers
from lm.options import ModelOptions
from staged_training.execute import ExecutionConfig
from staged_training.staging import StagingConfig

Phase = Literal["all", "small", "predict", "largest"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LadderOptions:
    """Train a ladder of small models of our own, predict its largest runs before they are trained, then compare.

    Attributes:
        phase: "small" trains all but the held-out runs, "predict" writes what a law says of these (commit it),
            "largest" trains them and compares; "all" does the three in turn. What is finished is not trained again.
        methods: names as `list` shows them; the ladder is trained for each.
        widths: of models, at --n-layers blocks; heads and experts' widths grow with them.
        depths: of models, at --d-model.
        token_budgets: every width and depth is trained on each.
        expert_counts: numbers of experts beside --n-experts, at --d-model and --n-layers and the first budget.
        experts_per_token: beside --k, likewise.
        expert_widths: hidden widths of experts beside --d-expert, likewise; of narrower ones there are as many more,
            and as many more for a token, so that only the granularity differs.
        held_out: runs of each method with the most FLOPs, predicted before they are trained.
        law: total, active, both, granularity, sparsity, routed, triad or experts, see `fit`.
        resamples: of the bootstrap, for intervals of the predictions.
        out: folder of all runs, shared with `compare`.
        dry_run: print runs and cost, and train nothing.
        batch_size: rows of a batch.
        seq_len: tokens of a row.
        learning_rate: peak, the same for all; it decays to zero over the last 15 % of a run.
        seed: of weights and data order.
        seeds: so many of each run, from --seed on.
    """

    phase: Phase = "all"
    methods: tuple[str, ...] = ("baseline",)
    widths: tuple[int, ...] = (64, 128, 192)
    depths: tuple[int, ...] = (2, 4, 8)
    token_budgets: tuple[int, ...] = (60_000, 120_000, 240_000)
    expert_counts: tuple[int, ...] = (20, 40)
    experts_per_token: tuple[int, ...] = (4, 24)
    expert_widths: tuple[int, ...] = ()
    held_out: int = 3
    law: str = "active"
    resamples: int = 200
    out: Path = Path("runs")
    dry_run: bool = False
    batch_size: int = StagingConfig.batch_size
    seq_len: int = StagingConfig.seq_len
    learning_rate: float = StagingConfig.learning_rate
    seed: int = 0
    seeds: int = 1
    model: Annotated[ModelOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=ModelOptions)
    corpus: Annotated[CorpusConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=lambda: CorpusConfig(valid_share=0.02)
    )
    execution: Annotated[ExecutionConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=ExecutionConfig
    )

    def __post_init__(self) -> None:
        check_numbers(
            self,
            widths=1,
            depths=1,
            token_budgets=1,
            expert_counts=1,
            experts_per_token=1,
            expert_widths=1,
            held_out=0,
            resamples=20,
            batch_size=1,
            seq_len=1,
            learning_rate=1e-12,
            seed=0,
            seeds=1,
        )
        for name in ("widths", "depths", "token_budgets", "methods"):
            if not getattr(self, name):
                raise ValueError(f"LadderOptions.{name}: empty, must have at least one")

    def staging(self, tokens: int) -> StagingConfig:
        """Of a run of so many tokens."""
        return StagingConfig(
            tokens=tokens,
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            learning_rate=self.learning_rate,
        )

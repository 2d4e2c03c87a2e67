"""What the agreement study can be told, and its two forms."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ablations.agreement.arms import ARCHITECTURE, ROUTING
from ablations.agreement.settings import LARGE, SMALL, Setting, find_settings
from ablations.comparison.options import Options
from corpus.prepare import CorpusConfig
from foundation.numbers import check_numbers
from lm.options import ModelOptions
from staged_training.execute import ExecutionConfig
from staged_training.optimizer import OptimizerConfig
from staged_training.staging import StagingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """What a form of the study stands for where the command line says nothing."""

    arms: tuple[str, ...]
    settings: tuple[Setting, ...]
    seeds: int
    tokens: int
    batch_size: int


FORMS = {
    # Within 40 minutes on two cores that train 2,000 tokens per second each; batches so small that a branch still takes
    # some steps.
    "small": Form(
        arms=(
            *("static_2", "static_4", "static_24", "top_p", "relu", "sigmoid_bias"),
            *("full_attention", "lightning_hybrid", "gated_delta_hybrid", "mixed_heads_hybrid"),
        ),
        settings=SMALL,
        seeds=3,
        tokens=60_000,
        batch_size=2,
    ),
    "large": Form(arms=(*ROUTING, *ARCHITECTURE), settings=LARGE, seeds=3, tokens=2_000_000, batch_size=4),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AgreementOptions:
    """How to ask whether cheap comparisons order arms as full runs do.

    Attributes:
        form: "small" or "large": what arms, settings, seeds, tokens and batch_size are unless they are given.
        arms: names as `list` shows them, and static_2, static_4, static_8, static_24, full_attention, sigmoid_bias; the
            baseline is
            always one.
        settings: cheap settings, by names like fork85_freeze50_decay, fork70_freeze0_merge_small_rate, smaller_model.
        seeds: full runs per arm, and cheap runs per arm and setting; at least 2.
        trunk_seeds: trunks that these are spread over, one per seed by default; 1 is what `compare` does by default,
            and leaves the noise of the trunk out.
        tokens: of a full run, and of trunk plus branch.
        resamples: of the bootstrap.
        jobs: runs that train side by side, see `compare`.
        out: folder of all runs; trunks and branches are those of `compare` under the same folder.
        dry_run: print what the study would cost, and run nothing.
        batch_size: rows of a batch.
        seq_len: tokens of a row.
        learning_rate: the tuned peak; some settings take a third of it.
        budget_batches: see `compare`; part of what a branch is measured by.

    Raises:
        ValueError: for a number that is too small, naming the option.
    """

    form: Literal["small", "large"] = "small"
    arms: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    seeds: int | None = None
    trunk_seeds: int | None = None
    tokens: int | None = None
    resamples: int = 1000
    jobs: int = 0
    out: Path = Path("runs")
    dry_run: bool = False
    batch_size: int | None = None
    seq_len: int = StagingConfig.seq_len
    learning_rate: float = StagingConfig.learning_rate
    budget_batches: int = 2
    optimizer: Annotated[OptimizerConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=OptimizerConfig
    )
    model: Annotated[ModelOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=ModelOptions)
    # Every run is measured on the same text, so half of what others read is enough to say which of two is better there.
    corpus: Annotated[CorpusConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=lambda: CorpusConfig(valid_characters=400)
    )
    execution: Annotated[ExecutionConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=ExecutionConfig
    )

    def __post_init__(self) -> None:
        check_numbers(self, seeds=2, trunk_seeds=1, tokens=1, resamples=1, jobs=0, batch_size=1, seq_len=1)
        if self.trunk_seeds is not None and self.trunk_seeds > self.n_seeds:
            raise ValueError(
                f"AgreementOptions.trunk_seeds: {self.trunk_seeds}, must be at most the number of seeds, {self.n_seeds}"
            )
        find_settings(self.settings)
        # Refuses the rest.
        self.comparison(self.staging)

    @property
    def n_seeds(self) -> int:
        """Runs per arm and setting."""
        return self.seeds or FORMS[self.form].seeds

    @property
    def n_trunks(self) -> int:
        """Trunks that branches are spread over."""
        return self.trunk_seeds or self.n_seeds

    @property
    def arm_names(self) -> tuple[str, ...]:
        """Without the baseline, unless it was named."""
        return self.arms or FORMS[self.form].arms

    @property
    def cheap(self) -> tuple[Setting, ...]:
        """The settings to compare with full runs."""
        return find_settings(self.settings) or FORMS[self.form].settings

    @property
    def staging(self) -> StagingConfig:
        """Of full runs: their rate decays over the last part of the budget, as that of a branch does."""
        return StagingConfig(
            tokens=self.tokens or FORMS[self.form].tokens,
            batch_size=self.batch_size or FORMS[self.form].batch_size,
            seq_len=self.seq_len,
            learning_rate=self.learning_rate,
            optimizer=self.optimizer,
        )

    def comparison(self, staging: StagingConfig) -> Options:
        """Those of the comparison that a setting is."""
        return Options(
            jobs=self.jobs,
            out=self.out,
            budget_batches=self.budget_batches,
            model=self.model,
            staging=staging,
            corpus=self.corpus,
            execution=self.execution,
        )

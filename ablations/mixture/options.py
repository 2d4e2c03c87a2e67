"""What the search for a mixture can be told."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from corpus.prepare import CorpusConfig
from foundation.numbers import check_numbers
from lm.options import ModelOptions
from staged_training.execute import ExecutionConfig
from staged_training.staging import StagingConfig

# The mean of all domains, and of those that the search is told.
MACRO, TARGET = "macro", "target"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureSearchOptions:
    """Which mixture of a corpus's domains trains the best model?

    Attributes:
        out: folder of the search; the prepared text is kept in `corpus/` below it.
        proxy: what is trained on every mixture that is tried: an n-gram model of tokens, or the model itself.
        proxies: mixtures that are tried.
        proxy_tokens: that each of them is trained on.
        proxy_valid: validation tokens of each domain that n-gram models are measured on.
        order: tokens of the n-gram models' longest context.
        target: domains whose bits per byte the best mixture has lowest, in the mean; "macro": all of them.
        seed: of the mixtures that are tried.
        seeds: runs of the model on each of the best, the natural and the uniform mixture; 0 to search only.
        corpus: the text; a document's domain is its field `domain`, or the name of its file.
        model: the network; its vocabulary is the tokenizer's.
        staging: of the runs of the model; the part of its budget behind `trunk_share` anneals. `epoch_cap` bounds every
            mixture, counted for this budget.
        execution: saving, printing, tracking; nothing is cached.

    Raises:
        ValueError: for a mixture that is given instead of sought.
    """

    out: Path = Path("runs/mixture")
    proxy: Literal["ngram", "model"] = "ngram"
    proxies: int = 256
    proxy_tokens: int = 200_000
    proxy_valid: int = 10_000
    order: int = 2
    target: tuple[str, ...] = (MACRO,)
    seed: int = 0
    seeds: int = 3
    corpus: Annotated[CorpusConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=CorpusConfig)
    model: Annotated[ModelOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=ModelOptions)
    staging: Annotated[StagingConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=StagingConfig)
    execution: Annotated[ExecutionConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=ExecutionConfig
    )

    def __post_init__(self) -> None:
        check_numbers(self, proxies=10, proxy_tokens=2, proxy_valid=1, order=0, seed=0, seeds=0)
        if self.seeds == 1:
            raise ValueError("MixtureSearchOptions.seeds: 1 leaves the noise unknown; legal: 0, or 2 at least")
        if self.staging.mixture is not None:
            raise ValueError(f"StagingConfig.mixture: {self.staging.mixture}; legal: none, the best one is looked for")

    @property
    def aim(self) -> str:
        """What tables call the mean over the target's domains."""
        return MACRO if self.target == (MACRO,) else TARGET

    def aimed_at(self, domains: Sequence[str]) -> list[int]:
        """Places of the target's domains."""
        return [place for place, domain in enumerate(domains) if self.aim == MACRO or domain in self.target]

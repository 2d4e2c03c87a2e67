"""What the studies of text can be told."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from corpus.prepare import CorpusConfig
from foundation.numbers import check_numbers
from lm.options import ModelOptions
from staged_training.execute import ExecutionConfig
from staged_training.staging import StagingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorporaOptions:
    """What is a corpus worth? One model, trained for as many tokens on each, evaluated on the same text.

    Attributes:
        arms: NAME=PATH of each corpus, a file or folder; further paths behind commas. The first is what the others are
            compared with, and the tokenizer is learnt from it unless a file is given.
        valid: files and folders of the text to evaluate on, which none of the corpora should hold; all of it but one
            document, which is set aside.
        out: folder of the study.
        seeds: runs on each.
        vocab_size: of the tokenizer to learn.
        tokenizer_file: a SentencePiece model instead.
        text_field: key or column that holds the text.
        model: the network.
        staging: the token budget of each run; the part behind `trunk_share` anneals.
        execution: saving, printing, tracking; nothing is cached.
    """

    arms: tuple[str, ...]
    valid: tuple[str, ...]
    out: Path = Path("runs/corpora")
    seeds: int = 3
    vocab_size: int | None = None
    tokenizer_file: str | None = None
    text_field: str = "text"
    model: Annotated[ModelOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=ModelOptions)
    staging: Annotated[StagingConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=StagingConfig)
    execution: Annotated[ExecutionConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=ExecutionConfig
    )

    def __post_init__(self) -> None:
        check_numbers(self, seeds=2)
        if len(self.paths) < 2 or len(self.paths) != len(self.arms):
            raise ValueError(f"CorporaOptions.arms: {' '.join(self.arms)}; legal: two names or more, each NAME=PATH")

    @property
    def paths(self) -> dict[str, tuple[str, ...]]:
        """By arm, in their order."""
        pairs = [arm.partition("=") for arm in self.arms]
        return {name: tuple(value.split(",")) for name, _, value in pairs if name and value}

    def corpus(self, data: tuple[str, ...], valid_share: float) -> CorpusConfig:
        """How a text is read."""
        return CorpusConfig(
            data=data,
            text_field=self.text_field,
            vocab_size=self.vocab_size,
            tokenizer_file=self.tokenizer_file,
            valid_share=valid_share,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """Which tokenizer gives a small model the fewest bits per byte, of the same text, at equal compute?

    Attributes:
        out: folder of the study; prepared texts are kept in `corpus/` below it.
        vocab_sizes: of tokenizers to learn.
        tokenizer_files: SentencePiece models beside them.
        train_flops: of each run's training, counted from the configuration; the tokens follow from it.
        seeds: runs with each.
        corpus: the text; its own vocabulary size and tokenizer file play no part.
        model: the network.
        staging: everything else of a run; the part behind `trunk_share` anneals.
        execution: saving, printing, tracking; nothing is cached.
    """

    out: Path = Path("runs/tokenizers")
    vocab_sizes: tuple[int, ...] = (512, 1024, 4096)
    tokenizer_files: tuple[str, ...] = ()
    train_flops: float = 3e11
    seeds: int = 3
    corpus: Annotated[CorpusConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=CorpusConfig)
    model: Annotated[ModelOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=ModelOptions)
    staging: Annotated[StagingConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=StagingConfig)
    execution: Annotated[ExecutionConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=ExecutionConfig
    )

    def __post_init__(self) -> None:
        check_numbers(self, vocab_sizes=261, train_flops=1, seeds=2)
        if len(self.vocab_sizes) + len(self.tokenizer_files) < 2:
            raise ValueError("--vocab-sizes, --tokenizer-files: legal: two tokenizers or more to choose from")

"""What `python -m staged_training adapt` is asked."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from corpus.prepare import CorpusConfig
from staged_training.adapt.teaching import Teaching
from staged_training.execute import ExecutionConfig
from staged_training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """Teaches a trained model a variable number of experts.

    Attributes:
        run: folder of a trained model, or of the run that trained it.
        teach: what, and how.
        out: folder of such stages; each gets one of its own in it, and the prepared text and the original's hidden
            states are kept in `corpus/` and `teachers/`.
        data: files and folders of text; this machine's Python standard library when empty.
        text_field: key or column that holds the text; meta.text for one inside of another.
        valid_documents, valid_characters, valid_share: what is held out, see `corpus.prepare.CorpusConfig`.
        cache: store the original's hidden states; otherwise they are computed in every step.
        optimizer: of what trains.
        save_every: steps between checkpoints.
        log_every: steps between lines of progress.
        dry_run: print what would be done, the environment, and leave.
    """

    run: Path
    teach: Annotated[Teaching, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=Teaching)
    out: Path = Path("runs/adapted")
    data: tuple[str, ...] = ()
    text_field: str = "text"
    valid_documents: int = CorpusConfig.valid_documents
    valid_characters: int = CorpusConfig.valid_characters
    valid_share: float | None = None
    cache: bool = True
    optimizer: Annotated[OptimizerConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=OptimizerConfig
    )
    save_every: int = 200
    log_every: int = 20
    dry_run: bool = False

    def __post_init__(self) -> None:
        # As there, so that it is said once.
        ExecutionConfig(save_every=self.save_every, log_every=self.log_every)
        self.corpus()

    def corpus(self) -> CorpusConfig:
        """How the text is read."""
        names = ("data", "text_field", "valid_documents", "valid_characters", "valid_share")
        return CorpusConfig(**{name: getattr(self, name) for name in names})

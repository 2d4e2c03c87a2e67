"""What `python -m corpus refine` is asked for."""

from dataclasses import dataclass
from pathlib import Path

from foundation.files import SEAL
from foundation.numbers import check_numbers

LANGUAGES = ("en", "zh", "code")
LAYER_NAMES = (
    *("normalise", "block_list", "language", "length", "ratios", "lines", "repetition", "personal_data"),
    *("perplexity", "quality", "near_duplicates", "clusters"),
)


@dataclass(frozen=True, kw_only=True)
class RefineConfig:
    """What to refine and how.

    Attributes:
        data: Files and folders of .txt, .md, .jsonl, .ndjson, .json (each also as .gz and .zst) and .parquet.
        out: Folder for the result: kept/, dropped/, models/, report.html and csv tables.
        trusted: Files and folders of text that is known to be good: perplexity and quality are learnt from it. Without
            it and without models these two layers are off.
        models: The models/ folder of an earlier refinement, used instead of learning.
        text_field: Key or column that holds the text, of the data and the trusted set; meta.text for one inside of
            another.
        languages: Languages that stay: en, zh, code.
        without: Layers to leave out, by name.
        block_list: Places to refuse instead of our own list; see corpus/refine/blocked_places.txt.
        unsafe_list: Words with weights instead of our own list; see corpus/refine/unsafe_words.txt.
        cluster_limit: How many times its even share a cluster may hold.
        workers: Processes.
        shard_mb: Megabytes of text per shard, which is what a process takes at a time.

    Raises:
        ValueError: naming what is not legal.
    """

    data: tuple[str, ...]
    out: Path
    trusted: tuple[str, ...] = ()
    models: Path | None = None
    text_field: str = "text"
    languages: tuple[str, ...] = LANGUAGES
    without: tuple[str, ...] = ()
    block_list: Path | None = None
    unsafe_list: Path | None = None
    cluster_limit: float = 4.0
    workers: int = 1
    shard_mb: float = 16.0

    def __post_init__(self) -> None:
        check_numbers(self, workers=1, cluster_limit=1, shard_mb=0.001)
        if not self.data:
            raise ValueError("--data names nothing to refine")
        if self.trusted and self.models is not None:
            raise ValueError("--trusted and --models exclude each other: models were learnt already")
        for option, given, legal in (
            ("--languages", self.languages, LANGUAGES),
            ("--without", self.without, LAYER_NAMES),
        ):
            for name in given:
                if name not in legal:
                    raise ValueError(f"{option} {name}: legal are {', '.join(legal)}")
        for option, path in (("--block-list", self.block_list), ("--unsafe-list", self.unsafe_list)):
            if path is not None and not path.is_file():
                raise ValueError(f"{option} {path}: no such file")
        if self.models is not None and not (self.models / SEAL).is_file():
            raise ValueError(f"--models {self.models}: no models of a refinement here")

"""What a measurement of the gradient-noise scale can be told."""

import dataclasses
from pathlib import Path

import tyro

from foundation.numbers import check_numbers

# Of small batches, for the interval.
GROUPS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseOptions:
    """Measure the gradient-noise scale of a model: how large a batch pays, for `plan --noise`.

    Attributes:
        run: folder of a trained model, or of the run that trained it.
        data: files and folders of text like that it trains on; none: the Python standard library.
        text_field: key or column that holds the text; meta.text for one inside of another.
        seq_len: tokens of a row.
        rows: of the large batch.
        small: rows of a small batch.
        seed: of the choice of documents and rows.
        csv: where the table goes as well.
    """

    run: tyro.conf.Positional[Path]
    data: tuple[str, ...] = ()
    text_field: str = "text"
    seq_len: int = 256
    rows: int = 512
    small: int = 4
    seed: int = 0
    csv: Path | None = None

    def __post_init__(self) -> None:
        check_numbers(self, seq_len=1, rows=1, small=1, seed=0)
        if self.rows // self.small < 2 * GROUPS:
            raise ValueError(
                f"NoiseOptions.rows: {self.rows} rows are {self.rows // self.small} small batches of {self.small}; an"
                f" interval needs at least {2 * GROUPS}"
            )

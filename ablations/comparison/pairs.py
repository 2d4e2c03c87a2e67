"""`python -m ablations pairs`: any finished runs against any others, seed by seed, on the text that all have met.

A comparison pairs the branches that it has trained itself. Here the pairs are named, so that what was trained by other
commands (`staged_training sweep`, `adapt`) is judged by the same statistics.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np

from ablations.comparison.statistics import RunKey, Text, paired_difference
from foundation.tables import read_rows
from staged_training.record import SECTIONS, SectionLoss, check_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """The difference of two groups of runs in bits per byte, with its interval.

    Attributes:
        run: folders of finished runs, one per training seed.
        against: as many others, in the same order of seeds.

    Raises:
        ValueError: for no runs, or groups of different size.
    """

    run: tuple[Path, ...]
    against: tuple[Path, ...]

    def __post_init__(self) -> None:
        if not self.run or len(self.run) != len(self.against):
            raise ValueError(
                f"--run, --against: {len(self.run)} and {len(self.against)} folders; legal: as many of either, at least"
                " one"
            )


def pairs(config: PairsConfig) -> str:
    """Prints and gives one line: both means, their difference, and its interval at 95 %, of runs (where there are
    several pairs) and text.

    Raises:
        ValueError: for a run that is not finished, or was measured on another text, naming it.
        CorruptFileError: for one that is not as it was written.
    """
    text, _ = _bits(config.run[0])
    sides: list[dict[RunKey, np.ndarray]] = []
    for folders in (config.run, config.against):
        sides.append({})
        for seed, folder in enumerate(folders):
            own, sides[-1][seed, 0] = _bits(folder)
            same = all(np.array_equal(getattr(own, name), getattr(text, name)) for name in vars(text))
            if not same:
                raise ValueError(f"{folder} was measured on another text than {config.run[0]}; legal: the same")
    difference = paired_difference(*sides, text)
    means = [np.mean([bits_S.sum() for bits_S in side.values()]) / text.n_bytes_S.sum() for side in sides]
    interval = difference.interval
    said = (
        f"{means[0]:.4f} against {means[1]:.4f} bits per byte ({means[0] / means[1] - 1:+.2%}):"
        f" {interval.mean:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}], {len(config.run)} pair"
        f"{'s' * (len(config.run) > 1)}, {int(text.document_S.max()) + 1} documents"
    )
    print(said, flush=True)
    return said


def _bits(folder: Path) -> tuple[Text, np.ndarray]:
    """The validation text of a run, and the bits of each of its sections."""
    if not (folder / SECTIONS).is_file():
        raise ValueError(f"{folder} holds no finished run: {SECTIONS} is missing")
    check_run(folder)
    sections = read_rows(folder / SECTIONS, SectionLoss)
    text = Text(
        n_bytes_S=np.array([section.n_bytes for section in sections]),
        document_S=np.array([section.document for section in sections]),
    )
    return text, np.array([section.nats for section in sections]) / math.log(2)

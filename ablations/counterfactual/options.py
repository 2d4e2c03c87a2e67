"""What the counterfactuals and the frontier can be told, apart from what does it: the command line knows its options
without libraries for figures and statistics."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from foundation.numbers import check_numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Which held-out text.

    Attributes:
        data: files and folders of text that no run was trained on, a document's domain being its field `domain` or the
            name of its file; by default the validation documents of the corpus that the runs were trained on.
        text_field: key or column that holds the text; meta.text for one inside of another.
        documents: at most so many of each domain, evenly spaced.
        windows_per_document: at most so many of each.
        window: tokens that the model sees at once.
    """

    data: tuple[str, ...] = ()
    text_field: str = "text"
    documents: int = 100
    windows_per_document: int = 2
    window: int = 256

    def __post_init__(self) -> None:
        check_numbers(self, documents=1, windows_per_document=1, window=2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CounterfactualOptions:
    """Equal-compute counterfactuals of trained models.

    Attributes:
        run: folders of trained models, or of the runs that trained them; several are taken as training seeds of one
            method, and pooled.
        out: folder of the results.
        policy: routing policy to run the weights under, as JSON, as config.json stores it:
            '{"type": "TopP", "target_mean": 6, "cap": 16}'; its threshold is calibrated. By default the trained one.
        mean: experts per token and layer, in the mean; by default the policy's own. The thresholds of a policy that has
            them are calibrated to it.
        forced: numbers of experts at which every layer's gains are measured, ascending; by default powers of two up to
            the policy's slots, and the numbers beside the mean.
        resamples: of the documents, for the intervals of a single run.
        seed: of shuffles and resamples.

    Raises:
        ValueError: for numbers that nothing could be measured with, naming the option.
    """

    run: tuple[Path, ...]
    out: Path = Path("runs/counterfactual")
    policy: str | None = None
    mean: float | None = None
    forced: tuple[int, ...] = ()
    text: Annotated[TextOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=TextOptions)
    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.run:
            raise ValueError("--run: name at least one folder of a trained model")
        if len(set(self.run)) < len(self.run):
            raise ValueError(f"--run {' '.join(map(str, self.run))}: a folder twice is not two training seeds")
        if self.forced and (len(self.forced) < 2 or list(self.forced) != sorted(set(self.forced))):
            raise ValueError(f"--forced {self.forced}: at least two numbers of experts, ascending")
        check_numbers(self, mean=0, forced=1, resamples=1, seed=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrontierOptions:
    """Bits per byte against experts and seconds.

    Attributes:
        run: folders of trained models, or of the runs that trained them.
        out: folder of the results.
        budgets: mean experts per token and layer at which each model is run: by its own policy where that chooses the
            number, and by the same number for every token.
        repeats: timed turns; medians are taken.
        prefill: tokens of a sequence that are read at once, where times are taken.
        decode: tokens decoded after it.
        sequences: how many are decoded at once; one time is taken for each number.
        resamples: of the documents, for the intervals.
        threads: CPU threads; 0 keeps torch's choice.

    Raises:
        ValueError: for numbers that nothing could be measured with, naming the option.
    """

    run: tuple[Path, ...]
    out: Path = Path("runs/frontier")
    budgets: tuple[int, ...] = (2, 4, 6, 8, 12)
    text: Annotated[TextOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=TextOptions)
    repeats: int = 5
    prefill: int = 256
    decode: int = 32
    sequences: tuple[int, ...] = (1, 8)
    resamples: int = 1000
    threads: int = 0

    def __post_init__(self) -> None:
        if not self.run:
            raise ValueError("--run: name at least one folder of a trained model")
        if not self.budgets or not self.sequences:
            raise ValueError("--budgets and --sequences each need at least one entry")
        check_numbers(self, budgets=1, repeats=1, prefill=1, decode=3, sequences=1, resamples=1, threads=0)

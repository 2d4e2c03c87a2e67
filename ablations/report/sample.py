"""What the trained models of a comparison write: a few lines say more of a level of bits per byte than its digits."""

import dataclasses

from ablations.comparison.records import RecordedRun, Records
from foundation.files import CorruptFileError
from lm.generate import generate
from lm.pretrained import load_pretrained, load_tokenizer
from lm.sampling import SamplingConfig

TOKENS = 120


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """A text that a branch's model begins and writes.

    Attributes:
        bits_per_byte: of its run.
    """

    method: str
    run: str
    bits_per_byte: float
    text: str


def samples(records: Records) -> list[Sample]:
    """Of the baseline's first run, and of the best other method's; less where a model is gone."""
    comparison = records.comparison
    judged = [method for method in records.methods if method not in comparison.controls]
    others = [method for method in judged if method != comparison.baseline]
    best = sorted(others, key=lambda method: min(run.bits_per_byte for run in records.branches[method].values()))[:1]
    found = (sample(method, records.branches[method]) for method in (comparison.baseline, *best))
    return [each for each in found if each is not None]


def sample(method: str, runs: dict[tuple[int, int], RecordedRun]) -> Sample | None:
    """A text of the method's first run, drawn under seed 0; None where its model is gone or damaged."""
    run = runs[min(runs)]
    folder = run.folder / "model"
    try:
        model = load_pretrained(folder)
        tokenizer = load_tokenizer(folder, model)
    except (OSError, ValueError, CorruptFileError):
        return None
    decoder, pieces = tokenizer.stream_decoder(), []
    steps = generate(
        model,
        [tokenizer.boundary_id],
        max_new_tokens=TOKENS,
        sampling=SamplingConfig(),
        stop=tokenizer.boundary_id,
    )
    for step in steps:
        pieces.append(decoder.push(step.token))
    return Sample(method=method, run=run.folder.name, bits_per_byte=run.bits_per_byte, text="".join(pieces))

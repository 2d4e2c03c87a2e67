"""The layers in their order, and one page through those that judge it alone.

A page that a layer drops goes through the layers behind it all the same, for one question: would they have dropped it
too? What a layer alone removes is what it is worth. A page that layers changed goes through again until nothing
changes, so that what is kept passes as it is.
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from corpus.refine.block_list import BlockList
from corpus.refine.clusters import Clusters
from corpus.refine.config import RefineConfig
from corpus.refine.language import Language
from corpus.refine.layer import Layer
from corpus.refine.length import Length
from corpus.refine.lines import Lines
from corpus.refine.near_duplicates import NearDuplicates
from corpus.refine.normalise import Normalise
from corpus.refine.page import Page
from corpus.refine.perplexity import Perplexity
from corpus.refine.personal_data import PersonalData
from corpus.refine.quality import Quality
from corpus.refine.ratios import Ratios
from corpus.refine.repetition import Repetition

# In the order of the cascade. The last two judge documents together and have no `judge`.
LAYERS = (
    *(Normalise, BlockList, Language, Length, Ratios, Lines, Repetition, PersonalData),
    *(Perplexity, Quality, NearDuplicates, Clusters),
)
# Every change takes something away, so this many rounds have never been needed.
MOST_ROUNDS = 100


def rule_layers(config: RefineConfig) -> list[Layer]:
    """Layers 1 to 8, without those that the configuration leaves out."""
    layers: list[Layer] = [
        Normalise(),
        BlockList(config.block_list),
        Language(config.languages),
        Length(),
        Ratios(),
        Lines(),
        Repetition(),
        PersonalData(config.unsafe_list),
    ]
    # Without its verdict the language is still needed: thresholds depend on it.
    return [layer for layer in layers if layer.name not in config.without or layer.name == Language.name]


@dataclass
class Verdict:
    """What became of a page.

    Attributes:
        layer, reason: which layer dropped it, and why; None where it stays.
        also: layers behind that one that would have dropped it too.
        changed: characters by which each layer changed the text.
    """

    layer: str | None = None
    reason: str | None = None
    also: list[str] = field(default_factory=list)
    changed: dict[str, int] = field(default_factory=dict)


def through(layers: Sequence[Layer], page: Page, seconds: defaultdict[str, float] | None = None) -> Verdict:
    """Takes a page through layers, until none changes it or one drops it.

    Args:
        seconds: by layer, what it takes is added there.
    """
    verdict = Verdict()
    for _ in range(MOST_ROUNDS):
        before = page.text
        started = time.thread_time()
        for layer in layers:
            text = page.text
            reason = layer.judge(page)
            if seconds is not None:
                now = time.thread_time()
                seconds[layer.name] += now - started
                started = now
            if page.text is not text and verdict.layer is None:
                verdict.changed[layer.name] = verdict.changed.get(layer.name, 0) + abs(len(text) - len(page.text))
            if reason is not None and verdict.layer is None:
                verdict.layer, verdict.reason = layer.name, reason
            elif reason is not None:
                verdict.also.append(layer.name)
        if verdict.layer is not None or page.text == before:
            return verdict
    raise AssertionError(f"layers change a text that begins {page.text[:60]!r} for ever")

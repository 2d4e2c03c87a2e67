"""What layers 9, 10 and 12 learn, before they judge: from the trusted set, and from what the rules kept.

A sample has a budget in bytes and is drawn by the hash of the texts: no seed, no order, no dependence on workers.
"""

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from corpus.readers import Document
from corpus.refine.clusters import Topics, term_counts
from corpus.refine.config import RefineConfig
from corpus.refine.hashing import text_hash
from corpus.refine.language import Language
from corpus.refine.normalise import Normalise
from corpus.refine.page import LANGUAGES, Page
from corpus.refine.perplexity import Calibrated
from corpus.refine.quality import Classifier
from corpus.refine.shards import whole
from corpus.sources import read_paths
from foundation.files import CorruptFileError, check_seal, seal

# Bytes of trusted text per language, and of the corpus per language; documents for the clusters.
TRUSTED_BYTES, RAW_BYTES, CLUSTERED_DOCUMENTS = 4 << 20, 4 << 20, 8000
# Every fifth document is held out for thresholds; with fewer documents than this of a language nothing is learnt.
HELD_OUT, FEWEST = 5, 40


Kept = TypeVar("Kept")


class Sample(Generic[Kept]):
    """What is kept of the texts of the lowest hashes that fit into a budget.

    Args:
        keep: of a text and its language what is kept, and how much of the budget that takes.
    """

    def __init__(self, budget: int, keep: Callable[[str, str | None], tuple[Kept, int]]):
        self._budget, self._keep, self._size = budget, keep, 0
        self._heap: list[tuple[int, int, Kept, int]] = []
        # Equal texts have equal hashes: their order says nothing, and what is kept of them need not compare.
        self._numbers = itertools.count()

    def add(self, text: str, language: str | None) -> None:
        value = text_hash(text)
        if self._size >= self._budget and value >= -self._heap[0][0]:
            return
        kept, size = self._keep(text, language)
        heapq.heappush(self._heap, (-value, next(self._numbers), kept, size))
        self._size += size
        while len(self._heap) > 1 and self._size - self._heap[0][3] >= self._budget:
            self._size -= heapq.heappop(self._heap)[3]

    def kept(self) -> list[Kept]:
        """In the order of their hashes."""
        return [kept for _, _, kept, _ in sorted(self._heap, key=lambda entry: -entry[0])]


def _text(text: str, language: str | None) -> tuple[Page, int]:
    """The text, measured in bytes."""
    return Page(text, language=language), len(text.encode())


def _terms(text: str, language: str | None) -> tuple[np.ndarray, int]:
    """What clusters look at, as one document: texts may be as long as books."""
    return term_counts(Page(text, language=language)), 1


class Models:
    """Attributes:
    perplexity, quality: by language; a language that the trusted set lacks is missing.
    topics: None where there was no document to cluster.
    """

    def __init__(self, perplexity: dict[str, Calibrated], quality: dict[str, Classifier], topics: Topics | None):
        self.perplexity = perplexity
        self.quality = quality
        self.topics = topics

    def save(self, folder: Path) -> None:
        names = []
        for kind, found in (("perplexity", self.perplexity), ("quality", self.quality)):
            for language, model in found.items():
                names.append(f"{kind}_{language}.npz")
                _save(folder / names[-1], model.arrays())
        if self.topics is not None:
            names.append("topics.npz")
            _save(folder / names[-1], self.topics.arrays())
        seal(folder, names)

    @classmethod
    def load(cls, folder: Path) -> "Models":
        """Raises:
        ValueError: where the folder holds no models, or changed ones.
        """
        if not (folder / "seal.json").is_file():
            raise ValueError(f"{folder}: no models of a refinement here")
        check_seal(folder)
        try:
            topics = folder / "topics.npz"
            return cls(
                {language: Calibrated.of_arrays(_load(path)) for language, path in _of_kind(folder, "perplexity")},
                {language: Classifier.of_arrays(_load(path)) for language, path in _of_kind(folder, "quality")},
                Topics.of_arrays(_load(topics)) if topics.is_file() else None,
            )
        except (KeyError, ValueError, OSError) as error:
            raise CorruptFileError(f"{folder}: not the models of this version ({error})") from error


def _of_kind(folder: Path, kind: str) -> Iterator[tuple[str, Path]]:
    for language in LANGUAGES:
        if (path := folder / f"{kind}_{language}.npz").is_file():
            yield language, path


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    # Compressed zip files of numpy hold a fixed date.
    with whole(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)  # pyright: ignore[reportArgumentType]


def _load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def learn(config: RefineConfig, kept: Iterable[tuple[str, str | None]]) -> Models:
    """Learns what the layers need.

    Args:
        kept: texts and languages of what the layers of rules kept.

    Raises:
        ValueError: where the trusted set has too little text of every language.
    """
    raw = {language: Sample(RAW_BYTES, _text) for language in LANGUAGES}
    clustered = Sample(CLUSTERED_DOCUMENTS, _terms)
    for text, language in kept:
        clustered.add(text, language)
        if config.trusted and language in raw:
            raw[language].add(text, language)
    counts = clustered.kept()
    topics = Topics.train(counts) if counts else None
    perplexity: dict[str, Calibrated] = {}
    quality: dict[str, Classifier] = {}
    trusted = trusted_pages(config)
    for language, good in trusted.items():
        if len(good) < FEWEST:
            continue
        learnt, held_out = _halves(good)
        perplexity[language] = Calibrated.train(
            [page.text for page in learnt], [page.text for page in held_out], language
        )
        other = raw[language].kept()
        if len(other) >= FEWEST:
            learnt_raw, held_out_raw = _halves(other)
            quality[language] = Classifier.train(learnt, learnt_raw, (held_out, held_out_raw))
    if config.trusted and not perplexity:
        found = ", ".join(f"{len(pages)} {language}" for language, pages in trusted.items())
        raise ValueError(
            f"--trusted: at least {FEWEST} documents of one language are needed to learn from, found {found}"
        )
    return Models(perplexity, quality, topics)


def trusted_pages(config: RefineConfig) -> dict[str, list[Page]]:
    """Trusted documents by language, within the budget."""
    samples = {language: Sample(TRUSTED_BYTES, _text) for language in LANGUAGES}
    layers = Normalise(), Language(config.languages)
    for item in read_paths(config.trusted, text_field=config.text_field) if config.trusted else ():
        if isinstance(item, Document):
            page = Page(item.text, record=dict(item.record))
            if all(layer.judge(page) is None for layer in layers) and page.language is not None:
                samples[page.language].add(page.text, page.language)
    return {language: sample.kept() for language, sample in samples.items()}


def _halves(pages: list[Page]) -> tuple[list[Page], list[Page]]:
    """Those to learn from, and those held out; the order is that of hashes, so any rule draws at random."""
    learnt = [page for number, page in enumerate(pages) if number % HELD_OUT]
    return learnt, pages[::HELD_OUT]

"""Layer 11: documents that are nearly others, then paragraphs that stood elsewhere before.

MinHash (Broder 1997) of the 5-grams of terms, 112 hashes in 14 bands of 8: two documents whose 5-grams agree to a
share s (Jaccard) have a band in common with probability 1 - (1 - s^8)^14: 0.92 at s = 0.8, 0.5 at s = 0.69. Documents
that have a band in common are one group, and the first of it stays.

Of the documents that are left, a paragraph goes where most of it stood before: as a whole, or as spans of three
sentences. Paragraphs go whole, so that none is made that was not there before.

Legend: T terms, G 5-grams, H hashes, N documents, U units (paragraphs and spans).
"""

import re
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from corpus.refine import views
from corpus.refine.hashing import mix
from corpus.refine.page import CHINESE, CODE, ENGLISH, Page

NGRAM, BANDS, ROWS = 5, 14, 8
HASHES = BANDS * ROWS
SEED = 1
SENTENCES = 3
# Shorter ones recur by nature: headings, formulas, greetings.
SHORTEST_PARAGRAPH = 60
MOST_OF_IT = 0.5
# 5-grams that are permuted at once: 112 x 4 bytes each, which the cache holds.
CHUNK = 512

# A line end is one, however it is written.
_BLANK_LINES = re.compile(r"(?>\r\n?|\n)(?:[^\S\r\n]*(?>\r\n?|\n))+")
_SENTENCE_END = re.compile(r"[.!?。！？…]+[\"'”’」』)）]*\s*")


class NearDuplicates:
    """A layer that looks at all documents together: it has facts as the others, and no verdict on one page."""

    name = "near_duplicates"
    source = (
        "MinHash as FineWeb (arXiv 2406.17557): 5-grams, 14 bands of 8; paragraphs: CCNet (arXiv 1911.00359); spans of"
        " three sentences: C4 (arXiv 1910.10683)"
    )
    thresholds: ClassVar = {
        ENGLISH: {"similarity found in half of the cases": 0.69, "paragraph stood before": MOST_OF_IT},
        CHINESE: {"similarity found in half of the cases": 0.69, "paragraph stood before": MOST_OF_IT},
        CODE: {"similarity found in half of the cases": 0.69},
    }


def found_share(similarity: float) -> float:
    """Probability that two documents of this Jaccard similarity have a band in common."""
    return 1 - (1 - similarity**ROWS) ** BANDS


_random = np.random.default_rng(SEED)
# Permutations of 32-bit values: an odd factor and a shift modulo 2^32.
_FACTORS_H = _random.integers(0, 1 << 31, HASHES, np.uint32) * np.uint32(2) + np.uint32(1)
_SHIFTS_H = _random.integers(0, 1 << 32, HASHES, np.uint32)


def bands_of(page: Page) -> np.ndarray:
    """uint64 [BANDS]: equal bands are what near-duplicates have in common. A text of fewer than five terms has only
    exact copies."""
    hashes, n = page.term_hashes, min(NGRAM, len(page.terms.hashes))
    permutations = _FACTORS_H, _SHIFTS_H
    if n and (found := views.bands(hashes.sums, hashes.powers, n, permutations, ROWS)) is not None:
        return found
    hashes_G = hashes.ngrams(n) if n else np.zeros(1, np.uint64)
    low_G = np.unique(hashes_G.astype(np.uint32))
    signature_H = np.full(HASHES, np.iinfo(np.uint32).max)
    for start in range(0, len(low_G), CHUNK):
        permuted_HG = _FACTORS_H[:, None] * low_G[None, start : start + CHUNK]
        permuted_HG += _SHIFTS_H[:, None]
        np.minimum(signature_H, permuted_HG.min(axis=1), out=signature_H)
    bands = np.zeros(BANDS, np.uint64)
    for row in range(ROWS):
        bands = mix(bands ^ signature_H[row::ROWS].astype(np.uint64))
    return bands


def first_of_group(bands: Sequence[np.ndarray], alive_N: np.ndarray) -> np.ndarray:
    """For each document the first of its group, int64 [N]; of those that are not alive, themselves.

    Args:
        bands: uint64 [documents, BANDS] of each shard, in order; memory maps will do: one band is read at a time.
        alive_N: documents that take part.
    """
    first_N = np.arange(len(alive_N))
    places_N = np.flatnonzero(alive_N)
    # A sort per band, kept for the documents that share a value of it with another: few.
    groups: list[np.ndarray] = []
    for band in range(BANDS):
        values = _column(bands, band)[places_N]
        order = np.argsort(values, kind="stable")
        same = values[order][1:] == values[order][:-1]
        shared = np.concatenate((same, [False])) | np.concatenate(([False], same)) if len(order) else same
        members, values = places_N[order[shared]], values[order[shared]]
        if len(members):
            starts = np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1])))
            groups.append(np.stack((members, np.repeat(starts, np.diff(starts, append=len(members))))))
    changed = True
    while changed:
        before = first_N.copy()
        for members, starts in groups:
            heads = np.flatnonzero(np.concatenate(([True], starts[1:] != starts[:-1])))
            lowest = np.minimum.reduceat(first_N[members], heads)
            np.minimum.at(first_N, members, np.repeat(lowest, np.diff(heads, append=len(members))))
        first_N = first_N[first_N]
        changed = not np.array_equal(before, first_N)
    return first_N


def near_others(bands: Sequence[np.ndarray], alive_N: np.ndarray) -> np.ndarray:
    """Documents that are not alive and have a band in common with one that is, bool [N]."""
    found_N = np.zeros(len(alive_N), bool)
    others = np.flatnonzero(~alive_N)
    for band in range(BANDS):
        values = _column(bands, band)
        found_N[others] |= np.isin(values[others], values[alive_N])
    return found_N


def _column(bands: Sequence[np.ndarray], band: int) -> np.ndarray:
    return np.concatenate([np.array(shard[:, band]) for shard in bands]) if len(bands) else np.empty(0, np.uint64)


class Units(NamedTuple):
    """Paragraphs, and spans of sentences in them.

    Attributes:
        paragraph_U: numbers of the paragraphs.
        start_U, end_U: characters.
    """

    paragraph_U: np.ndarray
    start_U: np.ndarray
    end_U: np.ndarray


def paragraphs(text: str) -> list[tuple[int, int]]:
    """Characters of the paragraphs: what blank lines separate."""
    found, start = [], 0
    for gap in _BLANK_LINES.finditer(text):
        found.append((start, gap.start()))
        start = gap.end()
    return [*found, (start, len(text))]


def units_of(page: Page) -> tuple[Units, np.ndarray]:
    """Units of a page that may have stood elsewhere before, and their hashes, uint64 [U]. Code has none: its common
    lines are its language."""
    units = Units(*np.empty((3, 0), np.int64))
    if page.language != CODE:
        shortest = SHORTEST_PARAGRAPH // 2 if page.language == CHINESE else SHORTEST_PARAGRAPH
        units = Units(*(views.units(page.codes_C, page.kinds_C, shortest) or _units(page.text, shortest)))
    terms = page.terms
    first, last = np.searchsorted(terms.starts, units.start_U), np.searchsorted(terms.starts, units.end_U)
    return units, page.term_hashes.of(first, last)


def _units(text: str, shortest: int) -> np.ndarray:
    """Paragraphs of so many characters, each followed by its spans: their numbers, starts and ends, int64 [3, U]."""
    found: list[tuple[int, int, int]] = []
    for number, (start, end) in enumerate(paragraphs(text)):
        if end - start < shortest:
            continue
        found.append((number, start, end))
        ends = [match.end() for match in _SENTENCE_END.finditer(text, start, end)]
        if not ends or ends[-1] < end:
            ends.append(end)
        starts = [start, *ends[:-1]]
        if len(ends) > SENTENCES:
            found += [(number, *span) for span in zip(starts, ends[SENTENCES - 1 :])]
    return np.array(found, np.int64).reshape(-1, 3).T


def without(page: Page, units: Units, stood_before_U: np.ndarray) -> str:
    """The text without the paragraphs of which most stood before; a paragraph takes the blank lines behind it along."""
    places = paragraphs(page.text)
    covered = np.zeros(len(page.text), bool)
    touched = {}
    for number, start, end in np.stack(units, axis=1)[stood_before_U].tolist():
        covered[start:end] = True
        touched[number] = places[number]
    gone = {number for number, (start, end) in touched.items() if covered[start:end].sum() > MOST_OF_IT * (end - start)}
    starts = [start for start, _ in places]
    stops = [*starts[1:], len(page.text)]
    return "".join(
        page.text[start:stop] for number, (start, stop) in enumerate(zip(starts, stops)) if number not in gone
    )

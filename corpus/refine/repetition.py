"""Layer 7: text that repeats itself: lines, paragraphs, and n-grams of words.

An n-gram of Chinese words is one of 1.6 n characters: there are no spaces, and a segmenter would cost more than all of
this layer.

Legend: W words, G n-grams.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from corpus.refine import views
from corpus.refine.hashing import RunHashes
from corpus.refine.layer import Layer
from corpus.refine.page import CHINESE, CODE, ENGLISH, LONG_LINE, Page

TOP, ALL = (2, 3, 4), (5, 6, 7, 8, 9, 10)
CHARACTERS_PER_WORD = 1.6


class Repetition(Layer):
    name = "repetition"
    source = (
        "Gopher (arXiv 2112.11446, table A1); Chinese: FineWeb-2's cmn_Hani, over characters; code repeats lines by"
        " nature: our own"
    )
    thresholds: ClassVar = {
        ENGLISH: {
            "duplicate lines": 0.3,
            "duplicate paragraphs": 0.3,
            "characters in duplicate lines": 0.2,
            "characters in duplicate paragraphs": 0.2,
            "top n-gram": (0.20, 0.18, 0.16),
            "duplicate n-grams": (0.15, 0.14, 0.13, 0.12, 0.11, 0.10),
        },
        CHINESE: {
            "duplicate lines": 0.287,
            "duplicate paragraphs": 0.3,
            "characters in duplicate lines": 0.2,
            "characters in duplicate paragraphs": 0.2,
            "top n-gram": (0.256, 0.201, 0.171),
            "duplicate n-grams": (0.198, 0.182, 0.167, 0.154, 0.14, 0.127),
        },
        CODE: {"characters in duplicate lines": 0.5},
    }

    def judge(self, page: Page) -> str | None:
        limits = self.thresholds[page.language or ENGLISH]
        share, characters = _duplicates(page.prose_lines)
        if page.language == CODE:
            return "duplicate lines" if characters > limits["characters in duplicate lines"] else None
        if share > limits["duplicate lines"] or characters > limits["characters in duplicate lines"]:
            return "duplicate lines"
        paragraphs = [part for part in map(str.strip, "\n".join(page.lines).split("\n\n")) if len(part) >= LONG_LINE]
        share, characters = _duplicates(paragraphs)
        if share > limits["duplicate paragraphs"] or characters > limits["characters in duplicate paragraphs"]:
            return "duplicate paragraphs"
        return self._judge_ngrams(page, limits)

    def _judge_ngrams(self, page: Page, limits: Mapping[str, Any]) -> str | None:
        words = page.words
        if len(words.starts) < TOP[0]:
            return None
        factor = CHARACTERS_PER_WORD if page.language == CHINESE else 1
        hashes = RunHashes(words.hashes)
        sums_W = np.concatenate(([0], np.cumsum(words.ends - words.starts)))
        most = len(words.starts)
        for n, limit in zip(TOP, limits["top n-gram"]):
            # A longer n-gram is there no more often than the shorter ones in it.
            if most * longest_run(sums_W, round(n * factor)) / int(sums_W[-1]) <= limit:
                continue
            share, most = top_share(hashes, sums_W, round(n * factor), limit)
            if share > limit:
                return f"one {n}-gram again and again"
        lowest = min(limits["duplicate n-grams"])
        for n, limit in zip(ALL, limits["duplicate n-grams"]):
            share = duplicate_share(hashes, sums_W, round(n * factor), lowest)
            if share > limit:
                return f"duplicate {n}-grams"
            # What repeats in longer n-grams repeats in these as well.
            if share <= lowest:
                break
        return None


def _duplicates(parts: Sequence[str]) -> tuple[float, float]:
    """Share of parts that came before, and of their characters."""
    if len(set(parts)) == len(parts):
        return 0.0, 0.0
    seen: set[str] = set()
    n, characters = 0, 0
    for part in parts:
        if part in seen:
            n, characters = n + 1, characters + len(part)
        seen.add(part)
    return n / max(len(parts), 1), characters / max(sum(map(len, parts)), 1)


def longest_run(sums_W: np.ndarray, n: int) -> int:
    """Characters of the longest n-gram; 0 where there is none."""
    return int((sums_W[n:] - sums_W[:-n]).max(initial=0))


def top_share(hashes: RunHashes, sums_W: np.ndarray, n: int, enough: float = 0.0) -> tuple[float, int]:
    """Share of the characters in the commonest n-gram, if it is there twice at least; and how often it is there.

    Args:
        sums_W: characters before each word, and of all.
        enough: a share that cannot be above this one is not computed; its bound is returned.
    """
    if (found := views.repeated_share(hashes.sums, hashes.powers, sums_W, n, top=True, enough=enough)) is not None:
        return found
    hashes_G = hashes.ngrams(n)
    sorted_G = np.sort(hashes_G)
    new_G = np.ones(len(sorted_G), bool)
    np.not_equal(sorted_G[1:], sorted_G[:-1], out=new_G[1:])
    starts = np.flatnonzero(new_G)
    counts = np.diff(starts, append=len(sorted_G))
    most = int(counts.max(initial=0))
    if most < 2:
        return 0.0, most
    bound = most * longest_run(sums_W, n) / int(sums_W[-1])
    if bound <= enough:
        return bound, most
    # Of equally common ones the longest.
    lengths_G = sums_W[n:] - sums_W[:-n]
    longest = int(lengths_G[np.isin(hashes_G, sorted_G[starts[counts == most]])].max())
    return min(most * longest / int(sums_W[-1]), 1.0), most


def duplicate_share(hashes: RunHashes, sums_W: np.ndarray, n: int, enough: float = 0.0) -> float:
    """Share of the characters that lie in an n-gram which came before; `sums_W` and `enough` as for `top_share`."""
    if (found := views.repeated_share(hashes.sums, hashes.powers, sums_W, n, top=False, enough=enough)) is not None:
        return found[0]
    hashes_G = hashes.ngrams(n)
    sorted_G = np.sort(hashes_G)
    n_again = int(np.count_nonzero(sorted_G[1:] == sorted_G[:-1]))
    if n_again == 0:
        return 0.0
    bound = n_again * longest_run(sums_W, n) / int(sums_W[-1])
    if bound <= enough:
        return bound
    _, first = np.unique(hashes_G, return_index=True)
    again_G = np.ones(len(hashes_G), bool)
    again_G[first] = False
    edges = np.zeros(len(sums_W), np.int64)
    edges[:-n][again_G] += 1
    edges[n:][again_G] -= 1
    inside_W = np.cumsum(edges)[:-1] > 0
    return float(np.diff(sums_W)[inside_W].sum() / sums_W[-1])

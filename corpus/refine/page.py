"""A document on its way through the layers, and the views of its text that layers share, each made once.

Layers look at arrays over the characters instead of looping over them: what kind each is, where words begin and end,
and 64-bit hashes of words and terms in place of strings. A change of the text drops all views.

Legend: C characters, W words, T terms.
"""

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from corpus.refine import views
from corpus.refine.hashing import INVERSE, RunHashes, code_points, mix
from corpus.refine.kinds import DIGIT, HAN, KIND, KINDS_TABLE, LETTER, LOWER, SPACE, kinds_of

ENGLISH, CHINESE, CODE = "en", "zh", "code"
LANGUAGES = (ENGLISH, CHINESE, CODE)
# A short line that begins so is markup (of Markdown, TeX, HTML, roff, listings), and repeats in good documents.
FENCES = ("```", "~~~")
MARKUP, LONG_LINE, SHORTEST_LINE = frozenset("`$\\:<>{}[]()@|+=~?.%&_^#/\"'"), 40, 2


class Runs(NamedTuple):
    """Where words stand, in characters, and their hashes."""

    starts: np.ndarray
    ends: np.ndarray
    hashes: np.ndarray


class Page:
    """A text that layers judge and may change.

    Attributes:
        text: as written.
        language: one of `LANGUAGES`; None until a layer has said it.
        record: what else was known of the document where it came from (url, source, ...).
        masked: how many pieces of personal data of each kind were masked.
        scores: what layers with a model said.
    """

    def __init__(self, text: str, *, language: str | None = None, record: dict[str, Any] | None = None):
        self._text = text
        self.language = language
        self.record = record or {}
        self.masked: dict[str, int] = {}
        self.scores: dict[str, float | str] = {}

    @property
    def text(self) -> str:
        return self._text

    @text.setter
    def text(self, text: str) -> None:
        self._text = text
        self.forget()

    def forget(self) -> None:
        """Drops the views, some forty bytes a character: many pages may wait for what looks at them again."""
        for name, member in vars(Page).items():
            if isinstance(member, cached_property):
                self.__dict__.pop(name, None)

    @cached_property
    def codes_C(self) -> np.ndarray:
        """Code points, uint32."""
        return code_points(self._text)

    @cached_property
    def _kinds(self) -> tuple[np.ndarray, list[int]]:
        if (found := views.kinds_and_counts(self.codes_C, KINDS_TABLE, len(KIND))) is not None:
            return found[0], found[1].tolist()
        kinds_C = kinds_of(self.codes_C)
        return kinds_C, np.bincount(kinds_C, minlength=len(KIND)).tolist()

    @property
    def kinds_C(self) -> np.ndarray:
        """See `corpus.refine.kinds`."""
        return self._kinds[0]

    @property
    def counts(self) -> list[int]:
        """Characters of each kind."""
        return self._kinds[1]

    @cached_property
    def n_visible(self) -> int:
        """Characters that are not white space."""
        return len(self._text) - self.counts[SPACE]

    @cached_property
    def lines(self) -> list[str]:
        """Without their ends; the ends may be of any system."""
        return self._text.replace("\r\n", "\n").replace("\r", "\n").split("\n")

    @cached_property
    def stripped_lines(self) -> list[str]:
        """`lines` without the white space about them."""
        return list(map(str.strip, self.lines))

    @cached_property
    def prose_lines(self) -> list[str]:
        """Stripped lines that can be text: not empty, outside of fenced listings, and no line of mere markup."""
        lines = self.stripped_lines
        if any(fence in self._text for fence in FENCES):
            lines, fenced = [], False
            for line in self.stripped_lines:
                if line.startswith(FENCES):
                    fenced = not fenced
                elif not fenced:
                    lines.append(line)
        return [
            line for line in lines if len(line) > SHORTEST_LINE and (len(line) >= LONG_LINE or line[0] not in MARKUP)
        ]

    @cached_property
    def words(self) -> Runs:
        """What white space separates; in Chinese each Han character is a word of its own."""
        form = views.CHINESE_WORDS if self.language == CHINESE else views.WORDS
        if (found := views.runs(self.codes_C, self.kinds_C, form, LOWER, INVERSE)) is not None:
            return Runs(*found)
        visible_C = self.kinds_C != SPACE
        alone_C = self.kinds_C == HAN if self.language == CHINESE else np.zeros(len(visible_C), bool)
        return _runs(visible_C, alone_C, self.codes_C)

    @cached_property
    def terms(self) -> Runs:
        """What models and duplicates look at: runs of letters and digits in lower case, every digit the same, each Han
        character alone. Line ends, case, punctuation and figures make no difference."""
        kinds_C = self.kinds_C
        if (found := views.runs(self.codes_C, kinds_C, views.TERMS, LOWER, INVERSE)) is not None:
            return Runs(*found)
        codes_C = LOWER[np.minimum(self.codes_C, len(LOWER) - 1)]
        codes_C = np.where(self.codes_C < len(LOWER), codes_C, self.codes_C)
        codes_C = np.where(kinds_C == DIGIT, ord("0"), codes_C)
        alone_C = kinds_C == HAN
        return _runs((kinds_C == LETTER) | (kinds_C == DIGIT) | alone_C, alone_C, codes_C)

    @cached_property
    def term_hashes(self) -> RunHashes:
        return RunHashes(self.terms.hashes)

    @property
    def n_bytes(self) -> int:
        return len(self._text.encode("utf-8", "surrogatepass"))


def _runs(inside_C: np.ndarray, alone_C: np.ndarray, codes_C: np.ndarray) -> Runs:
    """Runs of characters that are inside, cut before and behind each that stands alone."""
    before_C = np.concatenate(([False], inside_C[:-1] & ~alone_C[:-1])) if len(inside_C) else inside_C
    starts = np.flatnonzero(inside_C & (~before_C | alone_C))
    behind_C = np.concatenate((inside_C[1:] & ~alone_C[1:], [False])) if len(inside_C) else inside_C
    ends = np.flatnonzero(inside_C & (~behind_C | alone_C)) + 1
    return Runs(starts, ends, RunHashes(mix(codes_C.astype(np.uint64) + np.uint64(1))).of(starts, ends))

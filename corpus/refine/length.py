"""Layer 4: documents too short to learn from, or too long to be one document."""

from typing import ClassVar

from corpus.refine.kinds import HAN, LETTER
from corpus.refine.layer import Layer
from corpus.refine.page import CHINESE, CODE, ENGLISH, Page

# Characters that no document can have which every layer keeps, of any language. A longer one is not looked at, because
# the views of a text take fifty bytes a character.
LONGEST = 1 << 23


class Length(Layer):
    """English is counted in words, Chinese in Han characters, code in lines."""

    name = "length"
    source = (
        "Gopher (arXiv 2112.11446, table A1) for English: 50 to 100,000 words, here from 40; a Chinese word is about"
        " 1.6 characters; code: our own"
    )
    thresholds: ClassVar = {
        ENGLISH: {"words": (40, 100_000)},
        CHINESE: {"characters": (40, 160_000)},
        CODE: {"lines": (5, 50_000)},
    }

    def judge(self, page: Page) -> str | None:
        language = page.language or ENGLISH
        if language == CHINESE:
            # A page of commands with Chinese remarks is as long as its letters say.
            n = page.counts[HAN] + page.counts[LETTER] // 4
        elif language == CODE:
            n = sum(map(bool, page.stripped_lines))
        else:
            n = len(page.words.starts)
        ((unit, (fewest, most)),) = self.thresholds[language].items()
        if n < fewest:
            return f"fewer than {fewest} {unit}"
        return f"more than {most:,} {unit}" if n > most else None

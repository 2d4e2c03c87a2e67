"""Layer 5: what a document consists of: symbols, digits, letters, punctuation, and the words that no text lacks."""

from typing import ClassVar

import numpy as np

from corpus.refine import views
from corpus.refine.kinds import DIGIT, HAN, LETTER, PUNCTUATION, SYMBOL
from corpus.refine.layer import Layer
from corpus.refine.page import CHINESE, CODE, ENGLISH, Page

STOP_WORDS = "the be to of and that have with"
# Among the commonest of modern and of classical Chinese, simplified and traditional: a text that was decoded by the
# wrong table consists of Han characters too, but hardly of these.
COMMON_HAN = (
    "的一是不了在人有我他这为之大来以个中上们到说国和地也子时道出而要于就下得可你年生自会那后能对着事其里所去行过用天然如作方成者多日都三"
    "小二无同么经法起与好看学进种将还分此心前面又定见只主没公从曰於為國來會時說後個這們無當與還進種對過動發學實現數行使或中件文字若何故夫亦乃"
    "兮矣乎焉哉吾君王"
)


class Ratios(Layer):
    name = "ratios"
    source = (
        "Gopher (arXiv 2112.11446, table A1): mean word length, symbols per word, words with a letter, stop words;"
        " code: StarCoder (arXiv 2305.06161); Chinese: characters in place of words, our own figures"
    )
    thresholds: ClassVar = {
        ENGLISH: {
            "mean word length": (3, 10),
            "hashes and ellipses per word": 0.1,
            "words with a letter": 0.7,
            "different stop words": 2,
            "digits": 0.3,
        },
        CHINESE: {
            "letters and Han": 0.5,
            "digits": 0.3,
            "punctuation": 0.35,
            "symbols": 0.25,
            "common characters among Han": 0.1,
        },
        CODE: {"letters and digits": 0.25, "digits": 0.4, "characters per line": (3, 120)},
    }

    def judge(self, page: Page) -> str | None:
        counts, n = page.counts, max(page.n_visible, 1)
        limits = self.thresholds[page.language or ENGLISH]
        if counts[DIGIT] > limits["digits"] * n:
            return "too many digits"
        if page.language == CHINESE:
            return self._judge_chinese(page, n)
        if page.language == CODE:
            return self._judge_code(page, n)
        return self._judge_english(page)

    def _judge_english(self, page: Page) -> str | None:
        limits, words = self.thresholds[ENGLISH], page.words
        n_words = max(len(words.starts), 1)
        shortest, longest = limits["mean word length"]
        mean = page.n_visible / n_words
        if not shortest <= mean <= longest:
            return "words too short" if mean < shortest else "words too long"
        symbols = page.text.count("#") + page.text.count("...") + page.text.count("\u2026")
        if symbols > limits["hashes and ellipses per word"] * n_words:
            return "too many hashes or ellipses"
        if words_with_a_letter(page) < limits["words with a letter"] * len(words.starts):
            return "words without letters"
        # The beginning of a long text says it as well.
        found = (page.terms.hashes[:2000, None] == _STOP_HASHES).any(axis=0)
        if np.count_nonzero(found) < limits["different stop words"]:
            return "no stop words"
        return None

    def _judge_chinese(self, page: Page, n: int) -> str | None:
        limits, counts = self.thresholds[CHINESE], page.counts
        if counts[LETTER] + counts[HAN] < limits["letters and Han"] * n:
            return "too few letters"
        if counts[PUNCTUATION] > limits["punctuation"] * n:
            return "too much punctuation"
        if counts[SYMBOL] > limits["symbols"] * n:
            return "too many symbols"
        common = np.count_nonzero(_IS_COMMON[np.minimum(page.codes_C, len(_IS_COMMON) - 1)])
        return "hardly any common characters" if common < limits["common characters among Han"] * counts[HAN] else None

    def _judge_code(self, page: Page, n: int) -> str | None:
        limits, counts = self.thresholds[CODE], page.counts
        if counts[LETTER] + counts[HAN] + counts[DIGIT] < limits["letters and digits"] * n:
            return "too few letters"
        shortest, longest = limits["characters per line"]
        mean = len(page.text) / max(len(page.lines), 1)
        return None if shortest <= mean <= longest else "lines too short or too long"


def words_with_a_letter(page: Page) -> int:
    """How many."""
    starts, ends, _ = page.words
    if (found := views.runs_with(page.kinds_C, starts, ends, LETTER)) is not None:
        return found
    if not len(starts):
        return 0
    # Between words there are no letters.
    return int(np.count_nonzero(np.add.reduceat(page.kinds_C == LETTER, starts, dtype=np.int64)))


def _hash_of_term(term: str) -> int:
    return int(Page(term).terms.hashes[0])


_STOP_HASHES = np.array([_hash_of_term(word) for word in STOP_WORDS.split()], np.uint64)
_IS_COMMON = np.zeros(1 << 16, bool)
_IS_COMMON[np.frombuffer(COMMON_HAN.encode("utf-32-le"), "<u4")] = True

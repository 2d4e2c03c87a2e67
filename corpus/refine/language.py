"""Layer 3: which of the languages a document is in; others go.

Scripts decide what they can: Han without kana and Hangul is Chinese, whatever the model says of classical or technical
text. Code is known by its lines. The rest is asked of py3langid, whose model comes with the package, on a piece from
the middle of the text: its cost grows with the length, its answer hardly (of 400 documents of this kind all 200 English
ones are right at 200 characters).
"""

import functools
import re
from typing import Any, ClassVar

import numpy as np

from corpus.refine import views
from corpus.refine.kinds import DIGIT, HAN, HANGUL, KANA, LETTER, PUNCTUATION, SYMBOL
from corpus.refine.layer import Layer
from corpus.refine.page import CHINESE, CODE, ENGLISH, LANGUAGES, Page

ASKED_CHARACTERS = 300
# Lines as programs have them and prose does not: of Python, C and its kin, JavaScript, shell.
_CODE_LINE = re.compile(
    r"(?:async )?def \w+\(|class \w+[\s(:{]|(?:from [\w.]+ )?import [\w.*{]|#include\b|#define\b|#!/|return\b"
    r"|(?:if|elif|while|for|with|try|except|else|finally)\b[^.]*:$|(?:public|private|static|const|let|var|func|fn)\s"
    r"|@\w[\w.]*(?:\(|$)|[\w.\[\]'\"]+\s*[-+*/|&]?=\s*\S|self\.|[\w.]+\("
)
_CODE_ENDS, _CODE_PAIRS = frozenset(";{}(["), frozenset(("},", "),", "],", "})"))
# Of a longer document lines at equal distances are looked at.
_LINES_LOOKED_AT = 100


class Language(Layer):
    """Sets `page.language`; None for a language that has no thresholds here.

    Args:
        languages: those that stay.

    Raises:
        ImportError: where py3langid is not installed.
    """

    name = "language"
    source = (
        "py3langid, whose probabilities over 130 languages are lower than those of fastText, of which CCNet (arXiv"
        " 1911.00359) asks for 0.5; script check and code rules are our own"
    )
    thresholds: ClassVar = {
        ENGLISH: {"probability": 0.2},
        CHINESE: {"Han among letters": 0.2, "kana among Han": 0.05, "Hangul among Han": 0.05},
        CODE: {"lines that look like code": 0.45, "marks among characters": 0.08},
    }

    def __init__(self, languages: tuple[str, ...] = LANGUAGES):
        self._languages = languages
        # Reading its model takes as long as a thousand documents, which is not the first one's time.
        identifier()

    def judge(self, page: Page) -> str | None:
        found = self._language(page)
        page.language = found if found in LANGUAGES else None
        if found in self._languages:
            return None
        return f"language {found}"

    def _language(self, page: Page) -> str:
        counts = page.counts
        han, letters = counts[HAN], counts[HAN] + counts[LETTER] + counts[KANA] + counts[HANGUL]
        if looks_like_code(page, self.thresholds[CODE]):
            return CODE
        limits = self.thresholds[CHINESE]
        if han and han >= limits["Han among letters"] * letters:
            if counts[KANA] > limits["kana among Han"] * han:
                return "ja"
            return "ko" if counts[HANGUL] > limits["Hangul among Han"] * han else CHINESE
        if not letters:
            return "none"
        middle = max((len(page.text) - ASKED_CHARACTERS) // 2, 0)
        limit = self.thresholds[ENGLISH]["probability"]
        code, probability = identifier().classify(page.text[middle : middle + ASKED_CHARACTERS])
        # Formulas, tables and listings in the middle of an English text look like no language.
        if (code != ENGLISH or probability < limit) and middle:
            code, probability = identifier().classify(page.text[: 3 * ASKED_CHARACTERS])
        if code in ("wuu", "yue") and han:
            return CHINESE
        return code if probability >= limit else "unsure"


def looks_like_code(page: Page, limits: Any) -> bool:
    counts = page.counts
    if counts[HAN] > 0.2 * page.n_visible:
        return False
    if counts[SYMBOL] + counts[PUNCTUATION] < limits["marks among characters"] * (page.n_visible - counts[DIGIT]):
        return False
    lines = [line for line in page.stripped_lines[:: 1 + len(page.lines) // _LINES_LOOKED_AT] if line]
    n_code, n_left, needed = 0, len(lines), limits["lines that look like code"] * len(lines)
    for line in lines:
        n_code += line[-1] in _CODE_ENDS or line[-2:] in _CODE_PAIRS or _CODE_LINE.match(line) is not None
        n_left -= 1
        # The lines that are left change nothing any more.
        if n_code > needed or n_code + n_left <= needed:
            break
    return n_code > needed


@functools.cache
def identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise ImportError('telling languages needs py3langid: pip install -e ".[corpus]"') from error

    class Identifier(LanguageIdentifier):
        """The same, faster: its walk over the bytes is one call of C where there is a compiler."""

        def __init__(self, nb_ptc: np.ndarray, *arguments: Any, **named: Any):
            # Half floats, of which the same numbers come anew with every text.
            super().__init__(nb_ptc.astype(np.float32), *arguments, **named)
            states = np.array([self._rowbase, self.tk_output], np.int32).T.copy()
            place = np.full(int(states[:, 1].max()) + 1, -1, np.int32)
            self._automaton = np.asarray(self.tk_nextmove, np.uint32), states, place

        def _raw_score(self, text: bytes) -> np.ndarray:
            visits = views.walk(text, *self._automaton)
            if visits is None or not len(visits[0]):
                return super()._raw_score(text)
            features, counts = visits
            return np.log1p(counts.astype(np.float32)) @ self.nb_ptc[features] + self.nb_pc

    return Identifier.from_model_file(MODEL_FILE, norm_probs=True)

"""Layer 1: text that was decoded wrongly goes; everything else is compared in one form and stays as written.

Bytes that are no UTF-8 do not come this far: the readers name them. What comes is text whose damage happened earlier,
and three kinds of it can be told: characters that decoding puts where it failed (U+FFFD, control characters), UTF-8
read as Latin-1 or Windows-1252 (a Chinese character then takes three Latin ones, one of U+00E4 to U+00E9 first), and
GBK read as Latin-1 (nearly nothing but U+00A1 to U+00FE).
"""

import re
import unicodedata
from typing import ClassVar

import numpy as np

from corpus.refine.kinds import BROKEN
from corpus.refine.layer import Layer
from corpus.refine.page import CHINESE, CODE, ENGLISH, Page

# A lead byte of UTF-8 and its continuation, as Latin-1 or Windows-1252 show them.
_UTF8_AS_LATIN1 = re.compile(
    "[\u00c2-\u00f4][\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122]"
)


def comparable(text: str) -> str:
    """The form in which texts are compared: no byte order mark, line feeds alone as line ends, NFC."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    return text if text.isascii() else unicodedata.normalize("NFC", text)


class Normalise(Layer):
    name = "normalise"
    source = "garbled text is removed first: Yi (arXiv 2403.04652, section 2.1); the three tests are our own"
    thresholds: ClassVar = {
        language: {"broken characters": 0.002, "UTF-8 read as Latin-1": 0.02, "GBK read as Latin-1": 0.3}
        for language in (ENGLISH, CHINESE, CODE)
    }

    def judge(self, page: Page) -> str | None:
        n = max(page.n_visible, 1)
        limits = self.thresholds[ENGLISH]
        if not page.n_visible:
            return "nothing but white space"
        if page.counts[BROKEN] > limits["broken characters"] * n:
            return "broken characters"
        if page.text.isascii():
            return None
        upper_latin = int(np.count_nonzero((page.codes_C >= 0xA1) & (page.codes_C <= 0xFE)))
        if upper_latin > limits["GBK read as Latin-1"] * n:
            return "GBK read as Latin-1"
        # Each pair begins with one of these.
        allowed = limits["UTF-8 read as Latin-1"] * n
        if 2 * upper_latin > allowed and 2 * len(_UTF8_AS_LATIN1.findall(page.text)) > allowed:
            return "UTF-8 read as Latin-1"
        return None

"""What kind of character each code point is, as a table: letters, Han, digits, punctuation, symbols, spaces."""

import sys
import unicodedata

import numpy as np

SPACE, LETTER, HAN, DIGIT, PUNCTUATION, SYMBOL, KANA, HANGUL, BROKEN = range(9)
KIND = ("space", "letter", "han", "digit", "punctuation", "symbol", "kana", "hangul", "broken")
# Beyond the basic plane only Han has a kind of its own; the rest (emoji, mostly) counts as symbols.
_TABLE = 1 << 16
_RANGES = (
    (HAN, 0x2E80, 0x2FDF),
    (HAN, 0x3400, 0x4DBF),
    (HAN, 0x4E00, 0x9FFF),
    (HAN, 0xF900, 0xFAFF),
    (HAN, 0x3005, 0x3007),
    (KANA, 0x3041, 0x30FA),
    (KANA, 0x31F0, 0x31FF),
    (HANGUL, 0xAC00, 0xD7AF),
    (HANGUL, 0x1100, 0x11FF),
)


def _kind(code: int) -> int:
    character = chr(code)
    category = unicodedata.category(character)
    if character.isspace():
        return SPACE
    # What a wrong decoding leaves: replacement characters, control characters, code points that nobody assigned.
    if code == 0xFFFD or category in ("Cc", "Cn", "Co", "Cs"):
        return BROKEN
    return {"L": LETTER, "M": LETTER, "N": DIGIT, "P": PUNCTUATION, "Z": SPACE}.get(category[0], SYMBOL)


def _tables() -> tuple[np.ndarray, np.ndarray]:
    kinds = np.fromiter(map(_kind, range(_TABLE)), np.uint8, _TABLE)
    for kind, first, last in _RANGES:
        kinds[first : last + 1] = kind
    # The byte order mark is no text.
    kinds[0xFEFF] = SPACE
    lower = np.arange(_TABLE, dtype=np.uint32)
    for code in range(_TABLE):
        small = chr(code).lower()
        if len(small) == 1 and ord(small) < _TABLE:
            lower[code] = ord(small)
    return kinds, lower


KINDS_TABLE, LOWER = _tables()


def kinds_of(codes_C: np.ndarray) -> np.ndarray:
    """Kinds of code points, uint8; those of `sys.maxunicode` and below are all legal."""
    assert not len(codes_C) or codes_C.max() <= sys.maxunicode
    kinds_C = KINDS_TABLE[np.minimum(codes_C, _TABLE - 1)]
    if len(codes_C) and codes_C.max() >= _TABLE:
        beyond_C = codes_C >= _TABLE
        kinds_C = np.where(beyond_C, SYMBOL, kinds_C)
        kinds_C[beyond_C & (codes_C >= 0x20000) & (codes_C < 0x40000)] = HAN
    return kinds_C.astype(np.uint8)

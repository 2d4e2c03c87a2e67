"""Layer 8: personal data is masked, and unsafe documents go.

A number is personal by its form and, where it has them, its check digits: prices, dates, versions and measures have
neither. Unsafe content is scored by a list of words with weights, which `--unsafe-list` replaces.
"""

import functools
import re
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import ClassVar

import numpy as np

from corpus.refine import views
from corpus.refine.hashing import RunHashes
from corpus.refine.layer import Layer
from corpus.refine.page import CHINESE, CODE, ENGLISH, Page

LIST = Path(__file__).with_name("unsafe_words.txt")
MASKS = {kind: f"<{kind}>" for kind in ("EMAIL", "PHONE", "ID_NUMBER", "CARD_NUMBER", "IP_ADDRESS")}

_EMAIL = re.compile(
    r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}(?![\w@])",
    re.ASCII,
)
# A run of digits as people write numbers: with single spaces, dots, hyphens or brackets between.
_NUMBER = re.compile(r"(?<![\w.,/$€£¥#%=+-])(?:\+|00)?\(?\d(?:[ .()/-]{0,2}\d){6,24}[Xx]?(?![\w%/,-]|\.\w)", re.ASCII)
_IPV4 = re.compile(r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)", re.ASCII)
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{1,4}:){2,7}(?::?[0-9A-Fa-f]{1,4}){1,6}(?![\w:])", re.ASCII)
# Mobile numbers of China; numbers of North America with their separators; any with a country code in front.
_PHONE_FORMS = (
    re.compile(r"(?:(?:\+|00)86[ -]?)?1[3-9]\d[ -]?\d{4}[ -]?\d{4}"),
    re.compile(r"(?:\+?1[ .-]?)?(?:\([2-9]\d\d\) ?|[2-9]\d\d[.-])[2-9]\d\d[.-]\d{4}"),
    re.compile(r"\+[1-9]\d{0,2}(?:[ .-]?\(?\d{1,4}\)?){2,5}"),
    re.compile(r"0\d{2,3}-\d{7,8}"),
)
_CARD_GROUPS = re.compile(r"\d{4}([ -]?)\d{4}\1\d{4}\1\d{1,7}|3\d{3}([ -]?)\d{6}\2\d{5}")
_SOCIAL_SECURITY = re.compile(r"(?!000|666|9)\d{3}-(?!00)\d\d-(?!0000)\d{4}")
_IDENTITY_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
FIRST_NETWORK = 13
_BUCKETS = 1 << 16
_SAFE_LIMIT = "unsafe words, weighted, per 1,000 characters"


class PersonalData(Layer):
    """Masks e-mail addresses, telephone numbers, Chinese identity numbers and card numbers with valid check digits,
    US social security numbers, and public IP addresses; then scores what is unsafe.

    Args:
        path: list of unsafe words, see `read_words`.
    """

    name = "personal_data"
    source = (
        "e-mail and IP as FineWeb (arXiv 2406.17557); check digits: GB 11643 (ISO 7064 mod 11-2), ISO 7812 (Luhn); the"
        " list of unsafe words is our own"
    )
    thresholds: ClassVar = {language: {_SAFE_LIMIT: 6.0, "different": 2} for language in (ENGLISH, CHINESE, CODE)}

    def __init__(self, path: Path | None = None):
        words = read_words(path or LIST)
        phrases = {hash_of_phrase(word): weight for word, weight in words.items()}
        self._lengths = np.unique(np.array([n_terms for n_terms, _ in phrases], np.int64))
        # The hash of a run says its length as well.
        weights = sorted((value, weight) for (_, value), weight in phrases.items())
        self._hashes = np.array([value for value, _ in weights], np.uint64)
        self._weights = [weight for _, weight in weights]
        self._first_terms = np.zeros(_BUCKETS, bool)
        self._first_terms[[int(Page(word).terms.hashes[0]) % _BUCKETS for word in words]] = True

    def judge(self, page: Page) -> str | None:
        masked, counts = mask(page.text, views.gated_lines(page.codes_C))
        if counts:
            page.text = masked
            for kind, count in counts.items():
                page.masked[kind] = page.masked.get(kind, 0) + count
        score, different = self._unsafe(page)
        limits = self.thresholds[page.language or ENGLISH]
        if different < limits["different"]:
            return None
        return "unsafe" if 1000 * score > limits[_SAFE_LIMIT] * max(page.n_visible, 1) else None

    def _unsafe(self, page: Page) -> tuple[float, int]:
        """Sum of the weights of all entries that the text has, and how many different ones."""
        terms, runs = page.terms.hashes, page.term_hashes
        found = views.listed(terms, (runs.sums, runs.powers), self._first_terms, self._lengths, self._hashes)
        places = (self._listed(terms, runs) if found is None else found).tolist()
        return sum((self._weights[place] for place in places), 0.0), len(set(places))

    def _listed(self, terms: np.ndarray, runs: RunHashes) -> np.ndarray:
        """See `views.listed`."""
        # Nearly no term begins an entry: the phrases are looked up at those few places.
        starts = np.flatnonzero(self._first_terms[(terms & np.uint64(_BUCKETS - 1)).astype(np.int64)])
        first, n_terms = np.tile(starts, len(self._lengths)), np.repeat(self._lengths, len(starts))
        fitting = first + n_terms <= len(terms)
        values = runs.of(first[fitting], (first + n_terms)[fitting])
        place = np.searchsorted(self._hashes, values)
        return place[np.append(self._hashes, np.uint64(0))[place] == values]


def mask(text: str, lines: Sequence[tuple[int, int]] | None = None) -> tuple[str, dict[str, int]]:
    """The text with each piece of personal data replaced by what it is, and how many of each kind there were.

    Args:
        lines: what `gated_lines` says of the text; looked for here where it is None.
    """
    counts: dict[str, int] = {}

    def replace(kind_of: Callable[[str], str | None], match: re.Match[str]) -> str:
        # A bracket before the number is part of it only where one closes in it.
        bracket = "(" if match[0].startswith("(") and ")" not in match[0] else ""
        kind = kind_of(match[0].removeprefix(bracket))
        if kind is None:
            return match[0]
        counts[kind] = counts.get(kind, 0) + 1
        return bracket + MASKS[kind]

    parts, done = [], 0
    for start, end in gated_lines(text) if lines is None else lines:
        line = text[start:end]
        # IP addresses before numbers: a number with dots could be either.
        for gate, form, kind_of in _FORMS:
            if gate.search(line):
                line = form.sub(functools.partial(replace, kind_of), line)
        parts += [text[done:start], line]
        done = end
    return ("".join([*parts, text[done:]]) if counts else text), counts


def gated_lines(text: str) -> list[tuple[int, int]]:
    """Characters of the lines, without their line feeds, that a gate finds something in: hardly any, which is seen
    fast. Neither gates nor forms see beyond a line's end."""
    found: set[tuple[int, int]] = set()
    for gate, _, _ in _FORMS:
        end = 0
        while match := gate.search(text, end):
            start, end = text.rfind("\n", 0, match.start()) + 1, text.find("\n", match.end())
            end = len(text) if end < 0 else end
            found.add((start, end))
    return sorted(found)


def kind_of_number(written: str) -> str | None:
    """What a number is, if it is somebody's: by its check digits, or the form of a telephone number."""
    digits = re.sub(r"[^\dXx]", "", written)
    if len(digits) == 18 and digits == written and is_identity_number(digits):
        return "ID_NUMBER"
    if _SOCIAL_SECURITY.fullmatch(written):
        return "ID_NUMBER"
    if 13 <= len(digits) <= 19 and digits.isdigit() and _CARD_GROUPS.fullmatch(written) and is_card_number(digits):
        return "CARD_NUMBER"
    if any(form.fullmatch(written) for form in _PHONE_FORMS) and 7 <= len(digits) <= 15:
        return "PHONE"
    return None


def is_identity_number(digits: str) -> bool:
    """Of a resident of China: region, date of birth, serial, and a check digit modulo 11, of which X is ten."""
    month, day = int(digits[10:12]), int(digits[12:14])
    if digits[6:8] not in ("18", "19", "20") or not (1 <= month <= 12 and 1 <= day <= 31):
        return False
    total = sum(weight * int(digit) for weight, digit in zip(_IDENTITY_WEIGHTS, digits))
    return "10X98765432"[total % 11] == digits[17].upper()


def is_card_number(digits: str) -> bool:
    """Luhn's check, and a first digit that card networks use."""
    if digits[0] not in "3456" or len(set(digits)) == 1:
        return False
    doubled = [int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(digits))]
    return sum(value - 9 * (value > 9) for value in doubled) % 10 == 0


def _kind_of_address(written: str) -> str | None:
    try:
        address = IPv6Address(written) if ":" in written else IPv4Address(written)
    except ValueError:
        return None
    # Versions and section numbers look like addresses of the lowest networks, and are far commoner.
    if address.version == 4 and int(address) >> 24 < FIRST_NETWORK:
        return None
    return "IP_ADDRESS" if address.is_global else None


# By what a line must have, the form itself, and what says of a match which kind it is, if any.
_FORMS: tuple[tuple[re.Pattern[str], re.Pattern[str], Callable[[str], str | None]], ...] = (
    (re.compile("@"), _EMAIL, lambda _: "EMAIL"),
    (re.compile(r"\d\.\d+\.\d", re.ASCII), _IPV4, _kind_of_address),
    (re.compile(r"::|:[0-9A-Fa-f]+:[0-9A-Fa-f]+:"), _IPV6, _kind_of_address),
    (re.compile(r"\d(?:[ .()/-]{0,2}\d){6}", re.ASCII), _NUMBER, kind_of_number),
)


def read_words(path: Path) -> dict[str, float]:
    """One entry a line: a weight and a word or phrase; `#` begins a comment.

    Raises:
        ValueError: for a line of another form, naming file and line.
    """
    found: dict[str, float] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        entry = line.partition("#")[0].split(maxsplit=1)
        if not entry:
            continue
        try:
            weight, word = entry
            found[word.strip().lower()] = float(weight)
        except ValueError:
            raise ValueError(f"{path}:{number}: {line.strip()!r} is no entry; legal are a weight and a word") from None
    return found


def hash_of_phrase(phrase: str) -> tuple[int, int]:
    """How many terms a phrase has, and their common hash."""
    page = Page(phrase)
    n_terms = len(page.terms.hashes)
    return n_terms, int(page.term_hashes.ngrams(n_terms)[0])

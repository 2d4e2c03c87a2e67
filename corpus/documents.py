"""From sources to two lists of documents: duplicates removed, split into train and valid, in an order that depends on
nothing but the texts.

A document's SHA-256 decides: it is the sort key (a shuffle that needs no seed), and the documents that come first are
held out. So neither the order nor the names of the input files matter, and where a share is held out, whose bound is a
hash, a document stays in its split when others are added. Copies that differ in byte order mark or line ends only are
duplicates too, or text held out would stand in training as well; of such copies the one with the lowest hash stays, as
it is written.

What a comparison can see depends on how many documents are held out, and what its evaluation costs on how much text
they have: so by default they are many, and a stretch of each is used.

Texts wait in a temporary file, of which memory holds 20 bytes a document, some 110 while copies are looked for, and
the names of domains.

Legend: N documents read, K documents kept.
"""

import hashlib
import os
import re
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, overload

import numpy as np

from corpus.readers import Document, Skipped
from corpus.sources import read_paths, read_standard_library
from foundation.files import naming
from foundation.numbers import check_numbers


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Texts of both splits, each in the order of their hashes.

    Attributes:
        duplicates_removed: documents that were read again, byte order mark and line ends aside.
        skipped: what could not be used, with its place: the first `LISTED` of it.
        skipped_kinds: how often each reason, with the first place of each.
        content_hash: SHA-256 over the sorted hashes of the documents.
    """

    train: "WaitingTexts"
    valid: "WaitingTexts"
    duplicates_removed: int
    skipped: tuple[Skipped, ...]
    skipped_kinds: "tuple[SkippedKind, ...]"
    content_hash: str


@dataclass(frozen=True, kw_only=True)
class HoldOut:
    """Which documents are held out, and how much of each. None of the rest of a document is trained on.

    Attributes:
        documents: how many, half of all at most.
        characters: of each the stretch of so many characters that begins at a line chosen by its hash; 0 for all.
        share: an expected share of the documents instead, between 0 and 1, all of each.
    """

    documents: int = 300
    characters: int = 800
    share: float | None = None

    def __post_init__(self) -> None:
        if self.share is not None and not 0 < self.share < 1:
            raise ValueError(f"HoldOut.share: {self.share}, must lie between 0 and 1 (both excluded)")
        check_numbers(self, documents=1, characters=0)

    def count(self, leading_K: np.ndarray) -> int:
        """How many of the documents.

        Args:
            leading_K: the first word of their hashes, ascending.
        """
        if self.share is None:
            count = min(self.documents, len(leading_K) // 2)
        else:
            count = int(np.searchsorted(leading_K, np.uint64(min(int(self.share * 2**64), 2**64 - 1))))
        # Of few documents none might fall below the share; neither side stays empty.
        return min(max(count, 1), len(leading_K) - 1)

    def stretch(self, text: str, leading: int) -> str:
        """What of a text is used.

        Args:
            leading: the first word of its hash.
        """
        if self.share is not None or not 0 < self.characters < len(text):
            return text
        last = len(text) - self.characters
        begins = [0, *(match.end() for match in re.finditer("\n", text[:last]))]
        begin = begins[leading % len(begins)]
        return text[begin : begin + self.characters]


@dataclass(frozen=True, kw_only=True)
class SkippedKind:
    """How often something could not be used for one reason, and the first places."""

    reason: str
    count: int
    places: tuple[str, ...]

    def line(self) -> str:
        """For the summary: every place of a few, the first of many."""
        more = f" and {self.count - len(self.places):,} more" if self.count > len(self.places) else ""
        return f"{self.count:,} x {self.reason}: {', '.join(self.places)}{more}"


# Of what was skipped so many records are listed one by one, and so many places are named per reason.
LISTED, PLACES = 1000, 5
RECORD = np.dtype([("start", "<i8"), ("bytes", "<i8"), ("domain", "<i4")])
# A text is told from others by so many bytes of its SHA-256: no two texts have had 128 bits in common.
DIGEST, TOLD_BY = 32, 16
SORTED_AT_ONCE = 1 << 16


class WaitingTexts(Sequence[str]):
    """Texts in a file, read when they are asked for.

    Args:
        records_K: where each lies.
        domains: names, which records count from 0.
    """

    def __init__(self, file: BinaryIO, records_K: np.ndarray, domains: list[str]):
        self._file = file
        self._records_K = records_K
        self._domains = domains

    def __len__(self) -> int:
        return len(self._records_K)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "WaitingTexts": ...
    def __getitem__(self, index: int | slice) -> "str | WaitingTexts":
        if isinstance(index, slice):
            return WaitingTexts(self._file, self._records_K[index], self._domains)
        record = self._records_K[index]
        return os.pread(self._file.fileno(), int(record["bytes"]), int(record["start"])).decode()

    def __iter__(self) -> Iterator[str]:
        return (self[place] for place in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WaitingTexts) and list(self) == list(other)

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    @property
    def domains(self) -> list[str]:
        """The domain of every text, see `Document.domain`."""
        return [self._domains[domain] for domain in self._records_K["domain"].tolist()]

    def numbered_domains(self) -> tuple[list[str], np.ndarray]:
        """The names of their domains, sorted, and the number of every text's among them, int32."""
        numbers, number_K = np.unique(self._records_K["domain"], return_inverse=True)
        names = [self._domains[number] for number in numbers.tolist()]
        order = sorted(range(len(names)), key=names.__getitem__)
        return [names[place] for place in order], np.argsort(order)[number_K].astype("<i4")

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of all."""
        return int(self._records_K["bytes"].sum())


def load_documents(data: Sequence[str], *, text_field: str, hold_out: HoldOut, folder: Path | None = None) -> Documents:
    """Documents of the user's paths, or of the Python standard library if there are none.

    Args:
        hold_out: what becomes the validation text.
        folder: where the temporary file may lie, which takes as much room as the text; the system's by default.

    Raises:
        ValueError: where nothing usable is found, or one document only.
    """
    skipped = _Skips()
    # Without a name: it goes with the process, however that ends.
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
    found = _Found()
    domains: dict[str, int] = {}
    with naming(Path(folder or tempfile.gettempdir()) / "the texts, waiting", "nothing of it is left"):
        for item in read_paths(data, text_field=text_field) if data else read_standard_library():
            if not isinstance(item, Document):
                skipped.add(item)
                continue
            text = item.text.encode()
            same = _without_marks(item.text).encode()
            found.add(same, text, domains.setdefault(item.domain, len(domains)))
            file.write(text)
        file.flush()
    n_read = len(found)
    if not n_read:
        examples = "; ".join(f"{item.place}: {item.reason}" for item in skipped.listed[:5])
        said = f"{skipped.count} skipped, first ones: {examples}" if skipped.count else "the files are empty"
        raise ValueError(f"no usable document in {list(data)}: {said}")

    kept_K, leading_K, content_hash = found.without_copies()
    # It is as long as the corpus has documents.
    del found
    if len(kept_K) == 1:
        raise ValueError(
            "one distinct document cannot be both trained on and held out, since a document is held out whole; legal:"
            " two or more"
        )
    # Digests are sorted, so the held-out documents are a prefix.
    n_valid = hold_out.count(leading_K)
    valid_K = kept_K[:n_valid].copy()
    whole = WaitingTexts(file, kept_K[:n_valid], list(domains))
    for record, text, leading in zip(valid_K, whole, leading_K.tolist()):
        if (stretch := hold_out.stretch(text, leading)) != text:
            record["start"] = file.seek(0, os.SEEK_END)
            record["bytes"] = file.write(stretch.encode())
            file.flush()
    return Documents(
        train=WaitingTexts(file, kept_K[n_valid:], list(domains)),
        valid=WaitingTexts(file, valid_K, list(domains)),
        duplicates_removed=n_read - len(kept_K),
        skipped=tuple(skipped.listed),
        skipped_kinds=skipped.kinds(),
        content_hash=content_hash,
    )


class _Skips:
    """What was skipped: the first of it, and how much of each kind."""

    def __init__(self) -> None:
        self.count = 0
        self.listed: list[Skipped] = []
        self._kinds: Counter[str] = Counter()
        self._places: dict[str, list[str]] = {}

    def add(self, item: Skipped) -> None:
        self.count += 1
        if len(self.listed) < LISTED:
            self.listed.append(item)
        self._kinds[item.kind] += 1
        places = self._places.setdefault(item.kind, [])
        if len(places) < PLACES:
            places.append(item.place)

    def kinds(self) -> tuple[SkippedKind, ...]:
        return tuple(
            SkippedKind(reason=kind, count=count, places=tuple(self._places[kind]))
            for kind, count in sorted(self._kinds.items(), key=lambda pair: (-pair[1], pair[0]))
        )


class _Found:
    """What was read: of every document its hashes and where its text lies, a column each."""

    def __init__(self) -> None:
        # Hashes without marks, as two numbers; those of the text itself; bytes and domains.
        self._same = array("Q"), array("Q")
        self._own = bytearray()
        self._bytes, self._domain = array("q"), array("i")

    def __len__(self) -> int:
        return len(self._bytes)

    def add(self, same: bytes, text: bytes, domain: int) -> None:
        """Of a document, behind the one before.

        Args:
            same: the text without marks.
        """
        own = _sha256(text)
        digest = own if same == text else _sha256(same)
        for words, start in zip(self._same, (0, 8)):
            words.append(int.from_bytes(digest[start : start + 8], "big"))
        self._own += own
        self._bytes.append(len(text))
        self._domain.append(domain)

    def without_copies(self) -> tuple[np.ndarray, np.ndarray, str]:
        """Of copies the one with the lowest hash of its own, in the order of these hashes.

        Returns:
            `RECORD` [K], the first words of the hashes, uint64 [K], and the hash of all hashes.
        """
        own_N = np.frombuffer(self._own, f"V{DIGEST}")
        words_N = np.frombuffer(self._own, ">u8").reshape(len(self), -1)
        first_N, second_N = (words_N[:, word].astype(np.uint64) for word in range(TOLD_BY // 8))
        same_N = [np.frombuffer(words, np.uint64) for words in self._same]
        # The last key counts most.
        order = np.lexsort((second_N, first_N, *reversed(same_N)))
        new_N = np.zeros(len(order), bool)
        new_N[:1] = True
        for words in same_N:
            sorted_N = words[order]
            new_N[1:] |= sorted_N[1:] != sorted_N[:-1]
        kept = order[new_N]
        del order, sorted_N
        kept = kept[np.lexsort((second_N[kept], first_N[kept]))]
        content = hashlib.sha256()
        for start in range(0, len(kept), SORTED_AT_ONCE):
            content.update(own_N[kept[start : start + SORTED_AT_ONCE]].tobytes())
        records_K = np.empty(len(kept), RECORD)
        n_bytes_N = np.frombuffer(self._bytes, np.int64)
        records_K["bytes"] = n_bytes_N[kept]
        records_K["start"] = (np.cumsum(n_bytes_N) - n_bytes_N)[kept]
        records_K["domain"] = np.frombuffer(self._domain, np.int32)[kept]
        return records_K, first_N[kept], content.hexdigest()


def _without_marks(text: str) -> str:
    """The text as an editor on any system shows it: without byte order mark, with one kind of line end."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _sha256(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()

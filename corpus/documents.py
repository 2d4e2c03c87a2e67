"""From sources to two lists of documents: duplicates removed, split into train and valid, in an order that depends on
nothing but the texts.

A document's SHA-256 decides: the first 8 bytes choose the split, and the whole hash is the sort key (a shuffle that
needs no seed). So neither the order nor the names of the input files matter, and a document stays in its split when
others are added. Copies that differ in byte order mark or line ends only are duplicates too, or text held out would
stand in training as well; of such copies the one with the lowest hash stays, as it is written. All texts are held in
memory.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from corpus.readers import Document, Skipped
from corpus.sources import read_paths, read_standard_library


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Texts of both splits, each in the order of their hashes.

    Attributes:
        duplicates_removed: documents that were read again, byte order mark and line ends aside.
        skipped: what could not be used, with its place.
        content_hash: SHA-256 over the sorted hashes of the documents.
    """

    train: list[str]
    valid: list[str]
    duplicates_removed: int
    skipped: tuple[Skipped, ...]
    content_hash: str


def load_documents(data: Sequence[str], *, text_field: str, valid_share: float) -> Documents:
    """Documents of the user's paths, or of the Python standard library if there are none.

    Args:
        valid_share: expected share of the documents held out, between 0 and 1.

    Raises:
        ValueError: where nothing usable is found, or either side of the split is empty.
    """
    if not 0 < valid_share < 1:
        raise ValueError(f"valid_share must lie between 0 and 1 (both excluded), got {valid_share}")
    # By the hash of what copies have in common: the hash and the text of the copy that stays.
    kept: dict[bytes, tuple[bytes, str]] = {}
    skipped: list[Skipped] = []
    n_read = 0
    for item in read_paths(data, text_field=text_field) if data else read_standard_library():
        if isinstance(item, Document):
            n_read += 1
            same, own = _sha256(_without_marks(item.text)), _sha256(item.text)
            if same not in kept or own < kept[same][0]:
                kept[same] = own, item.text
        else:
            skipped.append(item)
    if not kept:
        examples = "; ".join(f"{item.place}: {item.reason}" for item in skipped[:5])
        raise ValueError(f"no usable document in {list(data)}: {len(skipped)} skipped, first ones: {examples}")

    text_of_digest = dict(kept.values())
    digests = sorted(text_of_digest)
    # Digests are sorted, so the held-out documents are a prefix.
    n_valid = sum(int.from_bytes(digest[:8], "big") < valid_share * 2**64 for digest in digests)
    if n_valid == 0 or n_valid == len(digests):
        empty = "validation" if n_valid == 0 else "training"
        raise ValueError(
            f"the {empty} split is empty: valid_share={valid_share} of {len(digests)} distinct documents; give more"
            " documents or another share (a document is held out whole)"
        )
    texts = [text_of_digest[digest] for digest in digests]
    return Documents(
        train=texts[n_valid:],
        valid=texts[:n_valid],
        duplicates_removed=n_read - len(digests),
        skipped=tuple(skipped),
        content_hash=hashlib.sha256(b"".join(digests)).hexdigest(),
    )


def _without_marks(text: str) -> str:
    """The text as an editor on any system shows it: without byte order mark, with one kind of line end."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()

"""Which domain a document is of: what its record says, or the name of the file that it came from."""

import hashlib
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from corpus.prepare import PreparedCorpus
from corpus.readers import Document, read_file
from corpus.refine.shards import domain_of
from corpus.sources import find_files

STANDARD_LIBRARY, UNKNOWN = "standard_library", "unknown"


def texts_by_domain(data: Sequence[str], text_field: str) -> Iterator[tuple[str, str]]:
    """(domain, text) of every document of some files and folders.

    Raises:
        ValueError: as `find_files`.
    """
    for file in find_files(data)[0]:
        for item in read_file(file, text_field=text_field):
            if isinstance(item, Document):
                said = item.record.get("domain")
                yield (said if isinstance(said, str) else domain_of(file)), item.text


def validation_domains(corpus: PreparedCorpus) -> np.ndarray:
    """The domain of every validation document, in their order; `UNKNOWN` for what its sources no longer hold.

    A prepared corpus stores no domains, so its sources are read again and matched by their texts.
    """
    config, offsets = corpus.manifest.config, corpus.valid.document_offsets.tolist()
    if not config.data:
        return np.full(len(offsets) - 1, STANDARD_LIBRARY)
    known: dict[bytes, str] = {}
    for source in config.data:
        try:
            for domain, text in texts_by_domain((source,), config.text_field):
                known.setdefault(hashlib.sha256(text.encode()).digest(), domain)
        except (ValueError, OSError) as error:
            print(f"domain {UNKNOWN!r} for its documents: {error}", flush=True)
    return np.array(
        [
            known.get(hashlib.sha256(document_bytes(corpus, start, stop)).digest(), UNKNOWN)
            for start, stop in itertools.pairwise(offsets)
        ]
    )


def document_bytes(corpus: PreparedCorpus, start: int, stop: int) -> bytes:
    """UTF-8 bytes of the validation document between two of its offsets."""
    return corpus.tokenizer.decode_bytes(np.asarray(corpus.valid.tokens[start + 1 : stop], dtype=np.int64))

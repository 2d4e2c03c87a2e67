"""From text to packed tokens, once: documents, tokenizer, train and valid streams, cached under a folder named by what
went in."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corpus.documents import Documents, load_documents
from corpus.packing import PackedTokens, pack
from corpus.readers import Skipped
from corpus.tokenizer import Tokenizer
from foundation.files import atomic_folder

DEFAULT_VOCAB_SIZE = 4096
# Part of the cache key: raise it when the same input would give other tokens or another manifest.
PIPELINE_VERSION = 2
BATCH_CHARACTERS = 1 << 22


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    data: tuple[str, ...] = ()
    """Files and folders of .txt, .md, .jsonl, .jsonl.gz, .jsonl.zst, .parquet; none: the Python standard library."""
    text_field: str = "text"
    """Key or column that holds the text in .jsonl and .parquet."""
    vocab_size: int | None = None
    """Size of the vocabulary to learn; 4096 unless told. Not together with tokenizer_file."""
    tokenizer_file: str | None = None
    """A SentencePiece model to use instead of learning one."""
    valid_share: float = 0.1
    """Expected share of the documents held out for validation."""
    shard_tokens: int = 1 << 26
    """Tokens per shard file."""

    def __post_init__(self) -> None:
        if self.vocab_size is not None and self.tokenizer_file is not None:
            raise ValueError(
                f"vocab_size={self.vocab_size} and tokenizer_file={self.tokenizer_file} exclude each other: the file"
                " has its own size"
            )


@dataclass(frozen=True, kw_only=True)
class SplitCounts:
    documents: int
    bytes: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class CorpusManifest:
    """What was prepared. Hashes are SHA-256: of the documents (in any order, under any name), of the tokenizer's pieces
    and scores, of its file."""

    config: CorpusConfig
    content_hash: str
    tokenizer_hash: str
    tokenizer_file_hash: str
    vocab_size: int
    train: SplitCounts
    valid: SplitCounts
    duplicates_removed: int
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True, kw_only=True)
class PreparedCorpus:
    folder: Path
    tokenizer: Tokenizer
    train: PackedTokens
    valid: PackedTokens
    manifest: CorpusManifest

    def valid_text(self) -> bytes:
        """UTF-8 bytes of all validation documents, `valid.n_bytes` of them: what bits per byte are counted over."""
        return self.tokenizer.decode_bytes(self.valid.window(0, len(self.valid)))


def prepare(config: CorpusConfig, root: str | Path) -> PreparedCorpus:
    """Read the documents; open the prepared corpus for exactly these under `root`, or make it.

    The documents are read and hashed, and the cached files verified, each time, so a stale or damaged cache is never
    used. Raises ValueError for unusable input (see `load_documents`, `Tokenizer.train`) and for a damaged cache.
    """
    tokenizer = None if config.tokenizer_file is None else Tokenizer.load(config.tokenizer_file)
    documents = load_documents(config.data, text_field=config.text_field, valid_share=config.valid_share)
    folder = Path(root) / _cache_key(config, documents, tokenizer)
    if not folder.exists():
        try:
            with atomic_folder(folder) as temporary:
                _write(temporary, config, documents, tokenizer)
        except OSError:
            # Another process may have finished the same corpus in the meantime.
            if not folder.exists():
                raise
    prepared = open_prepared(folder)
    if prepared.manifest.content_hash != documents.content_hash:
        raise ValueError(
            f"{folder}: the manifest speaks of other documents; delete the folder and prepare the corpus again"
        )
    prepared.train.verify()
    prepared.valid.verify()
    return prepared


def open_prepared(folder: str | Path) -> PreparedCorpus:
    """Open what `prepare` left in `folder`, without looking at the sources again. ValueError if it is not complete."""
    folder = Path(folder)
    path = folder / "manifest.json"
    try:
        manifest = _manifest_from_json(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no readable corpus manifest here ({error})") from error
    model = folder / "tokenizer.model"
    if not model.is_file() or _file_hash(model) != manifest.tokenizer_file_hash:
        raise ValueError(
            f"{model}: missing, or not the tokenizer of the manifest; delete {folder} and prepare the corpus again"
        )
    tokenizer = Tokenizer.load(model)
    train, valid = PackedTokens(folder / "train"), PackedTokens(folder / "valid")
    for packed, counts in ((train, manifest.train), (valid, manifest.valid)):
        if _counts(packed) != counts:
            raise ValueError(
                f"{packed.folder}: not the counts of the manifest; delete {folder} and prepare the corpus again"
            )
    return PreparedCorpus(folder=folder, tokenizer=tokenizer, train=train, valid=valid, manifest=manifest)


def _cache_key(config: CorpusConfig, documents: Documents, tokenizer: Tokenizer | None) -> str:
    """Everything the prepared folder is a function of, what was skipped included: the manifest lists it."""
    inputs = {
        "version": PIPELINE_VERSION,
        "config": dataclasses.asdict(config),
        "content": documents.content_hash,
        "duplicates_removed": documents.duplicates_removed,
        "skipped": [dataclasses.asdict(item) for item in documents.skipped],
        "tokenizer": None if tokenizer is None else tokenizer.hash(),
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def _write(folder: Path, config: CorpusConfig, documents: Documents, tokenizer: Tokenizer | None) -> None:
    if tokenizer is None:
        tokenizer = Tokenizer.train(
            documents.train, DEFAULT_VOCAB_SIZE if config.vocab_size is None else config.vocab_size
        )
    tokenizer.save(folder / "tokenizer.model")
    counts: dict[str, SplitCounts] = {}
    for split, texts in (("train", documents.train), ("valid", documents.valid)):
        packed = pack(
            folder / split,
            _encode(texts, tokenizer),
            vocab_size=tokenizer.vocab_size,
            boundary_id=tokenizer.boundary_id,
            shard_tokens=config.shard_tokens,
        )
        counts[split] = _counts(packed)
    manifest = CorpusManifest(
        config=config,
        content_hash=documents.content_hash,
        tokenizer_hash=tokenizer.hash(),
        tokenizer_file_hash=_file_hash(folder / "tokenizer.model"),
        vocab_size=tokenizer.vocab_size,
        train=counts["train"],
        valid=counts["valid"],
        duplicates_removed=documents.duplicates_removed,
        skipped=documents.skipped,
    )
    (folder / "manifest.json").write_text(json.dumps(dataclasses.asdict(manifest), indent=1))


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _counts(packed: PackedTokens) -> SplitCounts:
    return SplitCounts(documents=packed.n_documents, bytes=packed.n_bytes, tokens=len(packed))


def _encode(texts: Sequence[str], tokenizer: Tokenizer) -> Iterator[tuple[list[int], int]]:
    """(ids, UTF-8 bytes) per document, encoded in bounded batches, each document proven to come back byte for byte."""
    start = 0
    while start < len(texts):
        stop, characters = start, 0
        while stop < len(texts) and characters < BATCH_CHARACTERS:
            characters += len(texts[stop])
            stop += 1
        for text, ids in zip(texts[start:stop], tokenizer.encode_batch(texts[start:stop])):
            data = text.encode()
            if tokenizer.decode_bytes(ids) != data:
                raise ValueError(f"the tokenizer does not give back the document that begins {text[:60]!r}")
            yield ids, len(data)
        start = stop


def _manifest_from_json(record: dict[str, Any]) -> CorpusManifest:
    config = record["config"] | {"data": tuple(record["config"]["data"])}
    return CorpusManifest(
        **record
        | {
            "config": CorpusConfig(**config),
            "train": SplitCounts(**record["train"]),
            "valid": SplitCounts(**record["valid"]),
            "skipped": tuple(Skipped(**item) for item in record["skipped"]),
        }
    )

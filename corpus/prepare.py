"""From text to packed tokens, once: documents, tokenizer, train and valid streams, cached under a folder named by what
went in."""

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from corpus.byte_level_tokenizer import ByteLevelTokenizer
from corpus.documents import Documents, HoldOut, SkippedKind, load_documents
from corpus.mixed_tokens import MixedTokens
from corpus.packing import INDEX, PackedTokens, pack
from corpus.readers import Skipped
from corpus.tokenizer import Tokenizer
from foundation.files import atomic_folder, check_seal, seal, sha256_file
from foundation.serialize import load_json, save_json
from foundation.source import code_of

DEFAULT_VOCAB_SIZE = 4096
MANIFEST = "manifest.json"
# Beside the validation tokens: the domain of every document. Of the training documents, which may be many: the names of
# the domains, and of every document a number among them.
DOMAINS = "valid/domains.json"
TRAIN_DOMAINS, TRAIN_DOMAIN_NUMBERS = "train/domains.json", "train/domains.bin"
BATCH_CHARACTERS = 1 << 22

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """What to read and how.

    Attributes:
        data: Files and folders of .txt, .md, .jsonl, .ndjson, .json (each also as .gz and .zst) and .parquet; none: the
            Python standard library. A .txt or .md of more than 100,000 characters is cut into documents at blank
            lines.
        text_field: Key or column that holds the text; meta.text for one inside of another.
        vocab_size: Size of the vocabulary to learn; 4096 unless told. Not together with tokenizer_file.
        tokenizer_file: A SentencePiece model to use instead of learning one.
        valid_documents: Documents held out for validation, half of all at most.
        valid_characters: Of each of them, the stretch that is used; 0 for all of it.
        valid_share: Expected share of the documents to hold out instead, all of each.
        shard_tokens: Tokens per shard file.

    Raises:
        ValueError: for both a vocabulary to learn and a finished tokenizer, or what can't be held out.
    """

    data: tuple[str, ...] = ()
    text_field: str = "text"
    vocab_size: int | None = None
    tokenizer_file: str | None = None
    valid_documents: int = HoldOut.documents
    valid_characters: int = HoldOut.characters
    valid_share: float | None = None
    shard_tokens: int = 1 << 26

    def __post_init__(self) -> None:
        self.hold_out()
        if self.vocab_size is not None and self.tokenizer_file is not None:
            raise ValueError(
                f"vocab_size={self.vocab_size} and tokenizer_file={self.tokenizer_file} exclude each other: the file"
                " has its own size"
            )

    def hold_out(self) -> HoldOut:
        """What becomes the validation text."""
        return HoldOut(documents=self.valid_documents, characters=self.valid_characters, share=self.valid_share)


@dataclass(frozen=True, kw_only=True)
class SplitCounts:
    """Of one split; bytes are UTF-8 bytes of the text."""

    documents: int
    bytes: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class CorpusManifest:
    """What was prepared.

    Attributes:
        content_hash: SHA-256 of the documents, in any order and under any name.
        tokenizer_hash: SHA-256 of the tokenizer's pieces and scores.
        tokenizer_file_hash: SHA-256 of its file.
        skipped: what could not be used, with its place: the first thousand of it.
        skipped_kinds: how often each reason.
    """

    config: CorpusConfig
    content_hash: str
    tokenizer_hash: str
    tokenizer_file_hash: str
    vocab_size: int
    train: SplitCounts
    valid: SplitCounts
    duplicates_removed: int
    skipped: tuple[Skipped, ...]
    skipped_kinds: tuple[SkippedKind, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PreparedCorpus:
    """A tokenizer and the packed tokens of both splits, opened for reading."""

    folder: Path
    tokenizer: Tokenizer
    train: PackedTokens | MixedTokens
    valid: PackedTokens
    manifest: CorpusManifest

    def valid_text(self, most_tokens: int | None = None) -> bytes:
        """UTF-8 bytes of all validation documents, `valid.n_bytes` of them: what bits per byte are counted over.

        Args:
            most_tokens: of a larger text its first documents alone, as many tokens; they are in the order of hashes.
        """
        length = len(self.valid) if most_tokens is None else min(most_tokens, len(self.valid))
        return self.tokenizer.decode_bytes(self.valid.window(0, length))

    def valid_domains(self) -> tuple[str, ...]:
        """The domain of every validation document: what its record says, or the name of its file."""
        return tuple(json.loads((self.folder / DOMAINS).read_text(encoding="utf-8")))

    def domain_tokens(self) -> dict[str, int]:
        """How many training tokens each domain has, by name."""
        names, number_D = self._train_domains()
        tokens = np.bincount(number_D, weights=np.diff(self.train.document_offsets), minlength=len(names))
        return dict(zip(names, map(int, tokens)))

    def mixed(self, shares: Mapping[str, float], length: int) -> "PreparedCorpus":
        """The corpus with a mixture of its training text in place of the text itself.

        Args:
            shares: of every domain of `domain_tokens`, summing to one.
            length: tokens of the mixture.
        """
        assert isinstance(self.train, PackedTokens), "a mixture is made of what was prepared"
        names, number_D = self._train_domains()
        assert list(shares) == names
        mixture = MixedTokens(self.train, number_D, shares, length=length, n_bytes_V=self.tokenizer.n_bytes_V)
        return dataclasses.replace(self, train=mixture)

    def _train_domains(self) -> tuple[list[str], np.ndarray]:
        names = json.loads((self.folder / TRAIN_DOMAINS).read_text(encoding="utf-8"))
        return names, np.fromfile(self.folder / TRAIN_DOMAIN_NUMBERS, dtype="<i4")


def prepare(config: CorpusConfig, root: str | Path, tokenizer: Tokenizer | None = None) -> PreparedCorpus:
    """Reads the documents; opens the prepared corpus for exactly these under `root`, or makes it.

    The documents are read and hashed, and the cached files verified, each time, so a stale or damaged cache is never
    used: it is named in a warning and made again. Each phase is printed before it begins: it may take minutes.

    Args:
        tokenizer: a trained model's own, of either kind; by default the one that the configuration names or learns.

    Raises:
        ValueError: for unusable input (see `load_documents`, `Tokenizer.train`).
    """
    if tokenizer is None and config.tokenizer_file is not None:
        tokenizer = Tokenizer.load(config.tokenizer_file)
    _say(f"reading {', '.join(config.data) or 'the Python standard library'}, without duplicates")
    Path(root).mkdir(parents=True, exist_ok=True)
    documents = load_documents(config.data, text_field=config.text_field, hold_out=config.hold_out(), folder=Path(root))
    for kind in documents.skipped_kinds:
        _say(f"skipped {kind.line()}")
    folder = Path(root) / _cache_key(config, documents, tokenizer)
    if folder.exists():
        try:
            return _opened_and_verified(folder, documents)
        except ValueError as error:
            log.warning("prepared corpus refused and made again: %s", error)
            shutil.rmtree(folder, ignore_errors=True)
    try:
        with atomic_folder(folder) as temporary:
            _write(temporary, config, documents, tokenizer)
    except OSError:
        # Another process may have finished the same corpus in the meantime.
        if not folder.exists():
            raise
    return _opened_and_verified(folder, documents)


def _opened_and_verified(folder: Path, documents: Documents) -> PreparedCorpus:
    _say(f"checking the prepared text in {folder}")
    prepared = open_prepared(folder)
    if prepared.manifest.content_hash != documents.content_hash:
        raise ValueError(f"{folder}: the manifest speaks of other documents")
    prepared.train.verify()
    prepared.valid.verify()
    return prepared


def open_prepared(folder: str | Path) -> PreparedCorpus:
    """Opens what `prepare` left in `folder`, without looking at the sources again.

    Raises:
        ValueError: naming the file that is missing or does not fit the others.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    try:
        manifest = load_json(CorpusManifest, path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no readable corpus manifest here ({error})") from error
    check_seal(folder)
    model = _tokenizer_file(folder)
    if not model.is_file() or sha256_file(model) != manifest.tokenizer_file_hash:
        raise ValueError(f"{model}: missing, or not the tokenizer of the manifest; prepare the corpus again")
    byte_level = model.name == ByteLevelTokenizer.file_name
    tokenizer = ByteLevelTokenizer.load(model, manifest.vocab_size) if byte_level else Tokenizer.load(model)
    if tokenizer.hash() != manifest.tokenizer_hash:
        raise ValueError(f"{path}: tokenizer_hash is not that of {model.name}; prepare the corpus again")
    train, valid = PackedTokens(folder / "train"), PackedTokens(folder / "valid")
    for packed, counts in ((train, manifest.train), (valid, manifest.valid)):
        if _counts(packed) != counts:
            raise ValueError(f"{packed.folder}: not the counts of the manifest; prepare the corpus again")
    return PreparedCorpus(folder=folder, tokenizer=tokenizer, train=train, valid=valid, manifest=manifest)


def _tokenizer_file(folder: Path) -> Path:
    """The tokenizer of a prepared folder, by the kind that lies there."""
    published = folder / ByteLevelTokenizer.file_name
    return published if published.is_file() else folder / Tokenizer.file_name


def _cache_key(config: CorpusConfig, documents: Documents, tokenizer: Tokenizer | None) -> str:
    """Everything the prepared folder is a function of, the code of this package and what was skipped included: the
    manifest lists it."""
    inputs = {
        "code": {name: code for name, code in code_of((__name__,)).items() if name.startswith("corpus/")},
        "config": dataclasses.asdict(config),
        "content": documents.content_hash,
        "duplicates_removed": documents.duplicates_removed,
        "skipped": [dataclasses.asdict(item) for item in (*documents.skipped, *documents.skipped_kinds)],
        "tokenizer": None if tokenizer is None else tokenizer.hash(),
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def _write(folder: Path, config: CorpusConfig, documents: Documents, tokenizer: Tokenizer | None) -> None:
    if tokenizer is None:
        vocab_size = DEFAULT_VOCAB_SIZE if config.vocab_size is None else config.vocab_size
        _say(f"learning a tokenizer of {vocab_size} tokens")
        tokenizer = Tokenizer.train(documents.train, vocab_size)
    tokenizer.save(folder / tokenizer.file_name)
    counts: dict[str, SplitCounts] = {}
    for split, texts in (("train", documents.train), ("valid", documents.valid)):
        _say(f"packing {split}: {len(texts):,} documents, {texts.n_bytes:,} bytes")
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
        tokenizer_file_hash=sha256_file(folder / tokenizer.file_name),
        vocab_size=tokenizer.vocab_size,
        train=counts["train"],
        valid=counts["valid"],
        duplicates_removed=documents.duplicates_removed,
        skipped=documents.skipped,
        skipped_kinds=documents.skipped_kinds,
    )
    save_json(folder / MANIFEST, manifest)
    (folder / DOMAINS).write_text(json.dumps(documents.valid.domains, ensure_ascii=False), encoding="utf-8")
    names, numbers = documents.train.numbered_domains()
    (folder / TRAIN_DOMAINS).write_text(json.dumps(names, ensure_ascii=False), encoding="utf-8")
    numbers.tofile(folder / TRAIN_DOMAIN_NUMBERS)
    # The indices hold the checksums of the tokens.
    tokenizers = sorted(path.name for path in folder.glob("tokenizer*"))
    seal(
        folder,
        (MANIFEST, *tokenizers, f"train/{INDEX}", f"valid/{INDEX}", DOMAINS, TRAIN_DOMAINS, TRAIN_DOMAIN_NUMBERS),
    )


def _say(phase: str) -> None:
    print(f"corpus: {phase}", flush=True)


def _counts(packed: PackedTokens) -> SplitCounts:
    return SplitCounts(documents=packed.n_documents, bytes=packed.n_bytes, tokens=len(packed))


def _encode(texts: Sequence[str], tokenizer: Tokenizer) -> Iterator[tuple[list[int], int]]:
    """(ids, UTF-8 bytes) per document, encoded in bounded batches, each document proven to come back byte for byte."""
    waiting: list[str] = []
    characters = 0
    for number, text in enumerate(texts, start=1):
        waiting.append(text)
        characters += len(text)
        if characters < BATCH_CHARACTERS and number < len(texts):
            continue
        batch, waiting, characters = waiting, [], 0
        for text, ids in zip(batch, tokenizer.encode_batch(batch)):
            data = text.encode()
            if tokenizer.decode_bytes(ids) != data:
                raise ValueError(f"the tokenizer does not give back the document that begins {text[:60]!r}")
            yield ids, len(data)

"""`python -m corpus tokenizers`: how tokenizers compare on held-out text, by domain and language.

Ours at several sizes, learnt from nine tenths of the documents, beside files of others: SentencePiece models, and
`tokenizer.json` of the tokenizers library. Bytes per token say how long sequences become, no more: a choice between
sizes is one by bits per byte of models trained at equal compute.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from corpus.readers import Document, read_file
from corpus.refine.kinds import HAN, LETTER
from corpus.refine.page import CHINESE, Page
from corpus.refine.shards import domain_of
from corpus.sources import find_files
from corpus.tokenizer import Tokenizer
from foundation.command import refuse_unwritable
from foundation.numbers import check_numbers
from foundation.tables import write_rows

HELD_OUT = 10
# Of the digits test: a number whose every digit must be a token, as baichuan and Yi have it (arXiv 2403.04652).
NUMBER = "2026"
RARE = "\U00020bb7\U0001f9ff\u0f3a"


@dataclass(frozen=True, kw_only=True)
class TokenizersConfig:
    """Compare tokenizers on text.

    Attributes:
        data: Files and folders of text; a document's domain is its field `domain`, or the name of its file. Every tenth
            document, by its hash, is held out and measured on.
        vocab_sizes: Sizes of ours to learn.
        files: Tokenizers of others: SentencePiece .model, or tokenizer.json.
        text_field: Key or column that holds the text.
        csv: File for the table.
    """

    data: tuple[str, ...]
    vocab_sizes: tuple[int, ...] = (1024, 4096)
    files: tuple[Path, ...] = ()
    text_field: str = "text"
    csv: Path | None = None

    def __post_init__(self) -> None:
        check_numbers(self, vocab_sizes=261)


@dataclass(frozen=True, kw_only=True)
class TokenizerRow:
    """One tokenizer on one domain and language.

    Attributes:
        fertility: tokens per word; in Chinese per character.
        round_trip: share of the documents that come back byte for byte.
        digits_split: every digit is a token of its own.
        bytes_fall_back: characters outside of the vocabulary come back.
    """

    tokenizer: str
    vocab_size: int
    domain: str
    language: str
    documents: int
    bytes: int
    tokens: int
    bytes_per_token: float
    fertility: float
    round_trip: float
    digits_split: bool
    bytes_fall_back: bool


class Encodes(Protocol):
    """What is asked of a tokenizer."""

    vocab_size: int

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...


class JsonTokenizer:
    """A `tokenizer.json`, without its special tokens.

    Raises:
        ImportError: where the library is not installed.
        ValueError: for a file that is none.
    """

    def __init__(self, path: Path):
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError(f'{path}: reading tokenizer.json needs tokenizers: pip install -e ".[hub]"') from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            raise ValueError(f"{path}: not a tokenizer.json ({error})") from error
        self.vocab_size: int = self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


class SentencePieceFile:
    """Any SentencePiece model, those included that do not give every text back.

    Raises:
        ValueError: for a file that is none.
    """

    def __init__(self, path: Path):
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path}: not a SentencePiece model ({error})") from error
        self.vocab_size: int = self._processor.vocab_size()

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)


def compare_tokenizers(config: TokenizersConfig) -> list[TokenizerRow]:
    """Learns, measures, and returns the rows.

    Raises:
        ValueError: for data or tokenizers that cannot be used.
    """
    refuse_unwritable("--csv", config.csv)
    others = {str(path): _open(path) for path in config.files}
    learnt_from, held_out = _documents(config)
    found: dict[str, Encodes] = {}
    for size in config.vocab_sizes:
        print(f"corpus: learning a tokenizer of {size} tokens", flush=True)
        found[f"ours {size}"] = Tokenizer.train(learnt_from, size)
    rows = [
        _measure(name, tokenizer, place, texts)
        for name, tokenizer in {**found, **others}.items()
        for place, texts in sorted(held_out.items())
    ]
    if config.csv is not None:
        write_rows(config.csv, TokenizerRow, rows)
    return rows


def _open(path: Path) -> Encodes:
    readers: dict[str, Callable[[Path], Encodes]] = {".json": JsonTokenizer, ".model": SentencePieceFile}
    if path.suffix not in readers:
        raise ValueError(f"--files {path}: legal are tokenizer.json and SentencePiece .model files")
    return readers[path.suffix](path)


def _documents(config: TokenizersConfig) -> tuple[list[str], dict[tuple[str, str], list[str]]]:
    """Texts to learn from, in the order of their hashes, and held-out ones by domain and language."""
    files, _ = find_files(config.data)
    learnt_from: list[tuple[bytes, str]] = []
    held_out: dict[tuple[str, str], list[str]] = defaultdict(list)
    for file in files:
        for item in read_file(file, text_field=config.text_field):
            if not isinstance(item, Document):
                continue
            digest = hashlib.sha256(item.text.encode()).digest()
            if int.from_bytes(digest[:8], "big") % HELD_OUT:
                learnt_from.append((digest, item.text))
                continue
            domain = item.record.get("domain")
            held_out[domain if isinstance(domain, str) else domain_of(file), _language(item.text)].append(item.text)
    if not held_out or not learnt_from:
        raise ValueError(f"--data: {len(learnt_from)} documents to learn from, none held out; give more of them")
    return [text for _, text in sorted(learnt_from)], held_out


def _language(text: str) -> str:
    """By the script: of Chinese one letter in five is a Han character at least."""
    counts = Page(text).counts
    return CHINESE if counts[HAN] > 0.2 * (counts[HAN] + counts[LETTER]) else "other"


def _measure(name: str, tokenizer: Encodes, place: tuple[str, str], texts: Sequence[str]) -> TokenizerRow:
    domain, language = place
    batch = [tokenizer.encode(text) for text in texts]
    n_bytes, n_tokens = sum(len(text.encode()) for text in texts), sum(map(len, batch))
    n_words = sum(len(Page(text, language=language).words.starts) for text in texts)
    return TokenizerRow(
        tokenizer=name,
        vocab_size=tokenizer.vocab_size,
        domain=domain,
        language=language,
        documents=len(texts),
        bytes=n_bytes,
        tokens=n_tokens,
        bytes_per_token=round(n_bytes / n_tokens, 4),
        fertility=round(n_tokens / max(n_words, 1), 4),
        round_trip=sum(tokenizer.decode(ids) == text for ids, text in zip(batch, texts)) / len(texts),
        digits_split=[tokenizer.decode([id]).strip() for id in tokenizer.encode(NUMBER)][-4:] == list(NUMBER),
        bytes_fall_back=tokenizer.decode(tokenizer.encode(RARE)).strip() == RARE,
    )


def table(rows: Sequence[TokenizerRow]) -> str:
    """One line per tokenizer, domain and language."""
    lines = [
        f"{'tokenizer':<24} {'size':>7} {'domain':<14} {'language':<8} {'bytes/token':>11} {'fertility':>9}"
        f" {'round trip':>10}  digits bytes"
    ]
    for row in rows:
        kept = " ".join("yes   " if value else "no    " for value in (row.digits_split, row.bytes_fall_back))
        lines.append(
            f"{row.tokenizer[-24:]:<24} {row.vocab_size:>7,} {row.domain[:14]:<14} {row.language:<8}"
            f" {row.bytes_per_token:>11.3f} {row.fertility:>9.3f} {row.round_trip:>10.1%}  {kept}"
        )
    return "\n".join(lines)

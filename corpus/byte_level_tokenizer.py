"""A tokenizer.json as most published models have it, byte-level BPE, behind the same face as `corpus.tokenizer`.

Byte-level BPE (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners") writes every byte as a
character of its own, so ids stand for fixed bytes here too. What such a file may do before it cuts a text, Unicode's
normal form C in Qwen's, is part of the published model: a text that is not in it comes back normalised.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from corpus.tokenizer import PROBES, Tokenizer, refuse_surrogates

# Where a published model says which tokens begin and end a text.
COMPANION = "tokenizer_config.json"


class ByteLevelTokenizer(Tokenizer):
    """A byte-level tokenizer.json.

    Args:
        text: its content.
        settings: the content of the tokenizer_config.json beside it, which says what bounds a text: the token that
            begins one, or, where there is none, the token that ends one.
        name: what errors call it.
        vocab_size: of the model, which may have more rows than the tokenizer has tokens; those stand for nothing.

    Attributes:
        boundary_id, n_bytes_V: as in `Tokenizer`.

    Raises:
        ValueError: for a file that is no byte-level tokenizer, or one that nothing says the boundary of.
        ImportError: where the package tokenizers is not installed.
    """

    file_name = "tokenizer.json"

    def __init__(self, text: str, settings: str, *, name: str = "tokenizer", vocab_size: int | None = None):
        self._text, self._settings = text, settings
        self._tokenizer = _parsed(text, name)
        # No text may spell what bounds it.
        self._tokenizer.encode_special_tokens = True
        pieces = self._tokenizer.get_vocab(with_added_tokens=True)
        n_tokens = max(pieces.values()) + 1
        if vocab_size is not None and n_tokens > vocab_size:
            raise ValueError(
                f"{name}: {n_tokens} tokens, the model's vocabulary has {vocab_size}: it belongs to another model"
            )
        self.vocab_size = n_tokens if vocab_size is None else vocab_size
        self._bytes_of_id = [b""] * self.vocab_size
        added = self._tokenizer.get_added_tokens_decoder()
        byte_of = _byte_of_character()
        for piece, id in pieces.items():
            if id in added:
                self._bytes_of_id[id] = b"" if added[id].special else piece.encode()
            elif unknown := [character for character in piece if character not in byte_of]:
                raise ValueError(f"{name}: token {piece!r} has {unknown[0]!r}, which stands for no byte")
            else:
                self._bytes_of_id[id] = bytes(byte_of[character] for character in piece)
        self.n_bytes_V = np.array([len(piece) for piece in self._bytes_of_id], dtype=np.int64)
        self.boundary_id = self._boundary(settings, name)
        for probe in PROBES:
            expected = probe if self._tokenizer.normalizer is None else self._tokenizer.normalizer.normalize_str(probe)
            if (got := self.decode(self.encode(probe))) != expected:
                raise ValueError(f"{name}: {probe!r} comes back as {got!r}")

    @classmethod
    def load(cls, path: str | Path, vocab_size: int | None = None) -> "ByteLevelTokenizer":
        """Reads a tokenizer.json and the tokenizer_config.json beside it.

        Raises:
            ValueError: for files that are missing or cannot be used.
        """
        path = Path(path)
        texts = []
        for file in (path, path.with_name(COMPANION)):
            try:
                texts.append(file.read_text(encoding="utf-8"))
            except OSError as error:
                raise ValueError(f"tokenizer file {file}: {error.strerror}") from error
        return cls(*texts, name=str(path), vocab_size=vocab_size)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self._text, encoding="utf-8")
        Path(path).with_name(COMPANION).write_text(self._settings, encoding="utf-8")

    def hash(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self._text.encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        for text in texts:
            refuse_surrogates(text)
        return [found.ids for found in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def _boundary(self, settings: str, name: str) -> int:
        values = json.loads(settings)
        for key in ("bos_token", "eos_token"):
            token = values.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None and (id := self._tokenizer.token_to_id(token)) is not None:
                return id
        raise ValueError(f"{name}: {COMPANION} names no bos_token and no eos_token to mark document boundaries with")


def _parsed(text: str, name: str) -> Any:
    """The library's tokenizer.

    Raises:
        ValueError: for another decoder than a byte-level one.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(f"{name}: reading it needs the package tokenizers (the extra `hub`)") from error
    try:
        decoder = json.loads(text)["decoder"] or {}
        parsed = tokenizers.Tokenizer.from_str(text)
    except Exception as error:
        # The library raises bare Exceptions.
        raise ValueError(f"{name}: no tokenizer.json ({error})") from error
    parts = [decoder, *decoder.get("decoders", [])]
    if not any(part.get("type") == "ByteLevel" for part in parts):
        raise ValueError(f"{name}: its decoder is {decoder.get('type')!r}; legal: 'ByteLevel'")
    return parsed


def _byte_of_character() -> dict[str, int]:
    """The bytes that characters stand for: printable ones of Latin-1 for themselves, then the others, in order, from
    U+0100 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + at): byte for at, byte in enumerate(others)}

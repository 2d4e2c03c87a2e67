"""A range coder, and text through it under a language model: the proof that bits per byte are bits.

A token costs -log2 p bits, p rounded to multiples of 2^-32 with at least one for every token, so that all can be coded.
The range keeps 64 bits and leaves byte by byte; carries go into the bytes that have left (Martin 1979, as in LZMA).
Coding and decoding run the model the same way, a token at a time with its cache, so that both see the same bits of
every probability; on another machine or number of threads a file may not decode, and says so by its checksum.

Legend: V vocabulary.
"""

import hashlib
import math
import struct
from collections.abc import Iterator

import numpy as np
import torch

from corpus.tokenizer import Tokenizer
from lm.evaluate import evaluating
from lm.model import LanguageModel

PRECISION = 32
MAGIC = b"LMAC"
_HEADER = struct.Struct("<4sIQ16s")
HEADER_BYTES = _HEADER.size


class RangeEncoder:
    """Codes symbols by (start, size) of their interval among 2^PRECISION."""

    def __init__(self) -> None:
        self._low, self._range = 0, (1 << 64) - 1
        self._bytes = bytearray()

    def encode(self, start: int, size: int) -> None:
        step = self._range >> PRECISION
        self._low += step * start
        self._range = step * size
        if self._low >= 1 << 64:
            self._low -= 1 << 64
            self._carry()
        # A range of 48 bits at least leaves 16 bits to tell apart what 32-bit sizes differ by.
        while self._range < 1 << 48:
            self._bytes.append(self._low >> 56)
            self._low = (self._low << 8) & ((1 << 64) - 1)
            self._range <<= 8

    def _carry(self) -> None:
        place = len(self._bytes) - 1
        while self._bytes[place] == 0xFF:
            self._bytes[place] = 0
            place -= 1
        self._bytes[place] += 1

    def finish(self) -> bytes:
        """The code: as many bytes of a number inside of the last range as tell it apart."""
        for n_bytes in range(1, 9):
            unit = 1 << (64 - 8 * n_bytes)
            value = -(-self._low // unit) * unit
            if value + unit - 1 <= self._low + self._range - 1:
                break
        if value >= 1 << 64:
            value -= 1 << 64
            self._carry()
        return bytes(self._bytes) + value.to_bytes(8, "big")[:n_bytes]


class RangeDecoder:
    """The inverse of `RangeEncoder`. Behind the end of the code come zeros."""

    def __init__(self, code: bytes):
        self._code, self._place = code, 8
        self._value, self._range = int.from_bytes(code[:8].ljust(8, b"\0"), "big"), (1 << 64) - 1

    def target(self) -> int:
        """A number inside of the next symbol's interval."""
        return min(self._value // (self._range >> PRECISION), (1 << PRECISION) - 1)

    def decode(self, start: int, size: int) -> None:
        """Takes the symbol with this interval off the code."""
        step = self._range >> PRECISION
        self._value -= step * start
        self._range = step * size
        while self._range < 1 << 48:
            following = self._code[self._place] if self._place < len(self._code) else 0
            self._value = ((self._value << 8) | following) & ((1 << 64) - 1)
            self._place += 1
            self._range <<= 8


def intervals(logits_V: torch.Tensor) -> np.ndarray:
    """Starts of the intervals of all tokens, and 2^PRECISION behind them: int64 [V + 1], strictly ascending."""
    p_V = torch.softmax(logits_V.double(), dim=-1).cpu().numpy()
    sizes_V = np.floor(p_V * ((1 << PRECISION) - len(p_V))).astype(np.int64) + 1
    # What rounding down has left goes to the likeliest token.
    sizes_V[int(p_V.argmax())] += (1 << PRECISION) - int(sizes_V.sum())
    return np.concatenate(([0], np.cumsum(sizes_V)))


class Predictions:
    """A model's logits for one token after another; every `window` tokens it begins again behind a boundary."""

    def __init__(self, model: LanguageModel, boundary_id: int, window: int):
        self._model, self._boundary_id, self._window = model, boundary_id, window
        self._left, self._cache, self._last = 0, None, boundary_id

    @torch.no_grad()
    def next(self) -> torch.Tensor:
        if self._left == 0:
            self._cache, self._left, self._last = (
                self._model.new_cache(1, self._window),
                self._window,
                self._boundary_id,
            )
        self._left -= 1
        tokens_BT = torch.tensor([[self._last]], device=self._model.embedding_VD.device)
        return self._model(tokens_BT, self._cache, last_only=True).logits_BTV[0, -1]

    def saw(self, token: int) -> None:
        self._last = token


def encode_text(model: LanguageModel, tokenizer: Tokenizer, text: str, *, window: int) -> tuple[bytes, float]:
    """Codes a text.

    Returns:
        the code, header included, and the sum of -log2 p over its tokens, of the probabilities before rounding.
    """
    tokens, coder, bits = tokenizer.encode(text), RangeEncoder(), 0.0
    predictions = Predictions(model, tokenizer.boundary_id, window)
    with evaluating(model):
        for token in tokens:
            logits_V = predictions.next()
            bits -= float(torch.log_softmax(logits_V.double(), dim=-1)[token]) / math.log(2)
            starts = intervals(logits_V)
            coder.encode(int(starts[token]), int(starts[token + 1] - starts[token]))
            predictions.saw(token)
    digest = hashlib.sha256(text.encode()).digest()[:16]
    return _HEADER.pack(MAGIC, window, len(tokens), digest) + coder.finish(), bits


def decode_text(model: LanguageModel, tokenizer: Tokenizer, code: bytes) -> str:
    """The text of a code.

    Raises:
        ValueError: where it is no such code, or does not give the text that was coded: made by another model, or on
            a machine that rounds otherwise.
    """
    if len(code) < _HEADER.size or code[:4] != MAGIC:
        raise ValueError("not a text coded by a language model")
    _, window, n_tokens, digest = _HEADER.unpack(code[: _HEADER.size])
    tokens = list(_decoded(model, tokenizer, code[_HEADER.size :], window, n_tokens))
    data = tokenizer.decode_bytes(tokens)
    if hashlib.sha256(data).digest()[:16] != digest:
        raise ValueError(
            "the code does not give the text back: another model coded it, or a machine that rounds otherwise"
        )
    return data.decode()


def _decoded(model: LanguageModel, tokenizer: Tokenizer, code: bytes, window: int, n_tokens: int) -> Iterator[int]:
    decoder, predictions = RangeDecoder(code), Predictions(model, tokenizer.boundary_id, window)
    with evaluating(model):
        for _ in range(n_tokens):
            starts = intervals(predictions.next())
            token = int(np.searchsorted(starts, decoder.target(), side="right")) - 1
            decoder.decode(int(starts[token]), int(starts[token + 1] - starts[token]))
            predictions.saw(token)
            yield token

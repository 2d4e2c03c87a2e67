"""SentencePiece BPE that gives every Unicode string back exactly, and document boundaries that no text can spell.

Decoding is a table lookup: every id stands for fixed bytes, whatever its neighbours. Hence the UTF-8 bytes of any
stretch of tokens are a sum over the table, and a stream can be decoded id by id.

SentencePiece writes a space as U+2581, so the character U+2581 itself would come back as a space. It is therefore never
shown to SentencePiece: text is cut at it and the ids of its three UTF-8 bytes are put in its place. No other character
pays for this.

Settings as in Yi (arXiv 2403.04652, section 2.2); BPE: Sennrich et al., arXiv 1508.07909; SentencePiece: Kudo and
Richardson, arXiv 1808.06226.

Legend: V vocabulary.
"""

import codecs
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

SPACE_MARK = "\u2581"
# Learning sees at most this much text (UTF-8 bytes): the first documents of the list, whose order is already a shuffle.
TRAINING_BYTES = 1 << 25
# SentencePiece drops longer sentences without a word, so it gets pieces of documents of at most this many characters.
PIECE_CHARACTERS = 4096
CHARACTER_COVERAGE = 0.9999
# The 256 bytes, and as symbols of their own the unknown token, the document boundary, the space and the barrier below.
N_RESERVED = 260
# SentencePiece drops a training sentence that holds U+2585 (its own mark), and takes a tab as a place where no merge
# may cross.
_LEARNING_BARRIER = "\t"
_NEVER_LEARNT = (SPACE_MARK, "\u2585")
PROBES = (
    "a",
    " a",
    "a  b ",
    "\n\r\n\t\0",
    "\ufb01 \u2460 A\u030a \uff21",
    "\u4f60\u597d\uff0c\u3000",
    "\U0001f600 <s></s><unk><0x41>",
)


class Tokenizer:
    """A SentencePiece model whose ids decode by table. `corpus.byte_level_tokenizer` has the other kind there is.

    Args:
        model: bytes of a SentencePiece file.
        name: what errors call it.

    Attributes:
        boundary_id: marks the start of a document; never produced by `encode`.
        n_bytes_V: UTF-8 bytes that each id stands for, int64.
        file_name: what its file is called in a model's folder.

    Raises:
        ValueError: for a model that cannot give every string back.
    """

    file_name = "tokenizer.model"

    def __init__(self, model: bytes, *, name: str = "tokenizer"):
        try:
            # Given nothing at all in the constructor, SentencePiece would stay uninitialised without a word.
            self._processor = sentencepiece.SentencePieceProcessor()
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError(f"{name}: not a SentencePiece model") from error
        processor = self._processor
        self._model = model
        self.vocab_size: int = processor.vocab_size()
        byte_ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        if not all(processor.is_byte(id) for id in byte_ids):
            raise ValueError(
                f"{name}: has no byte pieces, so unknown characters would be lost; train it with byte_fallback=true"
            )
        self._bytes_of_id = [self._piece_bytes(id) for id in range(self.vocab_size)]
        for byte, id in enumerate(byte_ids):
            self._bytes_of_id[id] = bytes([byte])
        self._space_mark_ids = [byte_ids[byte] for byte in SPACE_MARK.encode()]
        self.n_bytes_V = np.array([len(piece) for piece in self._bytes_of_id], dtype=np.int64)
        self.boundary_id: int = next(
            (id for id in (processor.bos_id(), processor.eos_id()) if id >= 0 and processor.is_control(id)), -1
        )
        if self.boundary_id < 0:
            raise ValueError(f"{name}: has no bos or eos control symbol to mark document boundaries with")
        for probe in PROBES:
            if (got := self.decode(self.encode(probe))) != probe:
                raise ValueError(
                    f"{name}: {probe!r} comes back as {got!r}; it needs normalization_rule_name=identity,"
                    " byte_fallback=true, add_dummy_prefix=false and remove_extra_whitespaces=false"
                )

    @classmethod
    def train(cls, texts: Sequence[str], vocab_size: int) -> "Tokenizer":
        """Learn merges from the first `TRAINING_BYTES` of `texts`. The same texts give the same tokenizer, whatever the
        number of cores.

        Single characters get at most half of the free vocabulary as long as merges can fill the other half (matters for
        Chinese); rarer characters are spelt in bytes.

        Raises:
            ValueError: for a vocabulary too small to hold the bytes, or larger than the text can fill.
        """
        if vocab_size <= N_RESERVED:
            raise ValueError(
                f"vocab_size must be at least {N_RESERVED + 1} (256 bytes and {N_RESERVED - 256} symbols come first),"
                f" got {vocab_size}"
            )
        pieces = list(_training_pieces(texts))
        n_free = vocab_size - N_RESERVED
        try:
            try:
                return cls(_learn(_hide_characters(pieces, alphabet_limit=n_free // 2), vocab_size))
            except RuntimeError:
                return cls(_learn(_hide_characters(pieces, alphabet_limit=n_free), vocab_size))
        except RuntimeError as error:
            if limit := re.search(r"too high.*<= (\d+)", str(error)):
                raise ValueError(f"vocab_size {vocab_size} is too large for this text: at most {limit[1]}") from error
            raise ValueError(f"no tokenizer of {vocab_size} tokens can be learnt from this text: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a SentencePiece file, ours or the user's.

        Raises:
            ValueError: for a file that cannot be read or is no usable model.
        """
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"tokenizer file {path}: {error.strerror}") from error
        return cls(model, name=str(path))

    def save(self, path: str | Path) -> None:
        Path(path).write_bytes(self._model)

    def hash(self) -> str:
        """SHA-256 of the (piece, score) list: what the tokenizer does, where the file's bytes also depend on how it was
        trained."""
        processor = self._processor
        pairs = [(processor.id_to_piece(id), processor.get_score(id)) for id in range(self.vocab_size)]
        return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without boundary.

        Raises:
            ValueError: for a lone surrogate; any string of Unicode scalar values is legal.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts, on all cores."""
        segments: list[str] = []
        for text in texts:
            refuse_surrogates(text)
            segments += text.split(SPACE_MARK)
        # A batch starts a pool of threads, which costs far more than one short text.
        ids_of_segment = iter(
            [self._processor.encode(segments[0])] if len(segments) == 1 else self._processor.encode(segments)
        )
        batch: list[list[int]] = []
        for text in texts:
            ids = next(ids_of_segment)
            for _ in range(text.count(SPACE_MARK)):
                ids += self._space_mark_ids
                ids += next(ids_of_segment)
            batch.append(ids)
        return batch

    def decode_bytes(self, ids: Iterable[int] | np.ndarray) -> bytes:
        """UTF-8 bytes of ids (any integers below `vocab_size`); boundaries and other control symbols are empty."""
        array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
        if array.size and not 0 <= array.min() <= array.max() < self.vocab_size:
            raise ValueError(f"token ids must lie in [0, {self.vocab_size}), got {array.min()} to {array.max()}")
        return b"".join(map(self._bytes_of_id.__getitem__, array.tolist()))

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Text of ids; bytes that are not UTF-8, which only made-up sequences hold, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def stream_decoder(self) -> "StreamDecoder":
        return StreamDecoder(self)

    def _piece_bytes(self, id: int) -> bytes:
        processor = self._processor
        if processor.is_control(id) or processor.is_unknown(id):
            return b""
        return processor.id_to_piece(id).replace(SPACE_MARK, " ").encode()


class StreamDecoder:
    """Text of a growing sequence: `push` each id as it comes, `flush` at the end; what they return adds up to
    `Tokenizer.decode`."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The text that is certain now: a character whose last byte has not come yet is held back."""
        return self._decoder.decode(self._tokenizer.decode_bytes([id]))

    def flush(self) -> str:
        """What a character broken off at the end decodes to; the decoder then starts afresh."""
        return self._decoder.decode(b"", final=True)


def refuse_surrogates(text: str) -> None:
    """Refuses a text that is no Unicode by a ValueError that names the place."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}: it is not"
            " Unicode"
        ) from error


def _learn(sentences: Iterator[str], vocab_size: int) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences,
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=CHARACTER_COVERAGE,
        # Text without a single space must not leave the space to byte fallback: its bytes would be those of U+2581.
        required_chars=SPACE_MARK,
        normalization_rule_name="identity",
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        max_sentence_length=4 * PIECE_CHARACTERS,
        # With all sentences used, in order, by one thread, nothing is left for a random seed to decide.
        input_sentence_size=0,
        shuffle_input_sentence=False,
        num_threads=1,
        unk_id=0,
        bos_id=1,
        bos_piece="<document>",
        eos_id=-1,
        pad_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def _training_pieces(texts: Iterable[str]) -> Iterator[str]:
    """Cut before a line break where there is one: SentencePiece strips line breaks from the end of a sentence, but not
    from its start."""
    left = TRAINING_BYTES
    for text in texts:
        start = 0
        while start < len(text):
            end = start + PIECE_CHARACTERS
            line_break = text.rfind("\n", start + 1, end)
            if end < len(text) and line_break > 0:
                end = line_break
            piece = text[start:end]
            left -= len(piece.encode())
            if left < 0:
                return
            yield piece
            start = end


def _hide_characters(pieces: Sequence[str], *, alphabet_limit: int) -> Iterator[str]:
    """The pieces with characters that must not be learnt replaced by barriers: SentencePiece's own marks, and what
    exceeds the alphabet."""
    counts: Counter[str] = Counter()
    for piece in pieces:
        counts.update(piece)
    # Ties are broken by code point, not by which came first.
    by_frequency = sorted(counts.keys() - {" "}, key=lambda character: (-counts[character], character))
    hidden = str.maketrans(dict.fromkeys([*by_frequency[alphabet_limit:], *_NEVER_LEARNT], _LEARNING_BARRIER))
    for piece in pieces:
        yield piece.translate(hidden)

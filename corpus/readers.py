"""One reader per file type; each yields documents and, for what cannot be used, its place and the reason. Bad data
never raises.

Places are `path` (whole file), `path:line` or `path:row`, counted from 1.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHUNK_BYTES = 1 << 20
# Characters of a text file that is more than one document, and of the documents that it is cut into: a book would be
# trained on or held out as a whole.
LONG_TEXT, PIECE = 100_000, 10_000


@dataclass(frozen=True)
class Document:
    """A text, valid Unicode and not empty."""

    text: str


@dataclass(frozen=True)
class Skipped:
    """What could not be used: where it stands, and why."""

    place: str
    reason: str


def suffix_of(path: Path) -> str | None:
    """The known file type of a path, as its suffix in lower case, or None."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def place_of(path: Path) -> str:
    """A printable path: bytes of the name that are not UTF-8 are escaped."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def read_file(path: Path, *, text_field: str) -> Iterator[Document | Skipped]:
    """Documents of one file, by its suffix.

    Raises:
        ValueError: for an unknown suffix.
        ImportError: where the package that reads it is not installed.
    """
    suffix = suffix_of(path)
    if suffix is None:
        raise ValueError(f"{place_of(path)}: unknown file type; legal are {', '.join(SUFFIXES)}")
    if suffix in (".txt", ".md"):
        return (part for document in read_text(path) for part in cut(document))
    if suffix == ".parquet":
        return _read_parquet(path, text_field)
    return _read_jsonl(path, text_field, CHUNKS_OF_SUFFIX[suffix])


def read_text(path: Path) -> Iterator[Document | Skipped]:
    """The whole file as one document, if it is UTF-8; line ends and byte order mark stay as they are."""
    try:
        yield _checked(path.read_bytes().decode(), place_of(path))
    except (OSError, UnicodeDecodeError) as error:
        yield Skipped(place_of(path), str(error))


def cut(document: Document | Skipped) -> Iterator[Document | Skipped]:
    """A document of more than `LONG_TEXT` characters in parts: of `PIECE` characters to the next blank line, and of no
    more than twice as many to the next line. One behind the other they are the document; byte order mark and kind of
    line ends move no cut, so that copies of a book stay copies."""
    if isinstance(document, Skipped) or len(document.text.removeprefix("\ufeff").replace("\r\n", "\n")) <= LONG_TEXT:
        yield document
        return
    part, length = "", 0
    for line in _short_lines(document.text):
        part += line
        bare = line.strip("\ufeff\r\n")
        length += len(bare) + 1
        if length >= 2 * PIECE or (length >= PIECE and not bare):
            yield Document(part)
            part, length = "", 0
    if part:
        yield Document(part)


def _short_lines(text: str) -> Iterator[str]:
    """Lines with their ends; one that is longer than two parts in parts of its own."""
    for line in text.splitlines(keepends=True):
        if len(line) <= 2 * PIECE:
            yield line
        else:
            yield from (line[start : start + PIECE] for start in range(0, len(line), PIECE))


def _checked(text: Any, place: str) -> Document | Skipped:
    if not isinstance(text, str):
        return Skipped(place, f"the text is not a string but {type(text).__name__}")
    if not text:
        return Skipped(place, "empty text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return Skipped(place, f"lone surrogate U+{ord(text[error.start]):04X} at character {error.start}")
    return Document(text)


def _read_jsonl(
    path: Path, text_field: str, chunks_of: Callable[[Path], Iterator[bytes]]
) -> Iterator[Document | Skipped]:
    """Blank lines are passed over; a stream that breaks off loses its rest, from the first line that did not arrive
    whole."""
    number = 0
    try:
        for number, line in enumerate(_lines(chunks_of(path)), start=1):
            if line.strip():
                yield _parse_line(line, text_field, f"{place_of(path)}:{number}")
    except (OSError, EOFError, zlib.error) as error:
        yield Skipped(f"{place_of(path)}:{number + 1}", f"unreadable from here on: {error}")


def _parse_line(line: bytes, text_field: str, place: str) -> Document | Skipped:
    try:
        # Editors on Windows put a byte order mark before the first line.
        record = json.loads(line.decode("utf-8-sig"))
    except RecursionError:
        return Skipped(place, "nested too deeply")
    except ValueError as error:
        return Skipped(place, f"not JSON in UTF-8: {error}")
    if not isinstance(record, dict):
        return Skipped(place, f"not a JSON object but {type(record).__name__}")
    if text_field not in record:
        return Skipped(place, f"no field {text_field!r}")
    return _checked(record[text_field], place)


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    pending = b""
    for chunk in chunks:
        *lines, pending = (pending + chunk).split(b"\n")
        yield from lines
    if pending:
        yield pending


def _plain_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _gzip_chunks(path: Path) -> Iterator[bytes]:
    import gzip

    with gzip.open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _zstd_chunks(path: Path) -> Iterator[bytes]:
    """All frames of the file. The library's own stream reader ends quietly at a truncated frame; this raises
    EOFError."""
    try:
        import zstandard
    except ImportError as error:
        raise ImportError(f'{place_of(path)}: reading .zst needs zstandard: pip install -e ".[corpus]"') from error

    frame = None
    for chunk in _plain_chunks(path):
        rest = chunk
        while rest:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                yield frame.decompress(rest)
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from error
            rest = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError("the compressed file ended before its end-of-frame marker")


def _read_parquet(path: Path, text_field: str) -> Iterator[Document | Skipped]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f'{place_of(path)}: reading .parquet needs pyarrow: pip install -e ".[corpus]"') from error

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if text_field not in file.schema_arrow.names:
                yield Skipped(
                    place_of(path), f"no column {text_field!r}; it has {', '.join(map(repr, file.schema_arrow.names))}"
                )
                return
            for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
                for value in batch.column(0):
                    row += 1
                    yield _parse_cell(value, f"{place_of(path)}:{row}")
    except (OSError, pyarrow.ArrowException) as error:
        yield Skipped(f"{place_of(path)}:{row + 1}", f"unreadable from here on: {error}")


def _parse_cell(value: Any, place: str) -> Document | Skipped:
    try:
        return _checked(value.as_py(), place)
    except UnicodeDecodeError as error:
        return Skipped(place, str(error))


CHUNKS_OF_SUFFIX = {".jsonl": _plain_chunks, ".jsonl.gz": _gzip_chunks, ".jsonl.zst": _zstd_chunks}
SUFFIXES = (".txt", ".md", *CHUNKS_OF_SUFFIX, ".parquet")

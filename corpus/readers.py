"""One reader per file type; each yields documents and, for what cannot be used, its place and the reason. Bad data
never raises.

Places are `path` (whole file), `path:line` or `path:row`, counted from 1.
"""

import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHUNK_BYTES = 1 << 20
# zstd --ultra --long=31, the most that the format has; readers refuse more than 128 MiB unless told.
ZSTD_WINDOW = 1 << 31
# Characters of a text file that is more than one document, and of the documents that it is cut into: a book would be
# trained on or held out as a whole.
LONG_TEXT, PIECE = 100_000, 10_000


@dataclass(frozen=True)
class Document:
    """A text, valid Unicode and not empty.

    Attributes:
        place: where it stands.
        record: the JSON object or row that holds the text, text included; empty for a text file.
    """

    text: str
    place: str = field(default="", compare=False)
    record: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def domain(self) -> str:
        """What its record says, or the name of its file without suffixes."""
        given = self.record.get("domain")
        # No Path: it interns its parts, and Python's table of those would get an entry for every place.
        return printable(given) if isinstance(given, str) else os.path.basename(self.place).split(".")[0]


@dataclass(frozen=True)
class Skipped:
    """What could not be used: where it stands, and why."""

    place: str
    reason: str

    @property
    def kind(self) -> str:
        """The reason without what differs from record to record."""
        return re.sub(r"U\+[0-9A-F]+|(?<=character )\d+", "...", self.reason.partition(": ")[0])


def suffix_of(path: Path) -> str | None:
    """The known file type of a path, as its suffix in lower case, or None."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def place_of(path: Path) -> str:
    """A printable path: bytes of the name that are not UTF-8 are escaped."""
    return printable(str(path))


def printable(text: str) -> str:
    """With escapes in place of halves of surrogate pairs, which no file can hold."""
    return text.encode("utf-8", "backslashreplace").decode()


def read_file(path: Path, *, text_field: str) -> Iterator[Document | Skipped]:
    """Documents of one file, by its suffix.

    Raises:
        ValueError: for an unknown suffix.
        ImportError: where the package that reads it is not installed.
    """
    suffix = suffix_of(path)
    if suffix is None:
        raise ValueError(f"{place_of(path)}: unknown file type; legal are {LEGAL}")
    if suffix == ".parquet":
        return _read_parquet(path, text_field)
    kind, chunks_of = FORMATS[suffix]
    if kind == "text":
        return (part for document in read_text(path, chunks_of) for part in cut(document))
    return _read_jsonl(path, text_field, chunks_of)


def read_text(path: Path, chunks_of: Callable[[Path], Iterable[bytes]] | None = None) -> Iterator[Document | Skipped]:
    """The whole file as one document, if it is UTF-8; line ends and byte order mark stay as they are."""
    place = place_of(path)
    try:
        data = b"".join((chunks_of or _plain_chunks)(path))
        yield _checked(data.decode(), place)
    except UnicodeDecodeError as error:
        yield Skipped(place, f"not UTF-8: {error}")
    except (OSError, EOFError, zlib.error) as error:
        yield Skipped(place, f"unreadable: {error}")


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
            yield Document(part, document.place)
            part, length = "", 0
    if part:
        yield Document(part, document.place)


def _short_lines(text: str) -> Iterator[str]:
    """Lines with their ends; one that is longer than two parts in parts of its own."""
    for line in text.splitlines(keepends=True):
        if len(line) <= 2 * PIECE:
            yield line
        else:
            yield from (line[start : start + PIECE] for start in range(0, len(line), PIECE))


def _checked(text: Any, place: str, record: Mapping[str, Any] | None = None) -> Document | Skipped:
    if not isinstance(text, str):
        return Skipped(place, f"the text is not a string but {type(text).__name__}")
    if not text:
        return Skipped(place, "empty text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return Skipped(place, f"lone surrogate U+{ord(text[error.start]):04X} at character {error.start}")
    return Document(text, place, record or {})


def _read_jsonl(
    path: Path, text_field: str, chunks_of: Callable[[Path], Iterable[bytes]]
) -> Iterator[Document | Skipped]:
    """Blank lines are passed over; a stream that breaks off loses its rest, from the first line that did not arrive
    whole. A file that begins with a bracket is one JSON array, which is held in memory."""
    number = 0
    try:
        for number, line in enumerate(_lines(chunks_of(path)), start=1):
            if number == 1 and _is_array(path, line):
                yield from _parse_array(b"".join(chunks_of(path)), text_field, place_of(path))
                return
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
    return _text_of(record, text_field, place)


def _is_array(path: Path, line: bytes) -> bool:
    json_file = path.name.lower().removesuffix(".gz").removesuffix(".zst").endswith(".json")
    return json_file and line.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _parse_array(data: bytes, text_field: str, place: str) -> Iterator[Document | Skipped]:
    try:
        records = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        yield Skipped(place, f"not JSON in UTF-8: {error}")
        return
    for number, record in enumerate(records, start=1):
        yield _text_of(record, text_field, f"{place}[{number}]")


def _text_of(record: Any, text_field: str, place: str) -> Document | Skipped:
    if not isinstance(record, dict):
        return Skipped(place, f"not a JSON object but {type(record).__name__}")
    holder, name = holder_of(record, text_field)
    if name not in holder:
        return Skipped(place, f"no field {text_field!r}")
    return _checked(holder[name], place, record)


def holder_of(record: Mapping[str, Any], text_field: str) -> tuple[Mapping[str, Any], str]:
    """The object that holds a field, and its name in there: `meta.text` is `text` in `meta`, unless there is a field of
    the whole name."""
    while text_field not in record and "." in text_field:
        outer, _, rest = text_field.partition(".")
        inner = record.get(outer)
        if not isinstance(inner, Mapping):
            break
        record, text_field = inner, rest
    return record, text_field


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines without their ends, in time linear in their length, however many chunks one takes."""
    pending: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        pending.append(first)
        if others:
            yield b"".join(pending)
            yield from others[:-1]
            pending = [others[-1]]
    if any(pending):
        yield b"".join(pending)


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
            frame = frame or zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()
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
            column, _, inner = text_field.partition(".")
            if text_field in file.schema_arrow.names:
                column, inner = text_field, ""
            if column not in file.schema_arrow.names:
                yield Skipped(
                    place_of(path), f"no column {text_field!r}; it has {', '.join(map(repr, file.schema_arrow.names))}"
                )
                return
            for batch in file.iter_batches(batch_size=1024):
                others = [name for name in batch.schema.names if name != column]
                cells = zip(batch.column(column), *(batch.column(name) for name in others))
                for value, *rest in cells:
                    row += 1
                    yield _parse_cell(value, inner, f"{place_of(path)}:{row}", (column, others, rest))
    except (OSError, pyarrow.ArrowException) as error:
        yield Skipped(f"{place_of(path)}:{row + 1}", f"unreadable from here on: {error}")


def _parse_cell(value: Any, inner: str, place: str, row: tuple[str, list[str], list[Any]]) -> Document | Skipped:
    column, names, others = row
    try:
        text = value.as_py()
        record = {column: text, **{name: other.as_py() for name, other in zip(names, others)}}
        return _text_of(record, f"{column}.{inner}", place) if inner else _checked(text, place, record)
    except UnicodeDecodeError as error:
        return Skipped(place, f"not UTF-8: {error}")


COMPRESSIONS = {"": _plain_chunks, ".gz": _gzip_chunks, ".zst": _zstd_chunks}
FORMATS = {
    f"{suffix}{compression}": (kind, chunks_of)
    for suffix, kind in (
        (".txt", "text"),
        (".md", "text"),
        (".jsonl", "lines"),
        (".ndjson", "lines"),
        (".json", "lines"),
    )
    for compression, chunks_of in COMPRESSIONS.items()
}
SUFFIXES = (*FORMATS, ".parquet")
LEGAL = ".txt, .md, .jsonl, .ndjson, .json (each also as .gz and .zst) and .parquet"

"""Documents on their way through the passes: shards of JSON lines in the work folder, each wholly there or not there.

The same text is cut into the same shards whatever the number of workers, and a pass over a shard writes files of its
own; so a pass that was killed does again what it had not finished, and the result is the same.
"""

import contextlib
import gzip
import io
import json
import os
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from corpus.readers import Document, Skipped, holder_of, place_of, read_file
from foundation.files import naming

READ = "read"


@dataclass
class Item:
    """One thing that came in, and what became of it.

    Attributes:
        text: as it is now. Empty for what could not be read.
        record: the object that held the text, with nothing in its place: every pass would read and write it twice.
        place: where it came from.
        domain: name of the file, or what the record says.
        language: None where no layer has said it.
        layer, reason: which layer dropped it, and why; None for what is kept.
        also: layers behind that one that would have dropped it too.
        changed: characters by which layers changed the text.
        masked: pieces of personal data that were masked.
        original: text as it came in, where it was changed.
    """

    text: str
    record: dict[str, Any]
    place: str
    domain: str
    n_bytes: int
    language: str | None = None
    layer: str | None = None
    reason: str | None = None
    also: list[str] = field(default_factory=list)
    changed: dict[str, int] = field(default_factory=dict)
    masked: dict[str, int] = field(default_factory=dict)
    original: str | None = None

    def change(self, text: str) -> None:
        if text != self.text:
            self.original, self.text = self.as_it_came(), text

    def as_it_came(self) -> str:
        return self.text if self.original is None else self.original


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write; it becomes `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with naming(path, "nothing of it is left"):
        yield temporary
        os.replace(temporary, path)


def write_array(path: Path, array: np.ndarray) -> None:
    with whole(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)


@contextlib.contextmanager
def writing(path: Path, *, compressed: bool = False) -> Iterator[IO[bytes]]:
    with whole(path) as temporary, open(temporary, "wb") as file:
        if not compressed:
            yield file
            return
        # No name and no time in the header: equal content, equal file.
        with (
            gzip.GzipFile("", "wb", compresslevel=5, fileobj=file, mtime=0) as inner,
            io.BufferedWriter(inner) as buffer,
        ):
            yield buffer  # pyright: ignore[reportReturnType]


def items_of(path: Path) -> Iterator[Item]:
    for _, item in numbered_items(path):
        yield item


def numbered_items(path: Path, wanted: Container[int] | None = None) -> Iterator[tuple[int, Item]]:
    """Items and their numbers; of a few that are wanted, no other is parsed."""
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            if wanted is None or number in wanted:
                yield number, Item(**json.loads(line))


def line_of(item: Item) -> bytes:
    return json.dumps(vars(item), ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass") + b"\n"


def cut_into_shards(file: Path, number: int, folder: Path, *, text_field: str, shard_bytes: int) -> None:
    """Reads an input file into shards `<number>_<part>.jsonl` of `folder`; `<number>.parts`, which has their names,
    comes last."""
    parts: list[str] = []
    waiting, n_bytes = [], 0

    def put() -> None:
        name = f"{number:05d}_{len(parts):05d}"
        with writing(folder / f"{name}.jsonl") as out:
            out.writelines(waiting)
        parts.append(name)
        waiting.clear()

    for item in read_file(file, text_field=text_field):
        line = line_of(_item(item, file, text_field))
        waiting.append(line)
        n_bytes += len(line)
        if n_bytes >= shard_bytes:
            put()
            n_bytes = 0
    if waiting:
        put()
    with writing(folder / f"{number:05d}.parts") as out:
        out.write(json.dumps(parts).encode())


def _item(item: Document | Skipped, file: Path, text_field: str) -> Item:
    if isinstance(item, Skipped):
        return Item("", {}, item.place, domain_of(file), 0, layer="normalise", reason=f"unreadable: {item.kind}")
    record = with_text(dict(item.record), text_field, "")
    return Item(item.text, record, item.place, item.domain, len(item.text.encode()))


def domain_of(file: Path) -> str:
    """A file's name without its suffixes."""
    return place_of(Path(file.name)).split(".")[0]


def with_text(record: dict[str, Any], text_field: str, text: str) -> dict[str, Any]:
    """The record with another text, in the place where it was."""
    holder, name = holder_of(record, text_field)
    if holder is record or name not in holder:
        return {**record, text_field: text}
    outer, _, rest = text_field.partition(".")
    return {**record, outer: with_text(record[outer], rest, text)}

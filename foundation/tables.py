"""Tables as csv files: UTF-8, a header, lines that end in a line feed."""

import csv
import dataclasses
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from foundation.files import write_text


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes rows of plain values; None is an empty cell. Folders above the file are made.

    Raises:
        files.DiskFullError: naming the file; an older one is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_text(path, table.getvalue())


def write_rows(path: Path, kind: type, rows: Iterable[Any]) -> None:
    """Writes instances of the dataclass `kind`, one column per field."""
    names = [field.name for field in dataclasses.fields(kind)]
    write_table(path, names, ([getattr(row, name) for name in names] for row in rows))


def read_rows(path: Path, kind: type) -> list[Any]:
    """The inverse of `write_rows` for fields of type str, int and float; no rows where there is no file."""
    types: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(kind)}
    lines = csv.DictReader(path.read_text(encoding="utf-8").splitlines()) if path.exists() else ()
    return [kind(**{name: types[name](value) for name, value in line.items()}) for line in lines]

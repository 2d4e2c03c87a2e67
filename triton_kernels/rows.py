"""Tables of frozen dataclasses as csv files: one column per field."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any


def write_rows(path: Path, kind: type, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(kind)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read_rows(path: Path, kind: type) -> list[Any]:
    """The inverse for fields of type str, int and float."""
    types: dict[str, Any] = {f.name: f.type for f in fields(kind)}
    with path.open(newline="") as file:
        return [kind(**{name: types[name](value) for name, value in line.items()}) for line in csv.DictReader(file)]

"""Tables of frozen dataclasses as csv files, one column per field; and how a shape and a dtype are written in them."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch


def shape_label(shape: Mapping[str, int]) -> str:
    return " ".join(f"{name}={size}" for name, size in shape.items())


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def write_rows(path: Path, kind: type, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(kind)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read_rows(path: Path, kind: type) -> list[Any]:
    """The inverse for fields of type str, int and float; no rows where there is no file."""
    types: dict[str, Any] = {f.name: f.type for f in fields(kind)}
    lines = csv.DictReader(path.read_text().splitlines()) if path.exists() else ()
    return [kind(**{name: types[name](value) for name, value in line.items()}) for line in lines]

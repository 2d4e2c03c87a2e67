"""The results of the difficulty study as tables: one csv per question."""

import csv
import dataclasses
from pathlib import Path
from typing import Any

ResultRow = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """Rows by question; every row of a table has the same keys, its columns.

    Attributes:
        k: mean experts at which methods are compared.
        n_tokens, n_documents: of real text measured.
    """

    k: int
    n_tokens: int
    n_documents: int
    correlations: list[ResultRow]
    structure: list[ResultRow]
    deciles: list[ResultRow]
    regret: list[ResultRow]
    frontier: list[ResultRow]
    differences: list[ResultRow]


TABLES = ("correlations", "structure", "deciles", "regret", "frontier", "differences")


def write_tables(results: Results, folder: Path) -> None:
    """One csv per table into `folder`."""
    for name in TABLES:
        rows = getattr(results, name)
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
            writer.writeheader()
            writer.writerows(
                {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
                for row in rows
            )

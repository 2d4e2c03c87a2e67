"""The results of the difficulty study as tables: one csv per question."""

import dataclasses
from pathlib import Path
from typing import Any

from foundation.tables import write_table

ResultRow = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """Rows by question; every row of a table has the same keys, its columns.

    Attributes:
        k: mean experts at which methods are compared.
        n_tokens, n_documents: of real text measured.
        methods: of each run, whose name the rows bear; several seeds of a method are several runs.
        correlations: difficulty against experts, by method, difficulty and layer.
        structure: problems, their label against the experts of their answers, by method and task.
        deciles: experts and loss by tenths of difficulty.
        frontier: bits per byte of every allocation measured.
        differences: own allocations against their rivals, in bits per byte.
    """

    k: int
    n_tokens: int
    n_documents: int
    methods: dict[str, str]
    correlations: list[ResultRow]
    structure: list[ResultRow]
    deciles: list[ResultRow]
    frontier: list[ResultRow]
    differences: list[ResultRow]


TABLES = ("correlations", "structure", "deciles", "frontier", "differences")


def write_tables(results: Results, folder: Path) -> None:
    """One csv per table into `folder`; numbers with six significant digits."""
    for name in TABLES:
        rows: list[ResultRow] = getattr(results, name)
        columns = list(rows[0]) if rows else []
        write_table(folder / f"{name}.csv", columns, ([_rounded(row[column]) for column in columns] for row in rows))


def _rounded(value: Any) -> Any:
    # More digits than resampling can support would only be noise in the diffs of recorded results.
    return f"{value:.6g}" if isinstance(value, float) else value

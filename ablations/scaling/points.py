"""Points to fit a law to, from a csv: one row per trained model, or per step of one, of which the last counts."""

import csv
import dataclasses
import gzip
import io
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ablations.scaling.forms import FLOPS, TOKENS, Law, derived
from ablations.scaling.options import Columns

FLOPS_PER_PARAMETER = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Points:
    """What a law is fitted to.

    Attributes:
        variables: by name, positive, [P].
        loss_P: positive.
        weight_P: of each in the objective.
    """

    variables: dict[str, np.ndarray]
    loss_P: np.ndarray
    weight_P: np.ndarray

    def __len__(self) -> int:
        return len(self.loss_P)

    def subset(self, keep: np.ndarray) -> "Points":
        """Those that an index or a mask keeps."""
        return Points(
            variables={name: values[keep] for name, values in self.variables.items()},
            loss_P=self.loss_P[keep],
            weight_P=self.weight_P[keep],
        )


def without_highest(points: Points, count: int) -> np.ndarray:
    """Indices of all points but those of the `count` highest losses, ascending."""
    order = np.argsort(points.loss_P, kind="stable")
    return np.sort(order[: len(points) - count])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of a csv with their line numbers, for messages."""

    path: Path
    lines: list[int]
    rows: list[dict[str, str]]

    def column(self, name: str) -> list[str]:
        """The cells of a column.

        Raises:
            ValueError: where there is none of this name.
        """
        if name not in self.rows[0]:
            raise ValueError(f"{self.path}: no column {name!r}; it has {', '.join(self.rows[0])}")
        return [row[name] for row in self.rows]

    def numbers(self, name: str, *, zero: bool = False) -> np.ndarray:
        """A column as positive finite numbers, float [rows].

        Args:
            zero: 0 is legal too.

        Raises:
            ValueError: naming file, column and line.
        """
        cells = self.column(name)
        values = np.empty(len(cells))
        for index, cell in enumerate(cells):
            try:
                values[index] = float(cell)
            except (TypeError, ValueError):
                values[index] = math.nan
            if not (math.isfinite(values[index]) and (values[index] > 0 or (zero and values[index] == 0))):
                raise ValueError(
                    f"{self.path}, line {self.lines[index]}, column {name}: {cell!r} is no positive finite number;"
                    " leave out the rows of runs that diverged or lack it"
                )
        return values

    def only(self, indices: Iterable[int]) -> "Table":
        """Some of the rows."""
        indices = list(indices)
        return Table(path=self.path, lines=[self.lines[i] for i in indices], rows=[self.rows[i] for i in indices])


def read_table(path: Path) -> Table:
    """A csv, compressed with gzip or not.

    Raises:
        ValueError: for a file that is none or has no rows.
    """
    data = path.read_bytes()
    try:
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a csv in UTF-8, or one compressed with gzip ({error})") from error
    reader = csv.DictReader(io.StringIO(text))
    lines, rows = [], []
    for row in reader:
        lines.append(reader.line_num)
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no rows below a header")
    return Table(path=path, lines=lines, rows=rows)


def read_points(path: Path, columns: Columns, law: Law) -> Points:
    """The points of a csv.

    Raises:
        ValueError: for a missing column, a cell that is no positive number, and too few points or sizes for the law,
            naming file, column, line and what would be needed.
    """
    table = read_table(path)
    if columns.run is not None:
        table = last_of_runs(table, columns.run, table.numbers(columns.flops or columns.tokens))

    def column(name: str) -> np.ndarray:
        if name == FLOPS:
            return table.numbers(columns.flops or FLOPS)
        if name == TOKENS and columns.flops is not None:
            return table.numbers(columns.flops) / (FLOPS_PER_PARAMETER * table.numbers(columns.total_params))
        return table.numbers(getattr(columns, name))

    variables = {name: derived(name, column) for name in law.variables}
    weight_P = np.ones(len(table.rows)) if columns.weight is None else table.numbers(columns.weight)
    points = Points(variables=variables, loss_P=table.numbers(columns.loss), weight_P=weight_P)
    check_enough(points, law, path)
    return points


def last_of_runs(table: Table, run: str, tokens: np.ndarray) -> Table:
    """The row of most tokens of each run."""
    last: dict[str, int] = {}
    for index, name in enumerate(table.column(run)):
        if tokens[index] >= tokens[last.setdefault(name, index)]:
            last[name] = index
    return table.only(last.values())


def check_enough(points: Points, law: Law, where: object) -> None:
    """Refuses points that cannot tell the parameters of a law.

    Raises:
        ValueError: saying what would be needed.
    """
    needed = len(law.parameters) + 1
    if len(points) < needed:
        raise ValueError(
            f"{where}: {len(points)} points; the law {law.name!r} has {needed - 1} parameters and needs at least"
            f" {needed} points"
        )
    for name, values in points.variables.items():
        # A power and a constant cannot be told apart by fewer than three values.
        distinct = len(np.unique(np.round(np.log(values), 3)))
        if distinct < 3:
            raise ValueError(
                f"{where}: {distinct} distinct {'value' if distinct == 1 else 'values'} of {name}; a power law beside a"
                " constant needs at least 3"
            )

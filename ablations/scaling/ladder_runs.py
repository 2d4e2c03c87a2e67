"""The runs of a ladder, from one csv with a row per evaluation."""

import itertools
from collections.abc import Sequence

import numpy as np

from ablations.scaling.options import PredictOptions
from ablations.scaling.points import Table, read_table
from ablations.scaling.ratio_law import Run, Setting

LEAST_ROWS = 10


def read_ladder(options: PredictOptions, loss: str) -> list[Run]:
    """All runs with their losses of one column.

    Raises:
        ValueError: for missing columns, cells that are no positive numbers, runs of fewer than 10 rows or of changing
            size, and ladders of fewer than three sizes, naming what would be needed.
    """
    table = read_table(options.ladder)
    names = table.column(options.run_column)
    params = table.numbers(options.params_column)
    tokens = table.numbers(options.tokens_column)
    batch = table.numbers(options.batch_column)
    losses = table.numbers(loss)
    rows: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        rows.setdefault(name, []).append(index)
    sizes = sorted(set(params.tolist()))
    if len(sizes) < 3:
        raise ValueError(
            f"{options.ladder}: {len(sizes)} {'size' if len(sizes) == 1 else 'sizes'}; predictions need a ladder of at"
            " least 3, of which the larger ones are predicted from the smaller ones to find how wide intervals must be"
        )
    rule = _rule(params, batch, options.batch_power)
    runs = []
    for name, of in rows.items():
        of = sorted(of, key=lambda index: tokens[index])
        _check_run(table, name, of, params, tokens)
        size = float(params[of[0]])
        setting = Setting(
            size=name.split("-")[0],
            params=size,
            tokens=float(tokens[of[-1]]),
            warmup=options.warmup_per_param * size,
            floor=options.floor,
            batch=float(batch[of[0]]) / (rule * size**options.batch_power),
        )
        runs.append(Run(name=name, setting=setting, tokens_P=tokens[of], loss_P=losses[of]))
    return runs


def targets_of(options: PredictOptions, runs: Sequence[Run]) -> list[Setting]:
    """What is to be predicted, each target at every multiple.

    Raises:
        ValueError: for a multiple that no run of the ladder has.
    """
    known = sorted({run.setting.multiple for run in runs})
    if missing := [multiple for multiple in options.multiples if float(f"{multiple:.2g}") not in known]:
        raise ValueError(
            f"--multiples {missing[0]:g}: the ladder has no run of so many tokens per parameter; it has"
            f" {', '.join(f'{multiple:g}' for multiple in known)}"
        )
    table = read_table(options.ladder)
    params, batch = table.numbers(options.params_column), table.numbers(options.batch_column)
    rule = _rule(params, batch, options.batch_power)
    settings = []
    for target in options.targets:
        name, _, numbers = target.partition("=")
        size, *of_batch = (float(part) for part in numbers.split(":"))
        for multiple in options.multiples:
            settings.append(
                Setting(
                    size=name,
                    params=size,
                    tokens=20 * multiple * size,
                    warmup=options.warmup_per_param * size,
                    floor=options.floor,
                    batch=of_batch[0] / (rule * size**options.batch_power) if of_batch else 1.0,
                )
            )
    return settings


def _rule(params: np.ndarray, batch: np.ndarray, power: float) -> float:
    """What the ladder's batches are of params^power, in the geometric mean over its sizes."""
    _, first = np.unique(params, return_index=True)
    return float(np.exp(np.mean(np.log(batch[first]) - power * np.log(params[first]))))


def _check_run(table: Table, name: str, of: list[int], params: np.ndarray, tokens: np.ndarray) -> None:
    if len(of) < LEAST_ROWS:
        raise ValueError(f"{table.path}: run {name!r} has {len(of)} rows; a curve needs at least {LEAST_ROWS}")
    if len({float(params[index]) for index in of}) > 1:
        raise ValueError(f"{table.path}: run {name!r} has rows of several sizes; a run is one model")
    for before, after in itertools.pairwise(of):
        if tokens[before] == tokens[after]:
            raise ValueError(f"{table.path}, line {table.lines[after]}: run {name!r} has two rows at the same tokens")

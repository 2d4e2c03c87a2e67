"""The results of a study as rows: gains and shares of every allocation, whole and in parts, for each run and pooled.

`allocations.csv`: a row per run (and `POOLED`, where there are several), part and allocation. `differences.csv`: the
policy's own choice against every other allocation.

Legend: U runs, D documents, N counted tokens.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ablations.counterfactual.measure import EVEN, ORACLE, OWN, Measured
from ablations.counterfactual.text import Text
from ablations.difficulty.correlations import Bounded, document_sums
from ablations.difficulty.observe import Observed
from ablations.difficulty.scale import Scale
from foundation.tables import write_table

POOLED, WHOLE = "all runs", "all"
EASY, HARD = "easy half", "hard half"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllocationRow:
    """An allocation on a part of the text or in one layer.

    Attributes:
        run: name, or `POOLED`.
        part: `WHOLE`, "domain ...", `EASY` or `HARD` (halves of the tokens, by their loss averaged over passes that
            are not compared, and over runs), or "layer ...": that layer alone, all others even.
        mean_experts: per token and layer, of the part. It is the same for all allocations of the whole and of a layer;
            a domain or a half may get more than its share, and its row says so.
        bits_per_byte: of the part.
        gain: over the even allocation, in bits per byte of the part; above 0 is better. Bounds are 95 % intervals.
        share: of the oracle's gain; None where that is not above 0 by its interval.
    """

    run: str
    part: str
    allocation: str
    tokens: int
    mean_experts: float
    bits_per_byte: float
    gain: float
    gain_low: float
    gain_high: float
    share: float | None
    share_low: float | None
    share_high: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DifferenceRow:
    """The policy's own choice minus another allocation, in bits per byte; below 0 is better."""

    run: str
    against: str
    difference: float
    low: float
    high: float


def allocation_rows(measured: Sequence[Measured], text: Text, *, resamples: int, seed: int) -> list[AllocationRow]:
    """Every part of every run, then of all runs together where there are several."""
    context = _Context(text=text, resamples=resamples, seed=seed)
    masks = parts(measured, text)
    rows: list[AllocationRow] = []
    for name, group in groups_of(measured).items():
        for part, mask_N in masks.items():
            label = Label(run=name, part=part, layers=group[0].gains.layers)
            rows += _part_rows(label, [one.runs for one in group], mask_N, context)
        for layer in group[0].gains.layers:
            label = Label(run=name, part=f"layer {layer}", layers=(layer,))
            rows += _part_rows(label, [one.layer_runs[layer] for one in group], masks[WHOLE], context)
    return rows


def groups_of(measured: Sequence[Measured]) -> dict[str, list[Measured]]:
    """Every run by its name, and all of them, where there are several."""
    alone = {one.name: [one] for one in measured}
    return alone | ({POOLED: list(measured)} if len(measured) > 1 else {})


def difference_rows(measured: Sequence[Measured], text: Text, *, resamples: int, seed: int) -> list[DifferenceRow]:
    """Own against all others; no rows for policies that do not choose."""
    scale = Scale(n_bytes_D=text.n_bytes_D, resamples=resamples, seed=seed)
    rows: list[DifferenceRow] = []
    for name, group in groups_of(measured).items():
        if any(OWN not in one.runs for one in group):
            continue
        for other in group[0].runs:
            if other == OWN:
                continue
            bits_UD = np.stack([_bits_D(one.runs[OWN].nats_N - one.runs[other].nats_N, text) for one in group])
            found = scale.gain(bits_UD)
            rows.append(DifferenceRow(run=name, against=other, difference=found.value, low=found.low, high=found.high))
    return rows


def parts(measured: Sequence[Measured], text: Text) -> dict[str, np.ndarray]:
    """Which tokens belong to each part, the same for all runs; bool [N]."""
    domain_N = text.domain_D[text.windows.document_N]
    found = {WHOLE: np.ones(len(domain_N), dtype=bool)}
    domains = sorted(set(text.domain_D))
    if len(domains) > 1:
        found |= {f"domain {name}": domain_N == name for name in domains}
    loss_N = np.mean([one.gains.mean_nats_N for one in measured], axis=0)
    hard_N = loss_N > np.median(loss_N)
    return found | {EASY: ~hard_N, HARD: hard_N}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Label:
    """What rows are about; experts are counted in `layers`."""

    run: str
    part: str
    layers: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Context:
    text: Text
    resamples: int
    seed: int


def _part_rows(
    label: Label, runs: Sequence[dict[str, Observed]], mask_N: np.ndarray, context: _Context
) -> list[AllocationRow]:
    text = context.text
    bytes_D = _sums_D(text.windows.n_bytes_N * mask_N, text)
    held_D = bytes_D > 0
    if held_D.sum() < 2:
        return []
    scale = Scale(n_bytes_D=bytes_D[held_D], resamples=context.resamples, seed=context.seed)

    def gained_UD(allocation: str) -> np.ndarray:
        return np.stack([_bits_D((run[EVEN].nats_N - run[allocation].nats_N) * mask_N, text)[held_D] for run in runs])

    oracle_UD = gained_UD(ORACLE)
    rows: list[AllocationRow] = []
    for allocation in runs[0]:
        if not all(allocation in run for run in runs):
            continue
        gain = scale.gain(gained_UD(allocation))
        share = scale.share(gained_UD(allocation), oracle_UD) or Bounded(value=math.nan, low=math.nan, high=math.nan)
        bits = np.mean([run[allocation].nats_N[mask_N].sum() for run in runs]) / math.log(2)
        experts = np.mean([run[allocation].experts_NL[:, list(label.layers)][mask_N].mean() for run in runs])
        rows.append(
            AllocationRow(
                run=label.run,
                part=label.part,
                allocation=allocation,
                tokens=int(mask_N.sum()),
                mean_experts=float(experts),
                bits_per_byte=float(bits) / float(bytes_D.sum()),
                gain=gain.value,
                gain_low=gain.low,
                gain_high=gain.high,
                share=_number(share.value),
                share_low=_number(share.low),
                share_high=_number(share.high),
            )
        )
    return rows


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _sums_D(values_N: np.ndarray, text: Text) -> np.ndarray:
    return document_sums(values_N, text.windows.document_N, len(text.domain_D))


def _bits_D(nats_N: np.ndarray, text: Text) -> np.ndarray:
    return _sums_D(nats_N, text) / math.log(2)


def write(path: Path, kind: type, rows: Sequence[Any]) -> None:
    """Rows of a dataclass as csv, numbers with six significant digits: more than resampling can support."""
    columns = [field.name for field in dataclasses.fields(kind)]
    values = ([getattr(row, column) for column in columns] for row in rows)
    write_table(path, columns, ([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in values))

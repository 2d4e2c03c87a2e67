"""All finished stages of a folder as one table, `adapted.csv`: what was taught, what it cost, what came out."""

import dataclasses
from pathlib import Path

from foundation.tables import write_rows
from staged_training.record import RESULT, read_run

TABLE = "adapted.csv"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptedRow:
    """A finished stage. Losses are bits per byte of the whole validation text.

    Attributes:
        mean: experts per token asked for.
        mean_experts: used on the validation text, in the mean of the blocks that choose.
        then: what behind `router_share` of the steps trained.
        original: of the frozen original at its own k.
        untaught: of the original's weights with the best `mean` experts of each token; None where that is no whole
            number.
        change: bits_per_byte / original - 1.
        start_divergence, end_divergence: KL(original || model) before and behind the stage, nats per token.
        seconds, flops: of the steps.
        run: name of its folder.
    """

    method: str
    mean: float
    mean_experts: float
    then: str
    router_share: float
    ramp_share: float
    distill_share: float
    temperature: float
    learning_rate: float
    tokens: int
    seed: int
    k: int
    original: float
    untaught: float | None
    bits_per_byte: float
    change: float
    start_divergence: float
    end_divergence: float
    seconds: float
    flops: float
    run: str


def write_adapted(folder: Path) -> tuple[Path, list[AdaptedRow]]:
    """Reads every finished stage below `folder`, writes the table, and returns both, ordered by method and mean.

    Raises:
        CorruptFileError: when a file of a stage is not as it was written; names it.
    """
    rows = [_row(path.parent) for path in sorted(folder.glob(f"*/{RESULT}"))]
    rows.sort(key=lambda row: (row.method, -row.mean, row.tokens, row.seed, row.run))
    write_rows(folder / TABLE, AdaptedRow, rows)
    return folder / TABLE, rows


def _row(folder: Path) -> AdaptedRow:
    record = read_run(folder)
    result, teach, cost = record.result, record.config["teach"], record.ledger.costs["adaptation"]
    taught = {
        name: teach[name]
        for name in ("then", "router_share", "ramp_share", "distill_share", "temperature", "learning_rate", "seed")
    }
    return AdaptedRow(
        method=result["method"],
        mean=result["mean"],
        mean_experts=result["mean_experts_routed"],
        tokens=result["trained_tokens"],
        k=result["original_experts"],
        original=result["original_bits_per_byte"],
        untaught=result["untaught_bits_per_byte"],
        bits_per_byte=result["bits_per_byte"],
        change=result["bits_per_byte"] / result["original_bits_per_byte"] - 1,
        start_divergence=result["start_divergence"],
        end_divergence=result["end_divergence"],
        seconds=cost["seconds"],
        flops=cost["flops"],
        run=folder.name,
        **taught,
    )


def adapted_text(rows: list[AdaptedRow]) -> str:
    """For people: one line per stage."""
    lines = [
        f"{'method':<14}{'mean':>6}{'used':>7}{'tokens':>10}{'bpb':>9}{'change':>9}{'untaught':>10}{'original':>10}"
    ]
    for row in rows:
        untaught = "" if row.untaught is None else f"{row.untaught:.4f}"
        lines.append(
            f"{row.method:<14}{row.mean:>6g}{row.mean_experts:>7.2f}{row.tokens:>10,}{row.bits_per_byte:>9.4f}"
            f"{row.change:>+9.2%}{untaught:>10}{row.original:>10.4f}"
        )
    return "\n".join(lines)

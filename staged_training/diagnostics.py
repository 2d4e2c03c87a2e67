"""What the routers did in the course of training: `python -m staged_training diagnostics RUN_FOLDER`.

Training writes one line to `diagnostics.jsonl` for every step that ends an interval of progress, about that step's
tokens, of all processes. Rows dispatched are counted, never logical experts.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import tyro

from foundation.files import read_json_lines
from foundation.serialize import from_dict, to_dict
from foundation.tables import write_table
from routing.diagnostics import RoutingStatistics
from routing.router import Router
from staged_training.progress import DIAGNOSTICS

# Lines of the course over time that are printed; a csv holds all.
COURSE_LINES = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerDiagnostics:
    """One layer in one step.

    Attributes:
        asked: mean experts per token that the policy was told to use; None where its threshold alone decides.
        realised: mean experts per token.
        experts_per_token: share of the tokens that used 0, 1, 2, ... experts.
        max_load: rows of the busiest expert over the mean.
        dead_experts: without a row in this step.
        entropy: of the router's probabilities, nats.
        margin: lowest probability chosen minus highest one left out, mean over tokens; None where no token has both.
    """

    layer: int
    asked: float | None
    realised: float
    max_load: float
    dead_experts: int
    entropy: float
    margin: float | None
    experts_per_token: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepDiagnostics:
    """One line of the file.

    Attributes:
        layers: those that train.
        valid_bits_per_byte: of some batches of the validation text, see `validation`; None where they were not
            looked at.
    """

    step: int
    layers: tuple[LayerDiagnostics, ...]
    valid_bits_per_byte: float | None = None


def step_diagnostics(
    step: int,
    routers: Sequence[Router],
    statistics: Sequence[RoutingStatistics],
    valid_bits_per_byte: float | None = None,
) -> dict[str, Any]:
    """The line of one step as JSON takes it."""
    layers = tuple(_layer(router, counted) for router, counted in zip(routers, statistics, strict=True))
    return to_dict(StepDiagnostics(step=step, layers=layers, valid_bits_per_byte=valid_bits_per_byte))


def _layer(router: Router, counted: RoutingStatistics) -> LayerDiagnostics:
    # Counts of several processes come divided by their number: shares are what they tell.
    shares = [round(share, 6) for share in (counted.histogram / counted.histogram.sum()).tolist()]
    while shares and shares[-1] == 0:
        shares.pop()
    return LayerDiagnostics(
        layer=router.layer_index,
        asked=router.policy.asked_experts,
        realised=float(counted.mean_experts),
        max_load=float(counted.max_load),
        dead_experts=int(counted.dead_experts),
        entropy=float(counted.entropy),
        margin=float(counted.margin) if counted.margin_tokens > 0 else None,
        experts_per_token=tuple(shares),
    )


def read_diagnostics(folder: Path) -> list[StepDiagnostics]:
    """The lines of a run, empty if it wrote none."""
    path = folder / DIAGNOSTICS
    lines = read_json_lines(path) if path.exists() else []
    return [from_dict(StepDiagnostics, line, place=f"{path}:{number}") for number, line in enumerate(lines, 1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiagnosticsConfig:
    """Shows what the routers of a run did: the last step by layer, then the means over layers in the course of
    training.

    Attributes:
        run: folder of a trunk, of a branch or of a run in several processes.
        csv: also write every step and layer to this file.
    """

    run: tyro.conf.Positional[Path]
    csv: Path | None = None


def show_diagnostics(config: DiagnosticsConfig) -> None:
    """Raises ValueError for a folder without diagnostics, naming the folders below it that have some."""
    steps = read_diagnostics(config.run)
    if not steps:
        below = sorted(str(path.parent) for path in config.run.glob(f"*/*/{DIAGNOSTICS}"))
        raise ValueError(
            f"{config.run} holds no {DIAGNOSTICS} of a step;"
            f" {'try ' + ', '.join(below) if below else 'none lies below it'}"
        )
    # Written first: whatever happens to what is printed, the table is there.
    if config.csv is not None:
        write_csv(steps, config.csv)
    print(f"step {steps[-1].step}, by layer; 5 %, 50 %, 95 %: quantiles of experts per token")
    print(
        _aligned(
            ["layer", "asked", "realised", "5%", "50%", "95%", "load", "dead", "entropy", "margin"],
            map(_cells, steps[-1].layers),
        )
    )
    print("\nmeans over layers (dead: sum)")
    shown = {
        steps[round(index * (len(steps) - 1) / max(COURSE_LINES - 1, 1))].step: None for index in range(COURSE_LINES)
    }
    print(
        _aligned(
            ["step", "asked", "realised", "load", "dead", "entropy", "margin"],
            (_course(step) for step in steps if step.step in shown),
        )
    )
    if config.csv is not None:
        print(f"\nall {len(steps)} steps in {config.csv}")


def write_csv(steps: Sequence[StepDiagnostics], path: Path) -> None:
    """One row per step and layer; the shares of tokens that used 0, 1, ... experts in columns of their own."""
    width = max(len(layer.experts_per_token) for step in steps for layer in step.layers)
    names = [field.name for field in dataclasses.fields(LayerDiagnostics)][:-1]
    columns = ["step", *names, *(f"share_{experts}" for experts in range(width))]

    def row(step: StepDiagnostics, layer: LayerDiagnostics) -> list[Any]:
        shares = layer.experts_per_token + (0.0,) * (width - len(layer.experts_per_token))
        return [step.step, *(getattr(layer, name) for name in names), *shares]

    write_table(path, columns, (row(step, layer) for step in steps for layer in step.layers))


def _cells(layer: LayerDiagnostics) -> list[str]:
    quantiles = [str(_quantile(layer.experts_per_token, share)) for share in (0.05, 0.5, 0.95)]
    return [
        str(layer.layer),
        *_numbers([layer.asked, layer.realised]),
        *quantiles,
        *_rest(layer.max_load, layer.dead_experts, layer.entropy, layer.margin),
    ]


def _course(step: StepDiagnostics) -> list[str]:
    layers = step.layers
    asked, margins = _known(layer.asked for layer in layers), _known(layer.margin for layer in layers)
    numbers = _numbers([fmean(asked) if asked else None, fmean(layer.realised for layer in layers)])
    load, entropy = fmean(layer.max_load for layer in layers), fmean(layer.entropy for layer in layers)
    return [
        str(step.step),
        *numbers,
        *_rest(load, sum(layer.dead_experts for layer in layers), entropy, fmean(margins) if margins else None),
    ]


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _rest(load: float, dead: int, entropy: float, margin: float | None) -> list[str]:
    return [f"{load:.2f}", str(dead), f"{entropy:.3f}", "-" if margin is None else f"{margin:.2e}"]


def _numbers(values: Iterable[float | None]) -> list[str]:
    return ["-" if value is None else f"{value:.2f}" for value in values]


def _quantile(shares: Sequence[float], share: float) -> int:
    """The number of experts that at least `share` of the tokens did not exceed."""
    below = 0.0
    for experts, tokens in enumerate(shares):
        below += tokens
        if below >= share:
            return experts
    return len(shares) - 1


def _aligned(heading: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join("  ".join(f"{cell:>8}" for cell in row) for row in [heading, *rows])

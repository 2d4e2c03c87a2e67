"""The table of `python -m moe bench`: every way to compute the experts, fewer experts per token, and the whole layer.

Legend: T tokens, D model width, E experts, K experts per token.
"""

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from foundation.environment import cpu_name, short_commit
from foundation.tables import write_table
from foundation.timing import in_turns
from moe.bench import Problem, Shape, Step, largest_error
from moe.config import MoEConfig
from moe.layer import MoE
from routing.assignments import Assignments
from routing.policies.top_k import TopK
from routing.policies.top_p import TopP
from routing.policy import PolicyConfig
from routing.router import RouterConfig

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
FEWER = (1.0, 0.5, 0.25)
# What other code computes the experts by.
LIBRARIES = ("grouped_mm", "huggingface")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line: forward and backward.

    Attributes:
        part: "experts": gather, products, SwiGLU and combine. "layer": the router and its losses too.
        dtype: of the activations.
        load: rows of the busiest expert over the mean.
        way: which code.
        mean_experts: per token.
        ms: median; None where the result does not agree with the reference in `error`.
        of_dense: over the time of dense products of the same FLOPs (at the full k, for a layer with fewer experts too).
        of_full_k: over the time of the same way at the full k.
        of_libraries: over the time of the faster of `LIBRARIES` in the same turn: median, lowest and highest.
        gflops_per_s: of the layer's own FLOPs.
        error: largest relative error over output and gradients.
    """

    part: str
    dtype: str
    load: float
    way: str
    mean_experts: float
    ms: float | None
    of_dense: float | None = None
    of_full_k: float | None = None
    of_libraries: tuple[float, float, float] | None = None
    gflops_per_s: float | None = None
    error: float | None = None


def timed(
    problem: Problem,
    *,
    part: str,
    steps: dict[str, Step],
    errors: dict[str, float],
    means: dict[str, float],
    repeats: int,
    load: float,
    before_turn: Callable[[int], None] = lambda _: None,
    full: str | None = None,
) -> list[Row]:
    """Rows of `steps`, timed in turns; a step whose error is too large gets none.

    Args:
        part: of the layer, see `Row`; `load` too.
        steps: what is timed, by way.
        errors: largest relative error by way; 0 where there is none.
        means: experts per token by way.
        repeats: turns.
        before_turn: called with the number of the turn.
        full: the step that the others' times are compared with.
    """
    tolerance, name = TOLERANCE[problem.dtype], str(problem.dtype).removeprefix("torch.")
    right = {way: step for way, step in steps.items() if errors.get(way, 0.0) <= tolerance}
    seconds = in_turns(right, repeats=repeats, before_turn=before_turn)
    times = {way: 1e3 * statistics.median(taken) for way, taken in seconds.items()}
    rows = []
    for way in steps:
        ms = times.get(way)
        row = Row(part=part, dtype=name, load=load, way=way, mean_experts=means[way], ms=ms, error=errors.get(way))
        if ms is not None:
            row = dataclasses.replace(
                row,
                of_dense=ms / times["dense"] if "dense" in times else None,
                of_full_k=ms / times[full] if full in times else None,
                of_libraries=_beside_libraries(seconds, way),
                gflops_per_s=problem.shape.flops(means[way]) / ms / 1e6,
            )
        rows.append(row)
    return rows


def _beside_libraries(seconds: dict[str, list[float]], way: str) -> tuple[float, float, float] | None:
    fastest = [min(turn) for turn in zip(*(seconds[name] for name in LIBRARIES if name in seconds))]
    if not fastest:
        return None
    ratios = [own / theirs for own, theirs in zip(seconds[way], fastest)]
    return statistics.median(ratios), min(ratios), max(ratios)


def ways_rows(
    shape: Shape, dtype: torch.dtype, weight_dtype: torch.dtype, *, load: float, ways: Sequence[str], repeats: int
) -> list[Row]:
    """Every way on the same problem, beside dense products."""
    problem = Problem(shape, dtype=dtype, weight_dtype=weight_dtype, skew=load)
    expected = Problem(shape, dtype=torch.float32, weight_dtype=torch.float32, skew=load).grouped("reference")
    own = {"huggingface": problem.huggingface, "indexed loop": problem.indexed_loop}
    steps: dict[str, Step] = {way: own.get(way) or partial(problem.grouped, way) for way in ways}
    errors = {way: largest_error(step(), expected) for way, step in steps.items()}
    steps = {"dense": problem.dense(), **steps}
    means = dict.fromkeys(steps, float(shape.k))
    return timed(
        problem,
        part="experts",
        steps=steps,
        errors=errors,
        means=means,
        repeats=repeats,
        load=load,
        before_turn=problem.route,
    )


def fewer_experts_rows(shape: Shape, dtype: torch.dtype, weight_dtype: torch.dtype, *, repeats: int) -> list[Row]:
    """The experts alone and the whole layer at k, k/2 and k/4, and with a number that varies from token to token around
    k/2 (top-p)."""
    policies: dict[str, PolicyConfig] = {
        f"k = {k}": TopK(k=k) for k in (max(round(shape.k * share), 1) for share in FEWER)
    }
    half = max(shape.k / 2, 1.0)
    policies[f"top-p, mean {half:g}"] = TopP(target_mean=half, floor=1, cap=min(2 * shape.k, shape.n_experts))
    problem = Problem(shape, dtype=dtype, weight_dtype=weight_dtype, skew=1.0)
    layers = {way: layer_of(problem, policy, half) for way, policy in policies.items()}
    exact = Problem(shape, dtype=torch.float32, weight_dtype=torch.float32, skew=1.0)
    assignments = {way: layer(problem.x_TD.detach())[1].assignments for way, layer in layers.items()}
    means = {way: rows.token_N.shape[0] / shape.tokens for way, rows in assignments.items()}

    def experts(rows: Assignments, backend: str, of: Problem) -> list[Tensor]:
        of.use(rows)
        return of.grouped(backend)

    steps = {way: partial(experts, rows, "auto", problem) for way, rows in assignments.items()}
    errors = {way: largest_error(steps[way](), experts(rows, "reference", exact)) for way, rows in assignments.items()}
    full = f"k = {shape.k}"
    parts = timed(
        problem,
        part="experts, fewer",
        steps=steps,
        errors=errors,
        means=means,
        repeats=repeats,
        load=1.0,
        full=full,
    )
    layer_steps = {way: partial(layer_step, layer, problem) for way, layer in layers.items()}
    return parts + timed(
        problem,
        part="layer, fewer",
        steps=layer_steps,
        errors=errors,
        means=means,
        repeats=repeats,
        load=1.0,
        full=full,
    )


def layer_of(problem: Problem, policy: PolicyConfig, target_mean: float) -> MoE:
    """A layer on the problem's own weights; a policy with a budget is calibrated on its inputs."""
    shape = problem.shape
    config = MoEConfig(n_experts=shape.n_experts, d_expert=shape.d_expert, router=RouterConfig(policy=policy))
    layer = MoE(config, d_model=shape.d_model, layer_index=0)
    layer.init_weights(torch.Generator().manual_seed(0))
    layer.experts.w_gate_up_EDF2 = torch.nn.Parameter(problem.w_gate_up_EDF2.detach())
    layer.experts.w_down_EFD = torch.nn.Parameter(problem.w_down_EFD.detach())
    if layer.router.policy.budget is not None:
        layer.router.calibrate(target_mean)
        layer.eval()
    return layer


def layer_step(layer: MoE, problem: Problem) -> list[Tensor]:
    """Forward and backward of the whole layer: the gradients of x and of every parameter."""
    y_TD, routing = layer(problem.x_TD)
    loss = (y_TD * problem.dy_TD).sum() + torch.stack(list(routing.losses.values())).sum()
    return list(torch.autograd.grad(loss, [problem.x_TD, *layer.parameters()]))


def table(
    shape: Shape, *, dtypes: Sequence[str], weight_dtype: str, loads: Sequence[float], ways: Sequence[str], repeats: int
) -> Iterator[Row]:
    for dtype in dtypes:
        # Weights in fp32 are the masters of training; activations in fp32 have no others.
        pair = getattr(torch, dtype), getattr(torch, weight_dtype if dtype == "bfloat16" else "float32")
        for load in loads:
            yield from ways_rows(shape, *pair, load=load, ways=ways, repeats=repeats)
        yield from fewer_experts_rows(shape, *pair, repeats=repeats)


HEADER = (
    f"{'part':15} {'dtype':9} {'load':>5}  {'way':14} {'experts':>7} {'ms':>9} {'of dense':>9} {'of full k':>9}"
    f" {'GFLOP/s':>9} {'error':>9}  of the faster library, turn by turn"
)


def line(row: Row) -> str:
    start = f"{row.part:15} {row.dtype:9} {row.load:4.1f}x  {row.way:14} {row.mean_experts:7.2f} "
    if row.ms is None:
        return f"{start} WRONG: no time for a result that does not agree with the reference {row.error:9.1e}"
    ratios = "".join(f"{'' if ratio is None else f'{ratio:.2f}x':>10}" for ratio in (row.of_dense, row.of_full_k))
    error = "" if row.error is None else f"{row.error:.1e}"
    beside = "" if row.of_libraries is None else "  {:.2f}x ({:.2f} to {:.2f})".format(*row.of_libraries)
    return f"{start}{row.ms:9.1f}{ratios} {row.gflops_per_s:9.0f} {error:>9}{beside}"


def environment(kept_memory: bool, weight_dtype: str, repeats: int) -> dict[str, str | int | bool]:
    """What the times depend on beside the code: columns of the csv."""
    return {
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "freed_memory_kept": kept_memory,
        "weight_dtype_under_bf16": weight_dtype,
        "repeats": repeats,
        "commit": short_commit(),
    }


def write_csv(path: Path, rows: Sequence[Row], columns: dict[str, str | int | bool]) -> None:
    """The rows in full precision, each with what its times depend on."""
    spread = ("of_libraries", "of_libraries_lowest", "of_libraries_highest")
    names = [field.name for field in dataclasses.fields(Row) if field.name != "of_libraries"]
    write_table(
        path,
        [*names, *spread, *columns],
        (
            [*(getattr(row, name) for name in names), *(row.of_libraries or (None,) * 3), *columns.values()]
            for row in rows
        ),
    )

"""`python -m staged_training profile`: where a training step and a decode step spend their time, by part of the model,
and how far that is from what this machine could do.

The parts of a training step are timed alone, forward and backward, on the inputs that a real step gave them; what the
whole step takes beyond their sum is "between": residual sums, Python, waiting for memory. A decode step on a CPU is one
call, which counts for itself.

Legend: B batch, T tokens, D model width.
"""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import tyro
from torch import Tensor, nn

from corpus.prepare import DEFAULT_VOCAB_SIZE
from foundation.command import refuse_unwritable
from foundation.environment import device_name
from foundation.numbers import check_numbers
from foundation.tables import write_rows
from foundation.timing import wall_seconds
from lm.accounting import mixing_flops, model_cost
from lm.bench import matmul_speed
from lm.block import Block
from lm.decode_profile import memory_speed, profile_decode
from lm.model import LanguageModel, mean_and_token_losses
from lm.options import ModelOptions
from moe.freed_memory import keep_freed_memory
from routing.assignments import Assignments
from routing.router import Routing
from staged_training.flops import optimizer_flops
from staged_training.optimizer import OptimizerConfig, build_optimizer, update
from staged_training.staging import StagingConfig
from staged_training.step import clipped_gradients

REST = "between"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """What to look into.

    Attributes:
        model: the network, with fresh weights.
        vocab_size: of the vocabulary that its tokens are drawn from.
        batch_size: rows of a training step.
        seq_len: tokens of a row.
        optimizer: of the training step.
        context: tokens behind which is decoded.
        repeats: timed repetitions, after two that do not count; medians are printed.
        threads: CPU threads; 0 keeps torch's choice.
        csv: also write the rows there.

    Raises:
        ValueError: for a number that nothing can be timed with.
    """

    model: Annotated[ModelOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=ModelOptions)
    vocab_size: int = DEFAULT_VOCAB_SIZE
    batch_size: int = StagingConfig.batch_size
    seq_len: int = StagingConfig.seq_len
    optimizer: Annotated[OptimizerConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=OptimizerConfig
    )
    context: int = 1024
    repeats: int = 9
    threads: int = 0
    csv: Path | None = None

    def __post_init__(self) -> None:
        check_numbers(self, vocab_size=1, batch_size=1, seq_len=1, context=1, repeats=1, threads=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileRow:
    """A part of a step; `floor` is what its work would take at this machine's full speed: FLOPs of products at that of
    a large one, or bytes at that of memory; 0 where neither is known."""

    step: str
    part: str
    seconds: float
    share: float
    floor: float


def profile(config: ProfileConfig) -> list[ProfileRow]:
    """Times both steps and prints the tables; returns their rows."""
    refuse_unwritable("--csv", config.csv)
    if config.threads:
        torch.set_num_threads(config.threads)
    keep_freed_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = config.model.config(config.vocab_size)
    products, memory = matmul_speed(sizes.dtype, device), memory_speed()
    print(
        f"torch {torch.__version__}, {device_name()}, {torch.get_num_threads()} threads, {sizes.dtype}; dense"
        f" products {products / 1e9:.0f} GFLOP/s, memory {memory / 1e9:.1f} GB/s"
    )
    model = LanguageModel(sizes).init_weights(seed=0).to(device)
    rows = training_rows(model, config, products)
    n_tokens, seconds = config.batch_size * config.seq_len, sum(row.seconds for row in rows)
    print(
        f"\ntraining step of {config.batch_size} x {config.seq_len} tokens: {1e3 * seconds:.1f} ms,"
        f" {n_tokens / seconds:,.0f} tokens/s\n{rows_text(rows)}"
    )
    decoded = profile_decode(model, context=config.context)
    parts = decoded.parts | {REST: decoded.seconds - sum(decoded.parts.values())}
    decoding = [row("decode", part, taken, decoded.seconds, 0.0) for part, taken in parts.items()]
    print(
        f"\ndecode step of one sequence behind {config.context:,} tokens, {decoded.experts:.1f} experts per layer:"
        f" {1e3 * decoded.seconds:.2f} ms; reads {decoded.bytes_read / 1e6:.1f} MB, from memory"
        f" {1e3 * decoded.bytes_read / memory:.2f} ms\n{rows_text(decoding)}"
    )
    if config.csv:
        write_rows(config.csv, ProfileRow, rows + decoding)
    return rows + decoding


def row(step: str, part: str, seconds: float, whole: float, floor: float) -> ProfileRow:
    return ProfileRow(step=step, part=part, seconds=seconds, share=seconds / whole, floor=floor)


def training_rows(model: LanguageModel, config: ProfileConfig, products: float) -> list[ProfileRow]:
    """The parts of a training step, and what is between them.

    Args:
        products: FLOP/s of a large product.
    """
    optimizer = build_optimizer(model, config.optimizer, boundary=0)
    shape = (config.batch_size, config.seq_len + 1)
    tokens_BT = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    tokens_BT = tokens_BT.to(model.embedding_VD.device)
    inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:].contiguous()
    model.train()

    experts: tuple[float, ...] = ()

    def gradients() -> None:
        nonlocal experts
        model.begin_step(0, 0)
        experts = clipped_gradients(
            model, optimizer, inputs_BT, targets_BT, boundary=0, clip=config.optimizer.clip
        ).mean_experts

    def optimize() -> None:
        gradients_of = [(p, p.grad) for p in model.parameters()]
        update(optimizer, 1e-4)
        for parameter, gradient in gradients_of:
            parameter.grad = gradient

    with model.its_threads():
        whole = median(gradients, config.repeats)
        # The optimizer moves what gradients it finds.
        updating = median(optimize, config.repeats)
        optimizer.zero_grad()
        seconds = {
            part: sum(median(alone, config.repeats) for alone in parts)
            for part, parts in alone_of(model, inputs_BT, targets_BT).items()
        }
    optimizer.zero_grad()
    seconds["optimizer"] = updating
    seconds[REST] = whole + updating - sum(seconds.values())
    floors = {part: flops / products for part, flops in step_flops(model, config, experts).items()}
    return [row("training", part, taken, whole + updating, floors.get(part, 0.0)) for part, taken in seconds.items()]


def step_flops(model: LanguageModel, config: ProfileConfig, experts: tuple[float, ...]) -> dict[str, float]:
    """Of the products of a training step, by part.

    Args:
        experts: per token, of every block.
    """
    n_tokens = config.batch_size * config.seq_len
    cost = model_cost(model.config, length=config.seq_len, mean_experts=experts)
    flops = {"attention": 0.0, "router": 0.0, "experts": 0.0}
    for index, block in enumerate(model.blocks):
        moe = cast(Block, block).moe
        flops["router"] += 2.0 * moe.router.weight_ED.numel()
        attention = sum(p.numel() for p in cast(Block, block).attention.parameters() if p.dim() >= 2)
        flops["attention"] += 2.0 * attention + mixing_flops(model.config, index, config.seq_len)
    flops["experts"] = cost.flops(head=False) - flops["attention"] - flops["router"]
    flops["head and loss"] = cost.head_flops
    step = {part: 3 * n_tokens * each for part, each in flops.items()}
    return step | {"optimizer": float(optimizer_flops(model.config, config.optimizer))}


def alone_of(model: LanguageModel, inputs_BT: Tensor, targets_BT: Tensor) -> dict[str, list[Callable[[], float]]]:
    """By part, what runs one module forward and backward on the inputs of a real step, and returns its seconds."""
    modules: dict[nn.Module, str] = {model.norm: "norms"}
    for block in cast(list[Block], list(model.blocks)):
        for norm in (block.attention_norm, block.attention_out_norm, block.moe_norm, block.moe_out_norm):
            modules[norm] = "norms"
        modules |= {block.attention: "attention", block.moe.router: "router", block.moe.experts: "experts"}
        if block.moe.shared_expert is not None:
            modules[block.moe.shared_expert] = "experts"
    parts: dict[str, list[Callable[[], float]]] = {part: [] for part in ("attention", "router", "experts", "norms")}
    with recorded(modules) as calls:
        model.run(inputs_BT, 0, targets_BT)
    for module, (args, kwargs) in calls.items():
        parts[modules[module]].append(lambda module=module, args=args, kwargs=kwargs: alone(module, args, kwargs))
    x_BTD = calls[model.norm][0][0]

    def head() -> float:
        x = x_BTD.detach().to(getattr(torch, model.config.dtype)).requires_grad_()
        return wall_seconds(lambda: mean_and_token_losses(x, model.head, targets_BT)[0].backward(), x.device.type)

    return parts | {"head and loss": [head]}


@contextlib.contextmanager
def recorded(modules: dict[nn.Module, str]) -> Iterator[dict[nn.Module, tuple[tuple, dict]]]:
    """What these modules are called with, detached."""
    calls: dict[nn.Module, tuple[tuple, dict]] = {}

    def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
        calls[module] = tuple(map(detached, args)), {name: detached(value) for name, value in kwargs.items()}

    hooks = [module.register_forward_pre_hook(record, with_kwargs=True) for module in modules]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def detached(value: Any) -> Any:
    """The same, as a leaf whose gradient is asked for where it was."""
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(value.requires_grad)
    if isinstance(value, Assignments):
        return dataclasses.replace(value, weight_N=detached(value.weight_N))
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return cast(Any, value)._make(map(detached, value))
    return value


def alone(module: nn.Module, args: tuple, kwargs: dict) -> float:
    """Seconds of one forward and backward."""
    device = next((x.device.type for x in args if isinstance(x, Tensor)), "cpu")

    def forward_and_backward() -> None:
        outputs = differentiable(module(*args, **kwargs))
        if outputs:
            torch.autograd.backward(outputs, [torch.ones_like(each) for each in outputs])

    return wall_seconds(forward_and_backward, device)


def differentiable(output: Any) -> list[Tensor]:
    """What of a module's output has a gradient."""
    if isinstance(output, Tensor):
        return [output] if output.requires_grad else []
    if isinstance(output, Routing):
        return [each for each in (output.assignments.weight_N, *output.losses.values()) if each.requires_grad]
    return [each for part in output for each in differentiable(part)] if isinstance(output, tuple | list) else []


def median(run: Callable[[], Any], repeats: int) -> float:
    """Of what `run` says it took, or of what it took."""
    seconds = []
    for _ in range(2 + repeats):
        began = time.perf_counter()
        said = run()
        seconds.append(said if isinstance(said, float) else time.perf_counter() - began)
    return statistics.median(seconds[2:])


def rows_text(rows: list[ProfileRow]) -> str:
    """For people."""
    lines = [f"{'part':<16}{'ms':>9}{'share':>8}{'floor, ms':>11}{'of floor':>10}"]
    for each in rows:
        floor = f"{1e3 * each.floor:>11.2f}{each.floor / each.seconds:>10.0%}" if each.floor else ""
        lines.append(f"{each.part:<16}{1e3 * each.seconds:>9.2f}{each.share:>8.0%}{floor}")
    return "\n".join(lines)

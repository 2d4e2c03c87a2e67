"""`python -m lm cache`: what a layer plan remembers, in bytes, beside full attention in every layer.

Every number comes from the kinds' own formulas (`attention.cache.cache_bytes`), and stands beside the bytes of a
`HybridCache` of that length, built on the meta device. A state of fixed size costs more than keys and values until the
text is long enough: from which length on it saves anything is said for every kind and for the plan.
"""

import dataclasses
import io
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from attention.cache import HybridCache, cache_bytes
from attention.config import AttentionConfig
from attention.plan import LayerPlan
from foundation.command import refuse_unwritable
from foundation.files import write_bytes
from foundation.numbers import check_numbers
from foundation.serialize import load_json
from foundation.tables import write_rows
from lm.cache_rounding import rounding_text
from lm.config import ModelConfig
from lm.pretrained import CONFIG_FILE, find_model
from lm.published_caches import PUBLISHED

# Attention of a model of today's size, as in the models of `lm.published_caches`.
LARGE = AttentionConfig(n_heads=32, n_kv_heads=8, head_dim=128, window=4096)
SUFFIXES = {"": 1, "k": 2**10, "M": 2**20}
SHORTEST, LONGEST = 256, 2**40


def tokens_of(text: str) -> int:
    """The number of tokens meant by "65536", "64k" (1,024 each) or "1M" (1,024 times as many).

    Raises:
        ValueError: for any other text, or fewer than 1 token.
    """
    match = re.fullmatch(r"(\d{1,12})([kM]?)", text)
    tokens = int(match[1]) * SUFFIXES[match[2]] if match else 0
    if not 1 <= tokens <= LONGEST:
        raise ValueError(f"length: {text!r}; legal: a number of tokens from 1 on, such as 65536, 64k or 1M")
    return tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Shows what layer plans cost in memory.

    Attributes:
        layer_plan: one or several to compare, one letter per layer, see `attention.kinds`.
        n_layers: depth that a plan is repeated to; 0 for as many layers as it has letters.
        attention: heads, widths, window of all layers.
        run: folder of a trained model, or of the run that trained it, whose plan and attention are taken instead.
        length: tokens of a sequence: 65536, or 64k of 1,024 each, or 1M.
        batch_size: sequences side by side.
        dtype: of keys, values, latents and convolution tails; linear states are fp32 whatever it is.
        eight_bits: keys and values in 8 bits, as int8 or fp8 (e4m3), with a scale for each token and head. With a run,
            also how far its answers move by that.
        csv: also write one row per plan and length there, from 256 tokens on.
        plot: draw them into this file (svg, png or pdf).
        published: show instead what published models say of their caches beside what these formulas give.
    """

    layer_plan: tuple[str, ...] = ("SSSFSSSR",)
    n_layers: int = 0
    attention: Annotated[AttentionConfig, tyro.conf.OmitArgPrefixes] = LARGE
    run: Path | None = None
    length: str = "64k"
    batch_size: int = 1
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    eight_bits: Literal["int8", "fp8"] | None = None
    csv: Path | None = None
    plot: Path | None = None
    published: bool = False

    def __post_init__(self) -> None:
        check_numbers(self, n_layers=0, batch_size=1)
        tokens_of(self.length)
        if not self.layer_plan:
            raise ValueError("layer_plan: none given; legal: at least one layer plan, such as SSSFSSSR")
        if self.plot is not None and self.plot.suffix not in (".svg", ".png", ".pdf"):
            raise ValueError(f"plot: {self.plot} is no file of a kind that is drawn; legal: .svg, .png or .pdf")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheRow:
    """The cache of `layers` layers by a plan after `tokens` tokens of each sequence. `bytes_per_token` is what the next
    token adds, `read_bytes` what decoding it reads."""

    plan: str
    layers: int
    tokens: int
    cache_bytes: int
    bytes_per_token: int
    read_bytes: int
    full_attention_bytes: int
    saved: float


class PlanCost:
    """Bytes of one plan at any length.

    Args:
        plan: its letters.
        attentions: one configuration per layer.
        batch_size: sequences side by side.
        dtype: of keys and values.
        eight_bits: they are stored as int8 or fp8; full attention, beside which a plan stands, in `dtype`.
    """

    def __init__(
        self,
        plan: LayerPlan,
        attentions: Sequence[AttentionConfig],
        batch_size: int,
        dtype: torch.dtype,
        eight_bits: str | None = None,
    ) -> None:
        self.plan, self.attentions = plan, attentions
        self.batch_size, self.dtype, self.eight_bits = batch_size, dtype, eight_bits
        self.element_size = dtype.itemsize
        self.full = LayerPlan.parse("F", len(plan.letters))

    def by_layer(self, length: int) -> list[int]:
        return cache_bytes(
            *(self.attentions, self.plan, length, self.batch_size, self.element_size),
            eight_bits=self.eight_bits is not None,
        )

    def total(self, length: int) -> int:
        return sum(self.by_layer(length))

    def full_by_layer(self, length: int) -> list[int]:
        """With full attention in every layer."""
        return cache_bytes(self.attentions, self.full, length, self.batch_size, self.element_size)

    def read(self, length: int) -> list[int]:
        """Bytes that decoding one more token of every sequence reads, by layer."""
        kinds = zip(self.plan.kinds, self.attentions)
        return [
            self.batch_size * kind.read_bytes(config, length, self.element_size, eight_bits=self.eight_bits is not None)
            for kind, config in kinds
        ]

    def row(self, length: int) -> CacheRow:
        total, full = self.total(length), sum(self.full_by_layer(length))
        return CacheRow(
            plan=pattern_of(self.plan.letters),
            layers=len(self.plan.letters),
            tokens=length,
            cache_bytes=total,
            bytes_per_token=self.total(length + 1) - total,
            read_bytes=sum(self.read(length)),
            full_attention_bytes=full,
            saved=1 - total / full,
        )


def pattern_of(letters: Sequence[str]) -> str:
    """The shortest plan that, repeated, has these letters."""
    repeated = (n for n in range(1, len(letters) + 1) if all(x == letters[i % n] for i, x in enumerate(letters)))
    return "".join(letters[: next(repeated)])


def cheaper_from(cost: Callable[[int], int], other: Callable[[int], int]) -> int | None:
    """The shortest length at which `cost` is below `other`; None if there is none. From there on it stays below: what
    a kind keeps per token can only become less."""
    if cost(LONGEST) >= other(LONGEST):
        return None
    low, high = 0, LONGEST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(middle) < other(middle) else (middle, high)
    return high


def show_caches(config: CacheConfig) -> list[CacheRow]:
    """Prints a table per plan; returns the rows that the csv and the figure hold."""
    refuse_unwritable("--csv", config.csv)
    refuse_unwritable("--plot", config.plot)
    if config.published:
        print(published_table())
        return []
    length, rows = tokens_of(config.length), []
    for cost in _costs(config):
        print(plan_table(cost, length))
        lengths = itertools.takewhile(lambda tokens: tokens < length, (SHORTEST << n for n in range(40)))
        rows += [cost.row(tokens) for tokens in (*lengths, length)]
    if config.eight_bits and config.run is not None:
        print(rounding_text(find_model(config.run), config.eight_bits))
    if config.csv:
        write_rows(config.csv, CacheRow, rows)
    if config.plot:
        draw(rows, config.plot)
    return rows


def _costs(config: CacheConfig) -> list[PlanCost]:
    if config.run is not None:
        model = load_json(ModelConfig, find_model(config.run) / CONFIG_FILE)
        plans = [(model.plan, model.attentions)]
    else:
        parsed = [LayerPlan.parse(plan, config.n_layers or max(1, len(plan))) for plan in config.layer_plan]
        plans = [(plan, [config.attention] * len(plan.letters)) for plan in parsed]
    dtype = getattr(torch, config.dtype)
    return [PlanCost(*plan, config.batch_size, dtype, config.eight_bits) for plan in plans]


def plan_table(cost: PlanCost, length: int) -> str:
    """What each kind of layer costs in this plan, and all of them together."""
    letters, row = cost.plan.letters, cost.row(length)
    cache = HybridCache(
        *(cost.attentions, cost.plan, cost.batch_size, length, cost.dtype, "meta"), eight_bits=cost.eight_bits
    )
    dtype = f"{str(cost.dtype)[6:]}{f', keys and values in {cost.eight_bits}' if cost.eight_bits else ''}"
    now, next_token, read = cost.by_layer(length), cost.by_layer(length + 1), cost.read(length)
    lines = [
        f"plan {row.plan}, {len(letters)} layers, {cost.batch_size} x {length:,} tokens, {dtype}",
        f"{'letter':<8}{'layers':>7}{'bytes/token':>13}{'bytes':>17}{'share':>8}{'read/token':>17}  less than F from",
    ]
    for letter in dict.fromkeys(letters):
        places = [place for place, other in enumerate(letters) if other == letter]

        def own(tokens: int, places: list[int] = places) -> int:
            by_layer = cost.by_layer(tokens)
            return sum(by_layer[place] for place in places)

        def full(tokens: int, places: list[int] = places) -> int:
            by_layer = cost.full_by_layer(tokens)
            return sum(by_layer[place] for place in places)

        total = sum(now[place] for place in places)
        lines.append(
            f"{letter:<8}{len(places):>7}{sum(next_token[place] - now[place] for place in places):>13,}{total:>17,}"
            f"{total / row.cache_bytes if row.cache_bytes else 0:>8.1%}{sum(read[place] for place in places):>17,}"
            f"  {_from(cheaper_from(own, full)) if letter != 'F' else ''}".rstrip()
        )
    whole = cheaper_from(cost.total, lambda tokens: sum(cost.full_by_layer(tokens)))
    lines += [
        f"{'all':<8}{len(letters):>7}{row.bytes_per_token:>13,}{row.cache_bytes:>17,}{1:>8.1%}{row.read_bytes:>17,}"
        f"  {_from(whole)}",
        f"full attention in every layer: {row.full_attention_bytes:,} bytes; saved {100 * row.saved:.4f} %"
        f" ({row.cache_bytes / 2**30:.3f} of {row.full_attention_bytes / 2**30:.3f} GiB)",
        f"a HybridCache of this size holds {cache.nbytes():,} bytes",
    ]
    return "\n".join(lines) + "\n"


def _from(length: int | None) -> str:
    if length is None:
        return "no length"
    return "the first token" if length == 1 else f"{length:,} tokens"


def published_table() -> str:
    """What published models say of their caches, and what the formulas give for their sizes."""
    lines = [f"{'model':<15}{'plan':<10}{'tokens':>10}{'computed':>12}  published"]
    for model in PUBLISHED:
        plan = model.plan if len(model.plan) <= 8 else f"{model.plan[:6]}.."
        lines.append(
            f"{model.name:<15}{plan:<10}{model.tokens:>10,}{model.computed():>12}  {model.says}, {model.source}"
        )
        if model.note:
            lines.append(f"{'':<15}{model.note}")
    return "\n".join(lines)


def draw(rows: Sequence[CacheRow], path: Path) -> None:
    """Bytes of every plan over the length, beside full attention in every layer."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "cache",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context({**style, "font.size": 10}):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        plans = list(dict.fromkeys(row.plan for row in rows))
        # Plans of one depth have this line in common.
        whole = {tuple((row.tokens, row.full_attention_bytes) for row in rows if row.plan == plan) for plan in plans}
        for line, label in zip(sorted(whole), itertools.chain(["full attention everywhere"], itertools.repeat(None))):
            axes.plot(*zip(*line), color="#6a7079", linestyle="--", label=label)
        for plan, colour in zip(plans, itertools.cycle(("#0072b2", "#d55e00", "#00896a", "#a8508a", "#b57a00"))):
            own = [(row.tokens, row.cache_bytes) for row in rows if row.plan == plan]
            saved = next(row.saved for row in reversed(rows) if row.plan == plan)
            axes.plot(*zip(*own), color=colour, label=f"{plan}: {saved:.1%} saved at the end")
        axes.set(xscale="log", yscale="log", xlabel="tokens of a sequence", ylabel="bytes of the cache")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda tokens, _: f"{tokens / 2**20:g}M" if tokens >= 2**20 else f"{tokens / 2**10:g}k")
        )
        axes.yaxis.set_major_formatter(FuncFormatter(lambda size, _: _size(size)))
        axes.grid(axis="y", color="#dcdfe4")
        axes.legend(frameon=False)
        drawn = io.BytesIO()
        kind = path.suffix[1:]
        # The same figure, byte for byte, whenever it is drawn.
        figure.savefig(drawn, format=kind, metadata={"Date": None} if kind == "svg" else None)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, drawn.getvalue())


def _size(n_bytes: float) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if n_bytes >= unit:
            return f"{n_bytes / unit:g} {name}"
    return f"{n_bytes:g} B"

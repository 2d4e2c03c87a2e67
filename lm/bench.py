"""`python -m lm bench`: training, prefill and decode speed, as tokens per second and as a share of this machine's dense
matmul speed.

Legend: B batch, T tokens.
"""

import dataclasses
import statistics
from pathlib import Path
from typing import Annotated

import torch
import tyro

from corpus.prepare import DEFAULT_VOCAB_SIZE
from foundation.command import refuse_unwritable
from foundation.environment import device_name
from foundation.numbers import check_numbers
from foundation.tables import write_table
from foundation.timing import median_seconds
from lm.accounting import decode_bytes, model_cost
from lm.decode_profile import DecodeProfile, profile_decode
from lm.generate import generate
from lm.model import LanguageModel, token_losses
from lm.options import ModelOptions
from lm.sampling import SamplingConfig
from moe.freed_memory import keep_freed_memory
from routing.policies.top_k import TopK


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to time.

    Attributes:
        model: the network, with fresh weights.
        vocab_size: of the vocabulary that its tokens are drawn from.
        batch_size: sequences per training step and prefill.
        seq_len: tokens of each.
        decode_tokens: tokens decoded after a prompt of `seq_len` tokens.
        repeats: timed repetitions after 2 warm-ups; medians are printed.
        experts: numbers of experts per token at which decoding is timed once more, by the same weights; the model's
            own, a half and a quarter of it by default.
        threads: CPU threads; 0 keeps torch's choice.
        csv: also write the rows there.

    Raises:
        ValueError: for a number that nothing can be timed with.
    """

    model: Annotated[ModelOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=ModelOptions)
    vocab_size: int = DEFAULT_VOCAB_SIZE
    batch_size: int = 4
    seq_len: int = 256
    decode_tokens: int = 64
    repeats: int = 7
    experts: tuple[int, ...] = ()
    threads: int = 0
    csv: Path | None = None

    def __post_init__(self) -> None:
        # Two steps of a decode do not count, and the median needs one that does.
        check_numbers(self, vocab_size=1, batch_size=1, seq_len=1, decode_tokens=3, repeats=1, experts=1, threads=0)
        if max(self.experts, default=1) > self.model.n_experts:
            raise ValueError(
                f"BenchConfig.experts: {max(self.experts)}, must be at most the model's {self.model.n_experts}"
            )

    @property
    def numbers_of_experts(self) -> tuple[int, ...]:
        """Those to decode with, the first of them what the others are compared with."""
        own = self.model.k
        return tuple(dict.fromkeys(self.experts or (own, max(1, own // 2), max(1, own // 4))))


def bench(config: BenchConfig) -> list[dict[str, str]]:
    """Times the parts and prints the table; returns its rows."""
    refuse_unwritable("--csv", config.csv)
    if config.threads:
        torch.set_num_threads(config.threads)
    # As training does.
    keep_freed_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = config.model.config(config.vocab_size)
    ceiling = matmul_speed(sizes.dtype, device)
    print(
        f"torch {torch.__version__}, {device_name()}, {torch.get_num_threads()} threads, {sizes.dtype}; "
        f"dense matmul {ceiling / 1e9:.0f} GFLOP/s"
    )

    model = LanguageModel(sizes).init_weights(seed=0).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens_BT = torch.randint(
        sizes.vocab_size, (config.batch_size, config.seq_len + 1), generator=torch.Generator().manual_seed(0)
    ).to(device)
    experts: list[float] = []

    def train_step() -> None:
        model.begin_step(0, 0)
        output = model(tokens_BT[:, :-1])
        loss = token_losses(output.logits_BTV, tokens_BT[:, 1:]).mean() + output.routing_loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.after_step()
        experts[:] = [float(routing.statistics.mean_experts) for routing in output.routings]

    @torch.no_grad()
    def prefill() -> None:
        model(tokens_BT[:, :-1])

    n_tokens = config.batch_size * config.seq_len
    seconds = median_seconds(train_step, repeats=config.repeats, device=device)
    cost = model_cost(sizes, length=config.seq_len, mean_experts=tuple(experts))
    rows = [_row("training", n_tokens / seconds, cost.training_flops, ceiling)]
    model.eval()
    rows.append(
        _row(
            "prefill",
            n_tokens / median_seconds(prefill, repeats=config.repeats, device=device),
            cost.forward_flops,
            ceiling,
        )
    )
    steps = list(
        generate(
            model,
            tokens_BT[0, : config.seq_len].tolist(),
            max_new_tokens=config.decode_tokens,
            sampling=SamplingConfig(),
        )
    )
    # The first step is the prefill of the prompt; the second still warms up.
    seconds = statistics.median(step.seconds for step in steps[2:])
    rows.append(_row("decode, 1 sequence", 1 / seconds, cost.forward_flops, ceiling))
    mean_experts = sum(sum(step.experts) for step in steps) / (len(steps) * config.model.n_layers)
    read = decode_bytes(sizes, config.seq_len, mean_experts)
    rows += expert_rows(model, config, ceiling)
    if config.csv:
        write_table(config.csv, list(rows[0]), [list(row.values()) for row in rows])
    print(f"{'':20} {'tokens/s':>10} {'GFLOP/token':>12} {'GFLOP/s':>9} {'of dense':>9}")
    for row in rows:
        print(
            f"{row['part']:20} {row['tokens_per_second']:>10} {row['gflop_per_token']:>12} {row['gflop_per_second']:>9}"
            f" {row['share_of_dense']:>9}"
        )
    print(fewer_experts_text(rows))
    print(f"a decode step reads {read / 1e6:.2f} MB ({read / seconds / 1e9:.2f} GB/s)")
    print("the experts alone, against dense products of the same FLOPs: python -m moe bench")
    return rows


def expert_rows(model: LanguageModel, config: BenchConfig, ceiling: float) -> list[dict[str, str]]:
    """Decoding by the same weights with other numbers of experts per token, in turns: a disturbance hits all alike."""
    seconds: dict[int, list[DecodeProfile]] = {k: [] for k in config.numbers_of_experts}
    for _ in range(config.repeats):
        for k in seconds:
            model.set_policy(TopK(k=k))
            seconds[k].append(profile_decode(model, context=config.seq_len, steps=config.decode_tokens))
    rows = []
    for k, profiles in seconds.items():
        cost = model_cost(model.config, length=config.seq_len, mean_experts=k)
        taken = statistics.median(profile.seconds for profile in profiles)
        rows.append(_row(f"decode, {k} experts", 1 / taken, cost.forward_flops, ceiling))
    return rows


def fewer_experts_text(rows: list[dict[str, str]]) -> str:
    """What fewer experts save of the time of a decoded token, in words."""
    speeds = {row["part"]: float(row["tokens_per_second"]) for row in rows if row["part"].endswith("experts")}
    (own, base), *others = speeds.items()
    ratios = "".join(f", {part.split()[1]} experts {base / speed:.2f}" for part, speed in others)
    return f"time per decoded token: {own.split()[1]} experts 1{ratios}"


def matmul_speed(dtype: str, device: str) -> float:
    """FLOP/s of a large dense product of this dtype: the ceiling that shares are taken of."""
    m, k, n = (8192, 8192, 8192) if device == "cuda" else (2048, 1024, 2048)
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(m, k, dtype=getattr(torch, dtype), device=device, generator=generator)
    b = torch.randn(k, n, dtype=getattr(torch, dtype), device=device, generator=generator)
    return 2 * m * k * n / median_seconds(lambda: a @ b, repeats=9, device=device)


def _row(part: str, tokens_per_second: float, flops_per_token: float, ceiling: float) -> dict[str, str]:
    achieved = tokens_per_second * flops_per_token
    return {
        "part": part,
        "tokens_per_second": f"{tokens_per_second:.0f}",
        "gflop_per_token": f"{flops_per_token / 1e9:.4f}",
        "gflop_per_second": f"{achieved / 1e9:.1f}",
        "share_of_dense": f"{achieved / ceiling:.1%}",
    }

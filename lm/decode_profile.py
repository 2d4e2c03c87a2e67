"""Where a decode step spends its time, by part of the model: counted inside the one call that computes it."""

import dataclasses
import statistics
import time

import torch

from lm.accounting import decode_bytes
from lm.decode_step import STEPS
from lm.generate import PREFILL_TOKENS
from lm.model import LanguageModel
from triton_kernels.native.decode_step import PARTS

# Elements that are read to learn how fast memory is: no cache holds them.
MEMORY_ELEMENTS = 1 << 26


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeProfile:
    """Medians over decode steps.

    Attributes:
        seconds: of a step.
        parts: seconds by part, `native.decode_step.PARTS`; empty where no one call computes the step.
        bytes_read: weights in use and cache, see `lm.accounting.decode_bytes`.
        experts: per token and layer, in the mean.
    """

    seconds: float
    parts: dict[str, float]
    bytes_read: float
    experts: float


@torch.no_grad()
def profile_decode(model: LanguageModel, *, context: int, steps: int = 30) -> DecodeProfile:
    """Decodes `steps` tokens of one sequence behind `context` tokens of no meaning."""
    was_training = model.training
    model.eval()
    cache = model.new_cache(1, context + steps + 2)
    for first in range(0, context, PREFILL_TOKENS):
        tokens_BT = torch.arange(first, min(first + PREFILL_TOKENS, context))[None] % model.config.vocab_size
        model(tokens_BT.to(model.embedding_VD.device), cache, last_only=True)
    laps = torch.zeros(len(PARTS), dtype=torch.float64)
    totals, by_part, experts = [], [], []
    for number in range(steps + 2):
        token = torch.full((1, 1), number % model.config.vocab_size, device=model.embedding_VD.device)
        laps.zero_()
        began = time.perf_counter()
        output = model(token, cache, last_only=True)
        totals.append(time.perf_counter() - began)
        by_part.append(laps.tolist())
        experts += [float(routing.statistics.mean_experts) for routing in output.routings]
        # The first step described the model; from the next one on its call counts.
        if (step := STEPS.get(cache)) is not None:
            step.native.seconds = laps.data_ptr()
    model.train(was_training)
    mean = statistics.fmean(experts)
    medians = [statistics.median(part) for part in zip(*by_part[2:])]
    return DecodeProfile(
        seconds=statistics.median(totals[2:]),
        parts=dict(zip(PARTS, medians)) if any(medians) else {},
        bytes_read=decode_bytes(model.config, context, mean),
        experts=mean,
    )


def memory_speed() -> float:
    """Bytes per second that this process's threads read from memory."""
    x = torch.ones(MEMORY_ELEMENTS)
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        x.sum()
        seconds.append(time.perf_counter() - began)
    return x.nbytes / min(seconds)

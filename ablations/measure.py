"""What is measured on a trained branch, beside its validation loss: costs, experts used, and the same weights under
other budgets.

A policy with a budget (top-p, null experts) is recalibrated to each mean number of experts on text that no stage saw;
any other policy is run as top-k with that k. Budgets change the blocks above the boundary only: the frozen part is the
trunk's and keeps its policy.
"""

import dataclasses
import statistics
from collections.abc import Sequence

from torch import Tensor

from ablations.method import experts_of
from ablations.records import BudgetPoint, Measurements
from corpus.prepare import PreparedCorpus
from lm.accounting import kv_bytes, model_cost
from lm.budget import set_budget
from lm.config import ModelConfig
from lm.evaluate import evaluate
from staged_training.trained_run import TrainedRun

# Shares of the baseline's experts per token: 2, 4, 6, 8, 12 and 16 at top-12.
BUDGETS = (1 / 6, 1 / 3, 1 / 2, 2 / 3, 1, 4 / 3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """What measuring needs to know beside the trained run.

    Attributes:
        baseline, method: models as if nothing were frozen.
        pairing_seed: the branch seed before the method shifted it.
        calibration: what thresholds are set on, as it enters the first block that trains, see `Execution.calibration`.
        budget_batches: how many validation batches each budget is evaluated on, evenly spaced: a text's domains lie one
            after the other.
    """

    baseline: ModelConfig
    method: ModelConfig
    pairing_seed: int
    corpus: PreparedCorpus
    calibration: Tensor
    budget_batches: int


def measure(run: TrainedRun, setting: Measurement) -> Measurements:
    """Measures one trained branch; its model is left with another policy."""
    boundary, length = run.boundary, run.plan.seq_len
    used, composed = run.evaluation.mean_experts, run.model.config
    cost = model_cost(composed, length=length, mean_experts=run.mean_experts[:boundary] + used)
    trained_with = statistics.fmean(run.mean_experts[boundary:])
    histogram = [
        sum(counts)
        for counts in zip(*(padded(block, composed.moe.n_experts + 1) for block in run.evaluation.experts_histogram))
    ]
    while histogram[-1] == 0:
        histogram.pop()
    budgets, budget_tokens, budget_flops = other_budgets(run, setting)
    return Measurements(
        method=run.run.method,
        trunk_seed=run.plan.trunk_seed,
        branch_seed=setting.pairing_seed,
        bits_per_byte=run.evaluation.bits_per_byte,
        mean_experts=statistics.fmean(used),
        asked_experts=experts_of(setting.baseline),
        experts_histogram=tuple(histogram),
        budgets=budgets,
        total_parameters=cost.total_parameters,
        active_parameters=cost.active_parameters,
        forward_flops=cost.forward_flops,
        scratch_flops=model_cost(setting.method, length=length, mean_experts=trained_with).training_flops,
        cache_bytes_4k=kv_bytes(composed, 4096) / 4096,
        cache_bytes_64k=kv_bytes(composed, 65536) / 65536,
        budget_tokens=budget_tokens,
        budget_flops=budget_flops,
    )


def other_budgets(run: TrainedRun, setting: Measurement) -> tuple[tuple[BudgetPoint, ...], int, float]:
    """The weights at each budget, on some of the validation batches; and the tokens of one evaluation and the FLOPs of
    all."""
    boundary, n_batches = run.boundary, min(setting.budget_batches, len(run.valid))
    chosen = [index * len(run.valid) // n_batches for index in range(n_batches)]
    n_bytes = text_bytes(setting.corpus, chosen, run.plan.tokens_per_batch)
    points, tokens, flops = [], 0, 0.0
    for experts in budgets_of(setting.baseline):
        calibration_tokens = set_budget(run.model, experts, setting.calibration, boundary=boundary)
        evaluation = evaluate(run.model, (run.valid[index] for index in chosen), n_bytes=n_bytes, boundary=boundary)
        mean = statistics.fmean(evaluation.mean_experts)
        points.append(BudgetPoint(asked_experts=experts, mean_experts=mean, bits_per_byte=evaluation.bits_per_byte))
        cost = model_cost(
            run.model.config,
            length=run.plan.seq_len,
            mean_experts=run.mean_experts[:boundary] + evaluation.mean_experts,
        )
        tokens = evaluation.tokens
        flops += cost.flops(first=boundary) * (tokens + calibration_tokens)
    return tuple(points), tokens, flops


def budgets_of(baseline: ModelConfig) -> list[int]:
    """Mean experts per token to evaluate at, ascending: the baseline's own, and below and above it."""
    k = experts_of(baseline)
    return sorted({min(max(1, round(share * k)), baseline.moe.n_experts) for share in BUDGETS})


def text_bytes(corpus: PreparedCorpus, batches: Sequence[int], tokens_per_batch: int) -> int:
    """UTF-8 bytes of the tokens predicted in these validation batches."""
    starts = (1 + index * tokens_per_batch for index in batches)
    windows = (corpus.valid.window(start, min(tokens_per_batch, len(corpus.valid) - start)) for start in starts)
    return sum(int(corpus.tokenizer.n_bytes_V[targets].sum()) for targets in windows)


def padded(counts: tuple[int, ...], length: int) -> list[int]:
    return [*counts, *(0 for _ in range(length - len(counts)))]

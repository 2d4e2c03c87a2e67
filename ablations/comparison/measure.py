"""What is measured on a trained branch, beside its validation loss: costs, experts used, and the same weights under
other budgets.

A policy with a budget (top-p, null experts) is recalibrated to each mean number of experts on text that no stage saw;
any other policy is run as top-k with that k. Budgets change the blocks above the boundary only: the frozen part is the
trunk's and keeps its policy.
"""

import dataclasses
import statistics

from torch import Tensor

from ablations.comparison.records import BranchResult, BudgetPoint
from ablations.method import experts_of
from corpus.prepare import PreparedCorpus
from lm.accounting import kv_bytes, model_cost
from lm.budget import set_budget
from lm.config import ModelConfig
from lm.evaluate import evaluate
from staged_training.flops import optimizer_flops
from staged_training.trained_run import TrainedRun
from staged_training.validation import spaced_batches, text_bytes

# Shares of the baseline's experts per token: 2, 4, 6, 8, 12 and 16 at top-12.
BUDGETS = (1 / 6, 1 / 3, 1 / 2, 2 / 3, 1, 4 / 3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasuringContext:
    """What measuring needs to know beside the trained run.

    Attributes:
        corpus: of the run; the bytes of its validation text are counted in it.
        baseline, method: models as if nothing were frozen.
        pairing_seed: the branch seed before the method shifted it.
        calibration: what thresholds are set on, as it enters the first block that trains, see `Execution.calibration`:
            tokens_BT without a boundary, x_BTD with one.
        budget_batches: how many validation batches each budget is evaluated on, see `spaced_batches`.
    """

    baseline: ModelConfig
    method: ModelConfig
    pairing_seed: int
    corpus: PreparedCorpus
    calibration: Tensor
    budget_batches: int


def measure(run: TrainedRun, context: MeasuringContext) -> BranchResult:
    """Measures one trained branch.

    Args:
        run: a branch; its model is left with another policy or another threshold.
        context: the models it is compared as, and the text.
    """
    boundary, length = run.boundary, run.plan.seq_len
    used, composed = run.evaluation.mean_experts, run.model.config
    cost = model_cost(composed, length=length, mean_experts=run.mean_experts[:boundary] + used)
    # From scratch the method would train every block with the experts that its own blocks used here.
    trained_with = statistics.fmean(run.mean_experts[boundary:])
    # Blocks report as many counts as their own most; one list over all blocks ends at the most of any.
    histogram = [
        sum(counts)
        for counts in zip(*(padded(block, composed.moe.n_experts + 1) for block in run.evaluation.experts_histogram))
    ]
    while histogram[-1] == 0:
        histogram.pop()
    budgets, budget_tokens, budget_flops = other_budgets(run, context)
    return BranchResult(
        method=run.run.method,
        trunk_seed=run.plan.trunk_seed,
        branch_seed=context.pairing_seed,
        bits_per_byte=run.evaluation.bits_per_byte,
        mean_experts=statistics.fmean(used),
        asked_experts=asked_experts(context.method, context.baseline),
        experts_histogram=tuple(histogram),
        budgets=budgets,
        total_parameters=cost.total_parameters,
        active_parameters=cost.active_parameters,
        forward_flops=cost.forward_flops,
        scratch_flops=model_cost(context.method, length=length, mean_experts=trained_with).training_flops
        + optimizer_flops(context.method, run.plan.optimizer) / run.plan.tokens_per_batch,
        cache_bytes_4k=kv_bytes(composed, 4096) / 4096,
        cache_bytes_64k=kv_bytes(composed, 65536) / 65536,
        budget_tokens=budget_tokens,
        budget_flops=budget_flops,
    )


def asked_experts(method: ModelConfig, baseline: ModelConfig) -> float:
    """Experts per token, in the mean at evaluation, that a method asks for.

    The table shows how far off that the measured mean is, so it is the method's own number, which need not be the
    baseline's.

    Args:
        method: its model as if nothing were frozen: what it asks for above the boundary.
        baseline: whose number stands in for a policy that asks for none, because its threshold alone decides.
    """
    asked = method.moe.router.policy.evaluated_experts
    return experts_of(baseline) if asked is None else asked


def other_budgets(run: TrainedRun, context: MeasuringContext) -> tuple[tuple[BudgetPoint, ...], int, float]:
    """The trained weights at each budget, on some of the validation batches.

    Returns:
        A point per budget, ascending; the tokens that each was evaluated on; the FLOPs of all of them, calibration
        included.
    """
    boundary, chosen = run.boundary, spaced_batches(context.budget_batches, len(run.valid))
    n_bytes = text_bytes(context.corpus, chosen, run.plan.tokens_per_batch)
    points, tokens, flops = [], 0, 0.0
    # One model in memory serves all budgets: only thresholds change, or for fixed numbers the policy.
    for experts in budgets_of(context.baseline):
        calibration_tokens = set_budget(run.model, experts, context.calibration, boundary=boundary)
        batches = (run.valid[index] for index in chosen)
        evaluation = evaluate(run.model, batches, n_bytes=n_bytes, boundary=boundary, share=run.share)
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


def padded(counts: tuple[int, ...], length: int) -> list[int]:
    """The counts with zeros behind them, up to `length`."""
    return [*counts, *(0 for _ in range(length - len(counts)))]

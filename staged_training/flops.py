"""FLOPs of staged work, counted from the configuration and the experts that tokens really used: what a run's ledger
holds beside its seconds.

Of a network with a share f below the boundary, training above it costs a third of f (forward only) and all of 1 - f
(forward and backward), and nothing of f where activations are stored.
"""

from lm.accounting import model_cost
from lm.config import ModelConfig
from staged_training.plan import Branch, Plan


def trunk_flops(plan: Plan, mean_experts: tuple[float, ...]) -> float:
    """Training the trunk.

    Args:
        mean_experts: per block, over training.
    """
    cost = model_cost(plan.model, length=plan.seq_len, mean_experts=mean_experts)
    return cost.training_flops * plan.trunk.n_batches * plan.tokens_per_batch


def caching_flops(plan: Plan, mean_experts: tuple[float, ...], *, n_batches: int) -> float:
    """Computing the trunk's activations at the boundary of `n_batches` batches."""
    cost = model_cost(plan.model, length=plan.seq_len, mean_experts=mean_experts)
    return cost.flops(last=plan.boundary, head=False) * n_batches * plan.tokens_per_batch


def branch_flops(
    plan: Plan, branch: Branch, mean_experts: tuple[float, ...], *, cached: bool, calibrated: int
) -> float:
    """Training a branch.

    Args:
        mean_experts: per block, over training; below the boundary the trunk's.
        cached: activations are read instead of computed.
        calibrated: tokens that its budget was set on before.
    """
    cost = model_cost(branch.model, length=plan.seq_len, mean_experts=mean_experts)
    # Forward and backward: the gradients of a product are two more of its size.
    flops = 3 * cost.flops(first=branch.boundary)
    if not cached:
        flops += cost.flops(last=branch.boundary, head=False)
    tokens = branch.stage.n_batches * plan.tokens_per_batch
    return flops * tokens + cost.flops(first=branch.boundary) * calibrated


def evaluation_flops(
    plan: Plan,
    model: ModelConfig,
    mean_experts: tuple[float, ...],
    *,
    boundary: int,
    cached: bool,
    n_batches: int,
    calibrated: int,
) -> float:
    """Evaluating a trained model on `n_batches` batches, behind setting its budget on `calibrated` tokens.

    Args:
        mean_experts: per block, over the evaluation; below the boundary the trunk's in training.
        cached: activations are read instead of computed.
    """
    cost = model_cost(model, length=plan.seq_len, mean_experts=mean_experts)
    flops = cost.flops(first=boundary if cached else 0)
    return flops * n_batches * plan.tokens_per_batch + cost.flops(first=boundary) * calibrated

"""FLOPs of staged work, counted from the configuration and the experts that tokens really used: what a run's ledger
holds beside its seconds.

Of a network with a share f below the boundary, training above it costs a third of f (forward only) and all of 1 - f
(forward and backward), and nothing of f where activations are stored. An optimizer's products count, what it does to
each element does not.
"""

import dataclasses

import torch

from lm.accounting import model_cost
from lm.config import ModelConfig
from lm.model import LanguageModel
from staged_training.muon import orthogonalising_flops
from staged_training.optimizer import OptimizerConfig, trained_parameters
from staged_training.packed_matrices import packed_matrices
from staged_training.plan import Branch, Plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """FLOPs of one run before anything has run: of its training, and of evaluating what it trained."""

    training: float
    evaluation: float


def planned(plan: Plan, branch: Branch | None, *, cached: bool) -> Planned:
    """FLOPs of a branch of the plan, or of its trunk."""
    model, boundary = (plan.model, 0) if branch is None else (branch.model, branch.boundary)
    means, tokens = assumed_experts(model), plan.tokens_per_batch
    evaluated = evaluation_flops(
        plan,
        model,
        means,
        boundary=boundary,
        cached=cached,
        n_batches=-(-plan.corpus.valid_tokens // tokens),
        calibrated=plan.n_calibration * tokens,
    )
    if branch is None:
        return Planned(training=trunk_flops(plan, means), evaluation=evaluated)
    return Planned(training=branch_flops(plan, branch, means, cached=cached, calibrated=0), evaluation=evaluated)


def planned_caching(plan: Plan) -> float:
    """FLOPs of storing the trunk's activations for the batches that the branches of a plan train on."""
    return caching_flops(plan, assumed_experts(plan.model), n_batches=len(set(plan.branch_batches().tolist())))


def assumed_experts(model: ModelConfig) -> tuple[float, ...]:
    """Experts per token of every block, as estimates assume them."""
    return tuple(model.block(layer).moe.router.policy.assumed_experts for layer in range(model.n_layers))


def whole_flops(plan: Plan, model: ModelConfig, mean_experts: tuple[float, ...], *, n_batches: int) -> float:
    """Training a whole model, nothing of it frozen, on batches of the plan.

    Args:
        mean_experts: per block, over training.
    """
    cost = model_cost(model, length=plan.seq_len, mean_experts=mean_experts)
    return (cost.training_flops * plan.tokens_per_batch + optimizer_flops(model, plan.optimizer)) * n_batches


def trunk_flops(plan: Plan, mean_experts: tuple[float, ...]) -> float:
    """Training the trunk.

    Args:
        mean_experts: per block, over training.
    """
    return whole_flops(plan, plan.model, mean_experts, n_batches=plan.trunk.n_batches)


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
    per_batch = flops * plan.tokens_per_batch + optimizer_flops(branch.model, plan.optimizer, branch.boundary)
    return per_batch * branch.stage.n_batches + cost.flops(first=branch.boundary) * calibrated


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


def optimizer_flops(model: ModelConfig, optimizer: OptimizerConfig, boundary: int = 0) -> int:
    """Products of one update: of Muon's matrices, orthogonalised once."""
    if optimizer.kind == "adamw":
        return 0
    with torch.device("meta"):
        shapes = LanguageModel(model)
    packings = packed_matrices(shapes, routers=optimizer.muon_routers)
    trained = ((name, weight) for name, weight in trained_parameters(shapes, boundary) if name in packings)
    return sum(orthogonalising_flops(each) for name, weight in trained for each in packings[name].split(weight))

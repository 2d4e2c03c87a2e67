"""Another mean number of experts for the same weights, without training or reloading.

Legend: B batch, T tokens, L variable layers.
"""

import math

import torch
from torch import Tensor

from lm.evaluate import evaluating
from lm.model import LanguageModel
from routing.top_p import TopP


@torch.no_grad()
def set_budget(model: LanguageModel, mean_experts: float, tokens_BT: Tensor, *, boundary: int = 0) -> None:
    """Makes every block from `boundary` on use `mean_experts` per token on average, exactly so on `tokens_BT` (ties aside).

    A policy with a threshold (top-p, null experts) has its threshold calibrated; a policy with a fixed number is replaced by top-p at that mean,
    which any softmax router can run. One forward calibrates all layers, each on what the calibrated layers below give it.

    Args:
        tokens_BT: held-out text to calibrate on; a few thousand tokens.

    Raises:
        ValueError: for a mean out of the policy's reach.
    """
    for block in model.blocks[boundary:]:
        router = block.moe.router
        if not 0 < mean_experts <= router.n_experts:
            raise ValueError(f"mean_experts: {mean_experts}, must lie in (0, {router.n_experts}]")
        if router.policy.budget is None:
            # Twice the mean leaves hard tokens room above it.
            cap = min(router.n_experts, max(TopP.cap, math.ceil(2 * mean_experts)))
            router.set_policy(TopP(target_mean=mean_experts, cap=cap, floor=min(1, int(mean_experts))))
        router.calibrate(mean_experts)
    with evaluating(model):
        model(tokens_BT)


def variable_layers(model: LanguageModel) -> tuple[int, ...]:
    """Blocks whose number of experts depends on the token; all of them where none does."""
    variable = tuple(index for index, block in enumerate(model.blocks) if block.moe.router.policy.budget is not None)
    return variable or tuple(range(len(model.blocks)))


@torch.no_grad()
def experts_per_token(model: LanguageModel, tokens_BT: Tensor, layers: tuple[int, ...]) -> Tensor:
    """Experts used by every token of `tokens_BT`, averaged over `layers`; fp32 [B * T]."""
    with evaluating(model):
        routings = model(tokens_BT).routings
    return torch.stack([routings[layer].assignments.experts_per_token_T() for layer in layers]).float().mean(0)

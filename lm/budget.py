"""Another mean number of experts for the same weights, without training or reloading.

Legend: B batch, T tokens, D model width.
"""

import torch
from torch import Tensor

from lm.evaluate import evaluating
from lm.model import LanguageModel
from routing.top_k import TopK

# Thresholds set on this many tokens hold the mean on other text to about 1 %.
CALIBRATION_TOKENS = 4096


@torch.no_grad()
def set_budget(model: LanguageModel, mean_experts: float, inputs: Tensor, *, boundary: int = 0) -> int:
    """Makes every block from `boundary` on use `mean_experts` per token on average.

    A policy with a threshold (top-p, null experts) has it calibrated, exactly so on `inputs` (ties aside): one forward calibrates all layers, each
    on what the calibrated layers below give it. A policy with a fixed number becomes top-k.

    Args:
        inputs: text to calibrate on, a few thousand tokens_BT, or with a boundary the x_BTD that enters it.

    Returns:
        How many tokens that took to calibrate.

    Raises:
        ValueError: for a mean out of the policy's reach, or one that is no whole number where the number is fixed.
    """
    calibrated = False
    for layer, router in enumerate(model.routers(boundary), start=boundary):
        if not 0 < mean_experts <= router.n_experts:
            raise ValueError(f"mean_experts: {mean_experts}, must lie in (0, {router.n_experts}]")
        if router.policy.budget is not None:
            router.calibrate(mean_experts)
            calibrated = True
        elif mean_experts == int(mean_experts):
            router.set_policy(TopK(k=int(mean_experts)))
        else:
            raise ValueError(f"mean_experts: {mean_experts}, must be a whole number: every token of layer {layer} gets the same number of experts")
    if not calibrated:
        return 0
    with evaluating(model):
        _ = model.suffix(inputs, boundary) if boundary else model(inputs)
    return inputs.shape[0] * inputs.shape[1]


def variable_layers(model: LanguageModel) -> tuple[int, ...]:
    """Blocks whose number of experts depends on the token."""
    return tuple(layer for layer, router in enumerate(model.routers()) if router.policy.budget is not None)


@torch.no_grad()
def experts_per_token(model: LanguageModel, tokens_BT: Tensor, layers: tuple[int, ...]) -> Tensor:
    """Experts used by every token of `tokens_BT`, averaged over `layers`; fp32 [B * T]."""
    with evaluating(model):
        routings = model(tokens_BT).routings
    return torch.stack([routings[layer].assignments.experts_per_token_T() for layer in layers]).float().mean(0)

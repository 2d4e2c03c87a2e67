"""Another mean number of experts for the same weights, without training or reloading.

Legend: B batch, T tokens, D model width, L layers, M budgets.
"""

import contextlib
import copy

import torch
from torch import Tensor

from lm.evaluate import evaluating
from lm.model import LanguageModel
from routing.budget import BudgetController
from routing.levels import levels_of, most_experts, thresholds_of
from routing.policies.top_k import TopK
from routing.router import Router, Routing
from routing.trace import unrecorded

# Thresholds set on this many tokens, from many places of a text, hold the mean on the rest of it to 1 %
# (notes/005-routing.md).
CALIBRATION_TOKENS = 32768


@torch.no_grad()
def set_budget(model: LanguageModel, mean_experts: float, inputs: Tensor, *, boundary: int = 0) -> int:
    """Makes every block from `boundary` on use `mean_experts` per token on average; those of a single expert, a dense
    MLP, stay as they are.

    A policy with a threshold (top-p, null experts) has it calibrated, exactly so on `inputs` (ties aside): one forward
    calibrates all layers, each on what the calibrated layers below give it. A policy with a fixed number becomes top-k.

    Args:
        inputs: text to calibrate on, a few thousand tokens_BT, or with a boundary the x_BTD that enters it.

    Returns:
        How many tokens that took to calibrate.

    Raises:
        ValueError: for a mean out of the policy's reach (no threshold is changed then), or one that is no whole number
            where the number is fixed.
    """
    targets = {}
    for layer, router in enumerate(model.routers(boundary), start=boundary):
        if router.n_experts == 1:
            continue
        if not 0 < mean_experts <= router.n_experts:
            raise ValueError(f"mean_experts: {mean_experts}, must lie in (0, {router.n_experts}]")
        if router.policy.budget is not None:
            targets[layer] = mean_experts
        elif mean_experts == int(mean_experts):
            k = int(mean_experts)
            router.set_policy(router.policy.config.of_number(k) or TopK(k=k))
        else:
            raise ValueError(
                f"mean_experts: {mean_experts}, must be a whole number: every token of layer {layer} gets the same"
                " number of experts"
            )
    return _calibrate(model, targets, inputs, boundary)


def calibrate_to_targets(model: LanguageModel, inputs: Tensor, *, boundary: int = 0) -> int:
    """Sets every threshold from block `boundary` on so that the policy's own target is met exactly on `inputs` (ties
    aside), see `set_budget`.

    Training leaves a threshold where the last steps' noise put it, for text that the weights have learnt from.

    Returns:
        How many tokens that took; 0 where no policy has a target.
    """
    targets = {
        layer: router.policy.config.held_mean
        for layer, router in enumerate(model.routers(boundary), start=boundary)
        if router.policy.config.held_mean is not None
    }
    return _calibrate(model, targets, inputs, boundary)


@torch.no_grad()
def _calibrate(model: LanguageModel, targets: dict[int, float], inputs: Tensor, boundary: int) -> int:
    """One forward that sets the thresholds of the layers in `targets`, all of them or, where one is out of reach,
    none."""
    if not targets:
        return 0
    before = {layer: copy.deepcopy(_budget(model, layer).state_dict()) for layer in targets}
    for layer, target in targets.items():
        model.routers()[layer].calibrate(target)
    try:
        with evaluating(model), unrecorded():
            # Without the head where it can be left out: logits of so many tokens are large.
            _ = model.run(inputs, boundary) if boundary else model.prefix(inputs, model.config.n_layers)
    except ValueError:
        for layer, state in before.items():
            _budget(model, layer).load_state_dict(state)
            _budget(model, layer).calibrate(None)
        raise
    return inputs.shape[0] * inputs.shape[1]


@torch.no_grad()
def budget_table(model: LanguageModel, inputs: Tensor) -> tuple[list[float], Tensor]:
    """Every mean number of experts, in halves, that each layer can hold, and the thresholds that hold it.

    One forward gives them all: the levels of each layer on what the layers below give it under their present budget.
    They are for deciding again on scores that were made under that budget; `set_budget` moves the layers below, too.

    Args:
        inputs: text to calibrate on, tokens_BT, a few thousand.

    Returns:
        The means, rising, and thresholds_ML, fp32: whole numbers only where some layer gives all tokens the same
        number; nothing where one has no budget. Blocks of a single expert always use it.
    """
    levels: dict[int, Tensor] = {}

    def hear(router: Router, given: object, routing: Routing) -> None:
        assert routing.scores is not None
        levels[router.layer_index] = levels_of(router, routing.scores).level_TK

    with contextlib.ExitStack() as hooks, evaluating(model), unrecorded():
        for router in model.routers():
            hooks.callback(router.register_forward_hook(hear).remove)
        model.prefix(inputs, model.config.n_layers)
    choosing = [layer for layer, router in enumerate(model.routers()) if router.n_experts > 1]
    most = min((levels[layer].shape[1] for layer in choosing), default=0)
    means = [half / 2 for half in range(1, 2 * most + 1)]
    threshold_ML = torch.ones(len(means), model.config.n_layers)
    for layer in choosing:
        threshold_ML[:, layer] = thresholds_of(model.routers()[layer], levels[layer], means)
    held_M = ~threshold_ML.isnan().any(dim=1)
    return [mean for mean, held in zip(means, held_M.tolist()) if held], threshold_ML[held_M]


def _budget(model: LanguageModel, layer: int) -> BudgetController:
    budget = model.routers()[layer].policy.budget
    assert budget is not None
    return budget


def variable_layers(model: LanguageModel) -> tuple[int, ...]:
    """Blocks whose number of experts depends on the token."""
    return tuple(layer for layer, router in enumerate(model.routers()) if router.policy.config.varies_by_token)


def counted_layers(model: LanguageModel) -> tuple[int, ...]:
    """Blocks over which a token's number of experts is averaged to be shown: those where it varies, or all that
    choose."""
    choosing = tuple(layer for layer, router in enumerate(model.routers()) if router.n_experts > 1)
    return variable_layers(model) or choosing or tuple(range(model.config.n_layers))


def cap_of(model: LanguageModel) -> int:
    """The most experts of any token in any of these blocks: where a fixed scale of colours ends."""
    return max(most_experts(model.routers()[layer]) for layer in counted_layers(model))


@torch.no_grad()
def experts_per_token(model: LanguageModel, tokens_BT: Tensor, layers: tuple[int, ...]) -> Tensor:
    """Experts used by every token of `tokens_BT`, averaged over `layers`; fp32 [B * T]."""
    with evaluating(model):
        routings = model(tokens_BT).routings
    return torch.stack([routings[layer].assignments.experts_per_token_T() for layer in layers]).float().mean(0)

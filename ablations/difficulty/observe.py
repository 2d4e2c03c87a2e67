"""Runs trained weights under a policy and notes, for every counted token, its loss and the experts that computed it in
each layer.

Legend: W windows, T tokens, N counted tokens, L layers, D model width.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ablations.difficulty.windows import Windows
from lm.evaluate import evaluating
from lm.model import LanguageModel, token_losses
from lm.pretrained import load_pretrained

BATCH_WINDOWS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observed:
    """nats_N: loss of each counted token, fp64. experts_NL: rows computed for it in each layer (physical experts),
    int16."""

    nats_N: np.ndarray
    experts_NL: np.ndarray

    @property
    def mean_experts(self) -> float:
        return float(self.experts_NL.mean())


@torch.no_grad()
def observe(model: LanguageModel, windows: Windows, *, permute_seed: int | None = None) -> Observed:
    """One pass. With `permute_seed` the policies' decisions are dealt out anew among the counted tokens of a batch: the
    same histogram in every layer, for no reason.

    With one dealing for all layers, a token that gets many experts in one layer still does in the others.
    """
    generator = np.random.default_rng(permute_seed)
    counted_WT, nats, experts = windows.counted_WT, [], []
    with evaluating(model):
        for start in range(0, len(windows.tokens_WT), BATCH_WINDOWS):
            rows = slice(start, start + BATCH_WINDOWS)
            # Windows are filled from the left.
            used = slice(int(counted_WT[rows].sum(1).max()))
            counted_T = counted_WT[rows, used].reshape(-1)
            if permute_seed is not None:
                dealt_T = _order(counted_T, generator)
                for router in model.routers():
                    router.policy.dealt_T = dealt_T
            output = model(windows.tokens_WT[rows, used])
            nats.append(
                token_losses(output.logits_BTV, windows.targets_WT[rows, used]).double().numpy().reshape(-1)[counted_T]
            )
            used_TL = torch.stack([routing.assignments.experts_per_token_T() for routing in output.routings], dim=1)
            experts.append(used_TL.numpy()[counted_T].astype(np.int16))
    for router in model.routers():
        router.policy.dealt_T = None
    return Observed(nats_N=np.concatenate(nats), experts_NL=np.concatenate(experts))


def observe_as(
    folder: Path,
    windows: Windows,
    change: Callable[[LanguageModel], object] | None = None,
    permute_seed: int | None = None,
) -> Observed:
    """Loads the model of `folder`, changes its policies, and observes it: weights of a policy are lost when another
    takes its place."""
    model = load_pretrained(folder)
    if change is not None:
        change(model)
    return observe(model, windows, permute_seed=permute_seed)


def _order(counted_T: np.ndarray, generator: np.random.Generator) -> Tensor:
    order_T = np.arange(len(counted_T))
    order_T[counted_T] = generator.permutation(order_T[counted_T])
    return torch.from_numpy(order_T)

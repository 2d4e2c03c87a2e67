"""What another number of experts in one layer gains each token, measured by real forwards; and what is known of a token
before its target.

From an even allocation, one layer at a time gets one number of experts for all tokens, everything else staying as it
is. A token's own loss then holds what its earlier neighbours' change has done to it through attention, too; allocations
made of these gains are therefore run as a whole before anything is said of them.

Legend: B batch, T tokens, N counted tokens, L layers, K numbers of experts, D model width, P features, V vocabulary.
"""

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import nn

from ablations.difficulty.observe import Observed, batches, observe, set_counts
from ablations.difficulty.windows import Windows
from lm.evaluate import evaluating
from lm.model import LanguageModel
from routing.router import Router, Routing

# A router's input that is wider is projected to so many features at random.
MOST_WIDTH = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gains:
    """Measured at an even allocation.

    Attributes:
        ks: numbers of experts that were forced, ascending.
        layers: those with more than one expert; L counts these.
        even: the run that all others are compared with.
        gain_NLK: nats by which the token's loss falls with that number of experts in that layer, float32.
        feature_NLP: of the even run, see `features`; float32.
    """

    ks: np.ndarray
    layers: tuple[int, ...]
    even: Observed
    gain_NLK: np.ndarray
    feature_NLP: np.ndarray

    @property
    def mean_nats_N(self) -> np.ndarray:
        """Each token's loss, averaged over all runs with one layer changed: says how hard it is without the luck of any
        one run that is compared."""
        return self.even.nats_N - self.gain_NLK.mean((1, 2))


def measure_gains(model: LanguageModel, windows: Windows, counts_NL: np.ndarray, ks: np.ndarray) -> Gains:
    """One pass for the features, one for every layer and number.

    Args:
        counts_NL: the even allocation, with a column for every block.
        ks: numbers to force.
    """
    layers = routed_layers(model)
    even = observe(model, windows, counts_NL=counts_NL)
    gain_NLK = np.zeros((len(even.nats_N), len(layers), len(ks)), dtype=np.float32)
    for place, layer in enumerate(layers):
        for column, k in enumerate(ks.tolist()):
            forced_NL = counts_NL.copy()
            forced_NL[:, layer] = k
            gain_NLK[:, place, column] = even.nats_N - observe(model, windows, counts_NL=forced_NL).nats_N
    return Gains(
        ks=ks,
        layers=layers,
        even=even,
        gain_NLK=gain_NLK,
        feature_NLP=features(model, windows, counts_NL, ks),
    )


def routed_layers(model: LanguageModel) -> tuple[int, ...]:
    """Blocks with more than one expert: those where there is something to allocate."""
    return tuple(layer for layer, router in enumerate(model.routers()) if router.n_experts > 1)


@torch.no_grad()
def slots_of(model: LanguageModel) -> dict[int, int]:
    """The most experts that each router with a choice can give a token, by layer."""
    return {
        layer: router.policy.select(
            router.scores(torch.zeros(1, router.d_model, device=router.weight_ED.device))
        ).expert_TK.shape[1]
        for layer, router in enumerate(model.routers())
        if router.n_experts > 1
    }


@torch.no_grad()
def features(model: LanguageModel, windows: Windows, counts_NL: np.ndarray, ks: np.ndarray) -> np.ndarray:
    """What a router could know of a token, and one thing more: its layer's input, the entropy of the router's scores
    and their mass on the k best for each k of a grid, and the entropy of the model's prediction; float32 [N, L, P]."""
    layers = routed_layers(model)
    seen: dict[int, np.ndarray] = {}

    def note(router: nn.Module, arguments: tuple[Any, ...], routing: Routing) -> None:
        assert isinstance(router, Router)
        probs_TE = routing.probs_TE.float()
        mass_TE = probs_TE.sort(dim=-1, descending=True)[0].cumsum(-1)
        entropy_T = -(probs_TE * probs_TE.clamp_min(1e-30).log()).sum(-1)
        parts = [_narrow(arguments[0].float()), mass_TE[:, np.minimum(ks, mass_TE.shape[1]) - 1], entropy_T[:, None]]
        seen[router.layer_index] = torch.cat(parts, dim=1).cpu().numpy()

    hooks = [model.routers()[layer].register_forward_hook(note) for layer in layers]
    found = []
    try:
        with evaluating(model):
            for batch in batches(windows, model):
                set_counts(model, batch, counts_NL)
                log_BTV = model(batch.tokens_BT).logits_BTV.float().log_softmax(-1)
                entropy_T1 = -(log_BTV.exp() * log_BTV).sum(-1).reshape(-1, 1).cpu().numpy()
                rows = [np.concatenate([seen[layer], entropy_T1], axis=1)[batch.counted_T] for layer in layers]
                found.append(np.stack(rows, axis=1).astype(np.float32))
    finally:
        for hook in hooks:
            hook.remove()
        for router in model.routers():
            router.policy.counts_T = None
    return np.concatenate(found)


def _narrow(x_TD: torch.Tensor) -> torch.Tensor:
    width = x_TD.shape[1]
    if width <= MOST_WIDTH:
        return x_TD
    generator = torch.Generator().manual_seed(0)
    return x_TD @ (torch.randn(width, MOST_WIDTH, generator=generator) * width**-0.5).to(x_TD.device)

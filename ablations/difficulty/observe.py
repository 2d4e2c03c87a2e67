"""Runs trained weights under a policy, or under numbers of experts given from outside, and notes, for every counted
token, its loss and the experts that computed it in each layer.

Legend: W windows, T tokens, N counted tokens, L layers, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ablations.difficulty.windows import Windows
from lm.evaluate import evaluating
from lm.model import LanguageModel
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
def observe(model: LanguageModel, windows: Windows, *, counts_NL: np.ndarray | None = None) -> Observed:
    """One pass.

    Args:
        counts_NL: experts of each counted token in each layer, in place of what the policies would choose; which ones
            remains a matter of their ranking. A layer of a single expert has nothing to choose, whatever it says.

    Raises:
        ValueError: where a layer has fewer slots than that, or its policy used another number.
    """
    nats, experts = [], []
    with evaluating(model):
        try:
            for batch in batches(windows, model):
                if counts_NL is not None:
                    set_counts(model, batch, counts_NL)
                output = model(batch.tokens_BT, targets_BT=batch.targets_BT)
                nats.append(output.losses_BT.double().cpu().numpy().reshape(-1)[batch.counted_T])
                used_TL = torch.stack(
                    [routing.assignments.experts_per_token_T() for routing in output.routings], dim=1
                ).cpu()
                experts.append(used_TL.numpy()[batch.counted_T].astype(np.int16))
        finally:
            for router in model.routers():
                router.policy.counts_T = None
    observed = Observed(nats_N=np.concatenate(nats), experts_NL=np.concatenate(experts))
    if counts_NL is not None:
        _refuse_other_counts(model, observed.experts_NL, counts_NL)
    return observed


def observe_as(
    folder: Path,
    windows: Windows,
    change: Callable[[LanguageModel], object] | None = None,
    counts_NL: np.ndarray | None = None,
) -> Observed:
    """Loads the model of `folder`, changes its policies, and observes it: weights of a policy are lost when another
    takes its place."""
    model = load_pretrained(folder)
    if change is not None:
        change(model)
    return observe(model, windows, counts_NL=counts_NL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Some windows at once, without the padding that none of them needs.

    Attributes:
        counted_T: bool, which of the batch's tokens count.
        rows_N: their places among all counted tokens.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    counted_T: np.ndarray
    rows_N: slice


def batches(windows: Windows, model: LanguageModel) -> Iterator[Batch]:
    """All windows, in order, where the model is."""
    counted_WT, done, device = windows.counted_WT, 0, model.embedding_VD.device
    for start in range(0, len(counted_WT), BATCH_WINDOWS):
        rows = slice(start, start + BATCH_WINDOWS)
        # Windows are filled from the left.
        used = slice(int(counted_WT[rows].sum(1).max()))
        counted_T = counted_WT[rows, used].reshape(-1)
        yield Batch(
            tokens_BT=windows.tokens_WT[rows, used].to(device),
            targets_BT=windows.targets_WT[rows, used].contiguous().to(device),
            counted_T=counted_T,
            rows_N=slice(done, done + int(counted_T.sum())),
        )
        done += int(counted_T.sum())


def set_counts(model: LanguageModel, batch: Batch, counts_NL: np.ndarray) -> None:
    """Gives the next forward its numbers of experts; padding, which nobody counts, gets one each."""
    counts_TL = np.ones((len(batch.counted_T), counts_NL.shape[1]), dtype=np.int64)
    counts_TL[batch.counted_T] = counts_NL[batch.rows_N]
    for router, counts_T in zip(model.routers(), counts_TL.T):
        if router.n_experts > 1:
            router.policy.counts_T = torch.from_numpy(counts_T.copy()).to(router.weight_ED.device)


def _refuse_other_counts(model: LanguageModel, used_NL: np.ndarray, counts_NL: np.ndarray) -> None:
    for layer, router in enumerate(model.routers()):
        if router.n_experts > 1 and not np.array_equal(used_NL[:, layer], counts_NL[:, layer]):
            raise ValueError(
                f"layer {layer}: {type(router.policy.config).__name__} used {used_NL[:, layer].sum()} experts where"
                f" {counts_NL[:, layer].sum()} were asked for: it does not take numbers from outside"
            )

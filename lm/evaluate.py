"""Evaluation in bits per UTF-8 byte: how well the model compresses text, comparable across tokenizers and with any
compressor.

bits per byte = (sum of token losses in nats) / (bytes x ln 2). Per-token losses depend on the tokenizer and are not
reported. Legend: B batch, T tokens, N counted tokens, D model width.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from lm.model import IGNORED_TARGET, LanguageModel


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Result of one pass over a text.

    Attributes:
        nats: summed loss.
        tokens, n_bytes: what it covers.
        mean_experts: per evaluated block, real experts per token.
        experts_histogram: per evaluated block, how many tokens used 0, 1, 2, ... experts.
        section_nats: summed loss of each section of the text, where it was evaluated with sections.
    """

    nats: float
    tokens: int
    n_bytes: int
    mean_experts: tuple[float, ...]
    experts_histogram: tuple[tuple[int, ...], ...]
    section_nats: tuple[float, ...] = ()

    @property
    def bits_per_byte(self) -> float:
        return self.nats / (self.n_bytes * math.log(2))


class Share:
    """What of a text's targets this process evaluates: here all. Where several processes each have rows of their own in
    every batch, another class says which, and adds up what all of them found."""

    def own(self, of_target_N: np.ndarray) -> np.ndarray:
        """Of what is known of every counted target, in the order of the text, that of this process's."""
        return of_target_N

    def sums(self, values: Tensor) -> Tensor:
        """Of what each process counted, fp64."""
        return values


WHOLE = Share()


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    n_bytes: int,
    boundary: int = 0,
    section_N: np.ndarray | None = None,
    share: Share = WHOLE,
) -> Evaluation:
    """Runs the model over the batches, as in inference (policies use their evaluation behaviour).

    Args:
        batches: pairs of inputs and targets_BT. Inputs are tokens_BT, or, with a boundary, the x_BTD that enters block
            `boundary`. Targets of `IGNORED_TARGET` are padding: neither their loss nor their experts count.
        n_bytes: UTF-8 bytes of the text behind the targets.
        boundary: first block to run.
        section_N: number of the section that each counted target lies in, in the order of the text, see
            `corpus.sections`.
        share: which targets these batches hold, where several processes evaluate the text together.

    Raises:
        ValueError: when no target counts or `n_bytes` is not positive.
    """
    nats, tokens = 0.0, 0
    section_nats = np.zeros(0 if section_N is None else int(section_N.max()) + 1)
    own_N = None if section_N is None else share.own(section_N)
    layers = range(boundary, model.config.n_layers)
    histograms = [torch.zeros(model.config.block(layer).moe.n_experts + 1, dtype=torch.int64) for layer in layers]
    with evaluating(model):
        for inputs, targets_BT in batches:
            output = model.run(inputs, boundary, targets_BT)
            # Summed in fp64, batch by batch: the total of millions of losses must not depend on their order to the
            # digits we print.
            losses_BT = output.losses_BT.double()
            nats += losses_BT.sum().item()
            counted_T = (targets_BT != IGNORED_TARGET).flatten()
            if own_N is not None:
                losses_N = losses_BT.flatten()[counted_T].cpu().numpy()
                places_N = own_N[tokens : tokens + len(losses_N)]
                section_nats += np.bincount(places_N, weights=losses_N, minlength=len(section_nats))
            tokens += int(counted_T.sum())
            for histogram, routing in zip(histograms, output.routings):
                used_T = routing.assignments.experts_per_token_T()[counted_T]
                histogram += torch.bincount(used_T, minlength=len(histogram)).cpu()
    found = [torch.tensor([nats, tokens], dtype=torch.float64), torch.from_numpy(section_nats), *histograms]
    sums = share.sums(torch.cat([part.double() for part in found])).split([len(part) for part in found])
    (nats, n_tokens), section_sums = sums[0].tolist(), sums[1]
    tokens, histograms = int(n_tokens), [counts.to(torch.int64) for counts in sums[2:]]
    if tokens == 0 or n_bytes <= 0:
        raise ValueError(f"nothing to evaluate: {tokens} tokens, {n_bytes} bytes")
    means = tuple(float((h * torch.arange(len(h))).sum() / h.sum()) for h in histograms)
    return Evaluation(
        nats=nats,
        tokens=tokens,
        n_bytes=n_bytes,
        mean_experts=means,
        experts_histogram=tuple(tuple(_trimmed(h.tolist())) for h in histograms),
        section_nats=tuple(section_sums.tolist()),
    )


@contextlib.contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """Puts the model into evaluation mode, and back; see `LanguageModel.its_threads`."""
    was_training = model.training
    model.eval()
    try:
        with model.its_threads():
            yield
    finally:
        model.train(was_training)


def _trimmed(counts: list[int]) -> list[int]:
    while len(counts) > 1 and counts[-1] == 0:
        counts.pop()
    return counts

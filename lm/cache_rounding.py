"""What keys and values in 8 bits, int8 or fp8, change: a model's own answers beside those it gives from a cache that
rounds nothing.

Legend: B batch, T tokens, V vocabulary, N predicted tokens.
"""

import dataclasses
import math
from pathlib import Path

import torch
from torch import Tensor

from lm.evaluate import evaluating
from lm.model import LanguageModel
from lm.pretrained import load_calibration_tokens, load_pretrained

# Rows of the text that is stored with a model, and the tokens that are read at once: each piece sees what lies in the
# cache.
ROWS, PIECE = 8, 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheRounding:
    """How far answers move.

    Attributes:
        tokens: that were predicted.
        bits_per_token, bits_more: of the text with exact keys and values, and how many more with those in 8 bits.
        divergence: Kullback-Leibler divergence of the next token's distribution from the exact one, nats, mean.
        same: share of tokens whose likeliest successor is the same.
        experts: share of (token, layer) pairs that use as many experts as before.
    """

    tokens: int
    bits_per_token: float
    bits_more: float
    divergence: float
    same: float
    experts: float


@torch.no_grad()
def cache_rounding(model: LanguageModel, tokens_BT: Tensor, eight_bits: str) -> CacheRounding:
    """Reads a text in pieces through both caches.

    Args:
        tokens_BT: at least two tokens a row.
        eight_bits: one of `attention.kv_states.EIGHT_BITS`.
    """
    exact, rounded = (_answers(model, tokens_BT[:, :-1], kept) for kept in (None, eight_bits))
    target_N = tokens_BT[:, 1:].flatten()
    exact_NV, rounded_NV = exact[0], rounded[0]
    nats, nats_rounded = (-log_NV.gather(1, target_N[:, None]).mean().item() for log_NV in (exact_NV, rounded_NV))
    return CacheRounding(
        tokens=len(target_N),
        bits_per_token=nats / math.log(2),
        bits_more=(nats_rounded - nats) / math.log(2),
        divergence=(exact_NV.exp() * (exact_NV - rounded_NV)).sum(dim=-1).mean().item(),
        same=(exact_NV.argmax(dim=-1) == rounded_NV.argmax(dim=-1)).double().mean().item(),
        experts=(exact[1] == rounded[1]).double().mean().item(),
    )


def _answers(model: LanguageModel, tokens_BT: Tensor, eight_bits: str | None) -> tuple[Tensor, Tensor]:
    """Log-probabilities of every next token [N, V], fp64, and experts of each token in each layer."""
    logs, experts = [], []
    with evaluating(model):
        cache = model.new_cache(*tokens_BT.shape, eight_bits=eight_bits)
        for piece_BT in tokens_BT.split(PIECE, dim=1):
            output = model(piece_BT, cache)
            logs.append(output.logits_BTV.double().log_softmax(dim=-1))
            counts = [routing.assignments.experts_per_token_T() for routing in output.routings]
            experts.append(torch.stack(counts, dim=-1).flatten())
    return torch.cat(logs, dim=1).flatten(0, 1), torch.cat(experts)


def rounding_text(folder: Path, eight_bits: str) -> str:
    """What int8 or fp8 changes in a model's answers on the text that is stored with it, as a sentence.

    Raises:
        ValueError: for a model that was saved without text.
    """
    model = load_pretrained(folder)
    tokens_BT = load_calibration_tokens(folder)
    step = max(1, len(tokens_BT) // ROWS)
    found = cache_rounding(model, tokens_BT[::step][:ROWS], eight_bits)
    return (
        f"in {eight_bits}, on {found.tokens:,} tokens of the text stored with the model: {found.bits_more:+.5f} bits"
        f" per token beside {found.bits_per_token:.4f}, divergence {found.divergence:.2e} nats; {found.same:.2%} of the"
        f" likeliest next tokens and {found.experts:.2%} of the numbers of experts are the same\n"
    )

"""Text generation with the hybrid cache: prefill the prompt once, then one token at a time.

Legend: B batch (1 here), T tokens, V vocabulary.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from foundation.numbers import check_numbers
from lm.evaluate import evaluating
from lm.model import LanguageModel

# Tokens of a prompt that are read at once: enough to fill the products, few enough to stay small.
PREFILL_TOKENS = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is drawn.

    Attributes:
        temperature: 0 takes the most likely token.
        top_p: draw from the smallest set of tokens whose probability reaches this; 1 keeps all.
        seed: of the draws.

    Raises:
        ValueError: for a temperature that is negative or not finite, or top_p outside (0, 1].
    """

    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, temperature=0)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"SamplingConfig.top_p: {self.top_p}, must lie in (0, 1]")


@dataclasses.dataclass(frozen=True)
class GeneratedToken:
    """One drawn token.

    Attributes:
        token: id.
        experts: per block, experts used by the position that predicted this token: the work that went into choosing it.
        seconds: of the forward pass behind it; the first one is the prefill of the whole prompt.
        cache_bytes: of the cache, which is allocated once for the whole generation.
    """

    token: int
    experts: tuple[int, ...]
    seconds: float
    cache_bytes: int


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: SamplingConfig,
    stop: int | None = None,
) -> Iterator[GeneratedToken]:
    """Streams tokens that follow `prompt`; ends before the token `stop` (the document boundary) or after
    `max_new_tokens`.

    Args:
        model: put into evaluation mode while this runs.
        prompt: token ids, at least one.
        max_new_tokens: how many at the most.
        sampling: how each is drawn.
        stop: the token that ends the text and is not yielded; None for none.

    Returns:
        An iterator over the tokens, each drawn when it is asked for.

    Raises:
        ValueError: for an empty prompt (give the boundary token to start a document) or a token outside the vocabulary.
    """
    vocab = model.config.vocab_size
    if not prompt:
        raise ValueError("the prompt is empty: start with the boundary token to begin a document")
    if bad := [token for token in prompt if not 0 <= token < vocab]:
        raise ValueError(f"prompt token {bad[0]} lies outside the vocabulary [0, {vocab})")
    device = model.embedding_VD.device
    generator = torch.Generator().manual_seed(sampling.seed)
    # The last token drawn is never fed back.
    cache = model.new_cache(1, max(len(prompt) + max_new_tokens - 1, 1))
    # A long prompt in pieces: memory for its activations then does not grow with it.
    *pieces, inputs_BT = torch.tensor([list(prompt)], device=device).split(PREFILL_TOKENS, dim=1)
    with evaluating(model):
        for _ in range(max_new_tokens):
            started = time.perf_counter()
            while pieces:
                model(pieces.pop(0), cache, last_only=True)
            output = model(inputs_BT, cache, last_only=True)
            logits_V = output.logits_BTV[0, -1].float().cpu()
            seconds = time.perf_counter() - started
            token = sample(logits_V, sampling, generator)
            if token == stop:
                return
            experts = tuple(int(routing.assignments.experts_per_token_T()[-1]) for routing in output.routings)
            yield GeneratedToken(token, experts, seconds, cache.nbytes())
            inputs_BT = torch.tensor([[token]], device=device)


def sample(logits_V: Tensor, sampling: SamplingConfig, generator: torch.Generator) -> int:
    """Draws a token id by temperature and nucleus (arXiv 1904.09751).

    Args:
        logits_V: fp32, on the CPU, where `generator` is.
        sampling: temperature 0 draws nothing and takes the largest logit.
        generator: moved by one draw.
    """
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    probabilities_V, order_V = torch.softmax(logits_V / sampling.temperature, dim=-1).sort(descending=True, stable=True)
    # A token stays while the mass before it is below top_p, so the first one always does.
    mass_before_V = probabilities_V.cumsum(0) - probabilities_V
    kept_V = torch.where(mass_before_V < sampling.top_p, probabilities_V, 0.0)
    return int(order_V[torch.multinomial(kept_V, 1, generator=generator)])

"""Text generation with the hybrid cache: prefill every prompt once, then one token of all texts at a time.

Legend: B texts side by side, T tokens, V vocabulary.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from attention.cache import HybridCache
from lm.evaluate import evaluating
from lm.model import LanguageModel, Output
from lm.sampling import SamplingConfig, sample
from lm.text_budgets import TextBudgets
from routing.router import Routing

# Tokens of a prompt that are read at once: enough to fill the products, few enough to stay small.
PREFILL_TOKENS = 1024


@dataclasses.dataclass(frozen=True)
class GeneratedToken:
    """One drawn token.

    Attributes:
        token: id.
        experts: per block, experts used by the position that predicted this token: the work that went into choosing it.
        seconds: of the forward pass behind it, which all texts share; a text's first one is the prefill of its prompt.
        cache_bytes: of the cache, which is allocated once for the texts that go on.
        text: which of the prompts it follows, from 0.
        nats: minus the log of the model's own probability of the token, before anything that sampling does to it.
        routings: of the forward pass behind it, per block, for all texts and positions that the block routed; the one
            that predicted this token is the `from_end`th of them from the end.
    """

    token: int
    experts: tuple[int, ...]
    seconds: float
    cache_bytes: int
    text: int = 0
    nats: float = 0.0
    routings: tuple[Routing, ...] = dataclasses.field(default=(), repr=False, compare=False)
    from_end: int = 1


def generate(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: SamplingConfig,
    stop: int | None = None,
) -> Iterator[GeneratedToken]:
    """Streams tokens that follow `prompt`; ends before the token `stop` (the document boundary) or after
    `max_new_tokens`. Arguments and errors as of `generate_batch`."""
    return generate_batch(model, [prompt], max_new_tokens=max_new_tokens, sampling=sampling, stop=stop)


@torch.no_grad()
def generate_batch(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: SamplingConfig,
    stop: int | None = None,
    ends: Callable[[int, int], bool] = lambda text, token: False,
    budgets: TextBudgets | None = None,
    eight_bits: str | None = None,
) -> Iterator[GeneratedToken]:
    """Streams tokens that follow each of several prompts of any lengths: a token of every text that goes on, in the
    prompts' order, then the next of each. A text is what it would be alone, with a seed of its own.

    Args:
        model: put into evaluation mode while this runs.
        prompts: token ids, at least one in each.
        max_new_tokens: how many at the most, of each text.
        sampling: how each is drawn.
        stop: the token that ends a text and is not yielded; None for none.
        ends: asked of every drawn token, after whoever iterates has seen it: whether its text (by place) ends there.
        budgets: mean experts per token of each text, which may be changed between two tokens; all as trained without.
        eight_bits: the cache stores keys and values as int8 or fp8, see `attention.kv_states.EightBits`.

    Returns:
        An iterator over the tokens, drawn when they are asked for.

    Raises:
        ValueError: for an empty prompt (give the boundary token to start a document) or a token outside the vocabulary.
    """
    vocab = model.config.vocab_size
    for prompt in prompts:
        if not prompt:
            raise ValueError("the prompt is empty: start with the boundary token to begin a document")
        if bad := [token for token in prompt if not 0 <= token < vocab]:
            raise ValueError(f"prompt token {bad[0]} lies outside the vocabulary [0, {vocab})")
    if not prompts or max_new_tokens == 0:
        return
    using = (lambda places: contextlib.nullcontext()) if budgets is None else budgets.using
    texts = [list(prompt) for prompt in prompts]
    generators = [torch.Generator().manual_seed(sampling.seed + place) for place in range(len(texts))]
    # The last token drawn is never fed back.
    room = max(max(map(len, texts)) + max_new_tokens - 1, 1)
    # Of the texts that go on: their places among the prompts, and what each was drawn last.
    going, last, caches = [], [], []
    with evaluating(model):
        for place, text in enumerate(texts):
            started, cache = time.perf_counter(), model.new_cache(1, room, eight_bits=eight_bits)
            with using([place]):
                output = prefill(model, text, cache)
            logits_1V, experts_1L = _read(output)
            seconds = time.perf_counter() - started
            token = sample(logits_1V[0], sampling, generators[place], text)
            if token == stop:
                continue
            text.append(token)
            yield GeneratedToken(
                *(token, experts_1L[0], seconds, cache.nbytes(), place, _nats(logits_1V[0], token)),
                routings=output.routings,
                from_end=1,
            )
            if not ends(place, token):
                going, last, caches = [*going, place], [*last, token], [*caches, cache]
        if not going:
            return
        cache = caches[0] if len(caches) == 1 else HybridCache.stack(caches)
        del caches
        for _ in range(max_new_tokens - 1):
            started = time.perf_counter()
            with using(going):
                output = model(torch.tensor(last, device=model.embedding_VD.device)[:, None], cache, last_only=True)
            logits_BV, experts_BL = _read(output)
            seconds = time.perf_counter() - started
            kept, drawn = [], []
            for row, place in enumerate(going):
                token = sample(logits_BV[row], sampling, generators[place], texts[place])
                if token == stop:
                    continue
                texts[place].append(token)
                yield GeneratedToken(
                    *(token, experts_BL[row], seconds, cache.nbytes(), place, _nats(logits_BV[row], token)),
                    routings=output.routings,
                    from_end=len(going) - row,
                )
                if not ends(place, token):
                    kept, drawn = [*kept, row], [*drawn, token]
            if not kept:
                return
            if len(kept) < len(going):
                cache.reorder(torch.tensor(kept, device=model.embedding_VD.device))
            going, last = [going[row] for row in kept], drawn


def prefill(model: LanguageModel, tokens: Sequence[int], cache: HybridCache) -> Output:
    """Reads a prompt into an empty cache; the output of its last token.

    A long one is read in pieces: memory for its activations then does not grow with it.
    """
    *pieces, last_1T = torch.tensor([list(tokens)], device=model.embedding_VD.device).split(PREFILL_TOKENS, dim=1)
    for piece_1T in pieces:
        model(piece_1T, cache, last_only=True)
    return model(last_1T, cache, last_only=True)


def _nats(logits_V: Tensor, token: int) -> float:
    return float(logits_V.logsumexp(0) - logits_V[token])


def _read(output: Output) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Logits of the next token [B, V], fp32 on the CPU, and per text the experts that each block used for it."""
    logits_BV = output.logits_BTV[:, -1].float().cpu()
    by_block = [routing.assignments.experts_per_token_T().tolist() for routing in output.routings]
    # The last token of each text; of a prompt, which is alone, the last of all.
    experts_BL = list(zip(*(counts[-len(logits_BV) :] for counts in by_block)))
    return logits_BV, experts_BL

"""A model of ours as lm-evaluation-harness drives it (https://github.com/EleutherAI/lm-evaluation-harness).

A context is read once, whatever number of answers are compared behind it. Contexts of different lengths are not padded:
each is read into a cache of its own, the caches are stacked, and the answers go on side by side, a token at a time, so
that every answer is scored as it would be alone.

Legend: B rows, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from torch import Tensor

from attention.cache import HybridCache
from corpus.tokenizer import Tokenizer
from lm.evaluate import evaluating
from lm.generate import generate_batch, prefill
from lm.model import LanguageModel
from lm.recall import token_nats
from lm.sampling import SamplingConfig, StopStrings

NAME = "hybrid_moe_lab"
# Where a task says nothing.
MOST_GENERATED = 256


@register_model(NAME)
class HarnessModel(TemplateLM):
    """A model and its tokenizer; every text begins with a document's boundary.

    Args:
        batch_size: answers, or texts that are generated, side by side.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, *, batch_size: int) -> None:
        super().__init__()
        self.model, self.own_tokenizer, self.batch_size = model, tokenizer, batch_size

    @property
    def eot_token_id(self) -> int:
        return self.own_tokenizer.boundary_id

    @property
    def tokenizer_name(self) -> str:
        return f"{NAME}-{self.own_tokenizer.hash()[:12]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.own_tokenizer.encode(string)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        """For each (texts, context ids, answer ids): the log-probability of the answer in nats, and whether it is what
        greedy decoding would give."""
        by_context: dict[tuple[int, ...], list[int]] = {}
        for place, (_, context, _) in enumerate(requests):
            by_context.setdefault(tuple(self._begun(context)), []).append(place)
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        waiting: list[tuple[tuple[int, ...], list[int]]] = []
        for context, places in by_context.items():
            waiting.append((context, places))
            if sum(len(places) for _, places in waiting) >= self.batch_size:
                self._score(requests, waiting, found)
                waiting = []
        if waiting:
            self._score(requests, waiting, found)
        return found

    def _begun(self, ids: Sequence[int]) -> list[int]:
        return list(ids) if list(ids[:1]) == [self.eot_token_id] else [self.eot_token_id, *ids]

    @torch.no_grad()
    def _score(
        self,
        requests: Sequence[Any],
        contexts: Sequence[tuple[tuple[int, ...], list[int]]],
        found: list[tuple[float, bool]],
    ) -> None:
        """Writes the scores of the answers behind some contexts into `found`."""
        device = self.model.embedding_VD.device
        caches, firsts, rows = [], [], []
        with evaluating(self.model):
            for context, places in contexts:
                longest = max(len(requests[place][2]) for place in places)
                cache = self.model.new_cache(1, len(context) + max(longest, 1))
                first_V = prefill(self.model, context, cache).logits_BTV[0, -1]
                cache.reorder(torch.zeros(len(places), dtype=torch.int64, device=device))
                caches.append(cache)
                firsts.append(first_V.expand(len(places), -1))
                rows += places
            logits_BV, cache = torch.cat(firsts), caches[0] if len(caches) == 1 else HybridCache.stack(caches)
            at = 0
            while True:
                going = [row for row, place in enumerate(rows) if at < len(requests[place][2])]
                if not going:
                    return
                if len(going) < len(rows):
                    kept_B = torch.tensor(going, device=device)
                    rows, logits_BV = [rows[row] for row in going], logits_BV[kept_B]
                    cache.reorder(kept_B)
                next_B = torch.tensor([requests[place][2][at] for place in rows], device=device)
                self._add(logits_BV, next_B, rows, found)
                at += 1
                if any(at < len(requests[place][2]) for place in rows):
                    logits_BV = self.model(next_B[:, None], cache, last_only=True).logits_BTV[:, -1]

    @staticmethod
    def _add(logits_BV: Tensor, next_B: Tensor, rows: Sequence[int], found: list[tuple[float, bool]]) -> None:
        log_prob_BV = logits_BV.float().log_softmax(dim=-1)
        own_B = log_prob_BV.gather(-1, next_B[:, None])[:, 0].tolist()
        greedy_B = (log_prob_BV.argmax(dim=-1) == next_B).tolist()
        for place, log_prob, is_greedy in zip(rows, own_B, greedy_B):
            total, all_greedy = found[place]
            found[place] = total + log_prob, all_greedy and is_greedy

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability in nats of whole texts, each with everything before as context: no text is cut."""
        found = []
        with evaluating(self.model):
            for request in requests:
                ids = self.own_tokenizer.encode(request.args[0])
                nats = token_nats(self.model, [self.eot_token_id, *ids]).sum() if ids else 0.0
                found.append(-float(nats))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Text behind each context, up to one of the strings that end it."""
        found = [""] * len(requests)
        by_options: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            by_options.setdefault(repr(sorted(request.args[1].items())), []).append(place)
        for places in by_options.values():
            for first in range(0, len(places), self.batch_size):
                own = places[first : first + self.batch_size]
                texts = self._generate([requests[place].args[0] for place in own], requests[own[0]].args[1])
                for place, text in zip(own, texts):
                    found[place] = text
        return found

    def _generate(self, contexts: Sequence[str], options: dict[str, Any]) -> list[str]:
        until = options.get("until") or []
        stops = [StopStrings(tuple([until] if isinstance(until, str) else until)) for _ in contexts]
        decoders = [self.own_tokenizer.stream_decoder() for _ in contexts]
        texts = [""] * len(contexts)
        temperature = float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0
        for step in generate_batch(
            self.model,
            [self._begun(self.tok_encode(context)) for context in contexts],
            max_new_tokens=int(options.get("max_gen_toks", MOST_GENERATED)),
            sampling=SamplingConfig(temperature=temperature),
            stop=self.eot_token_id,
            ends=lambda text, _: stops[text].stopped,
        ):
            texts[step.text] += stops[step.text].push(decoders[step.text].push(step.token))
        return [text + stop.push(decoder.flush()) + stop.flush() for text, stop, decoder in zip(texts, stops, decoders)]

"""The validation text in the course of training: a few batches of it, looked at where a line of progress is printed."""

import time
from collections.abc import Sequence

from corpus.prepare import PreparedCorpus
from lm.evaluate import WHOLE, Share, evaluate
from lm.model import LanguageModel
from staged_training.data import Batches
from staged_training.flops import evaluation_flops
from staged_training.plan import Plan

# Batches that are looked at.
VALIDATED = 2


def looks(n_batches: int, log_every: int) -> int:
    """How often a stage of so many steps looks at them: where an interval of progress ends, and at its own end."""
    return -(-n_batches // log_every)


class Validation:
    """Bits per byte of a few batches, evenly spaced through the validation text, while a model trains.

    Args:
        valid: the whole validation text as it enters block `boundary`.
        share: which rows of it this process has.

    Attributes:
        seconds: that all calls took.
        batches: numbers of those that are looked at.
    """

    def __init__(
        self,
        model: LanguageModel,
        valid: Batches,
        boundary: int,
        corpus: PreparedCorpus,
        plan: Plan,
        share: Share = WHOLE,
    ) -> None:
        self._model, self._valid, self._boundary, self._plan, self._share = model, valid, boundary, plan, share
        self.batches = spaced_batches(VALIDATED, len(valid))
        self._n_bytes = text_bytes(corpus, self.batches, plan.tokens_per_batch)
        self.seconds = 0.0

    def __call__(self) -> float:
        began = time.perf_counter()
        batches = (self._valid[index] for index in self.batches)
        measured = evaluate(self._model, batches, n_bytes=self._n_bytes, boundary=self._boundary, share=self._share)
        self.seconds += time.perf_counter() - began
        return measured.bits_per_byte

    def flops(self, mean_experts: tuple[float, ...], n_looks: int, *, cached: bool) -> float:
        """Of `n_looks` calls.

        Args:
            mean_experts: per block, over training.
            cached: activations at the boundary are read instead of computed.
        """
        return evaluation_flops(
            self._plan,
            self._model.config,
            mean_experts,
            boundary=self._boundary,
            cached=cached,
            n_batches=n_looks * len(self.batches),
            calibrated=0,
        )


def spaced_batches(count: int, n_batches: int) -> list[int]:
    """Numbers of up to `count` of `n_batches` batches, evenly spaced from the first on: a text's domains lie one after
    the other, so its first batches alone would be one domain."""
    count = min(count, n_batches)
    return [index * n_batches // count for index in range(count)]


def text_bytes(corpus: PreparedCorpus, batches: Sequence[int], tokens_per_batch: int) -> int:
    """UTF-8 bytes of the tokens predicted in some validation batches.

    Args:
        batches: their numbers.
        tokens_per_batch: of every batch but the last, which ends with the text.
    """
    # The first token of the text is never predicted, so the targets of batch 0 begin at token 1.
    starts = (1 + index * tokens_per_batch for index in batches)
    windows = (corpus.valid.window(start, min(tokens_per_batch, len(corpus.valid) - start)) for start in starts)
    return sum(int(corpus.tokenizer.n_bytes_V[targets].sum()) for targets in windows)

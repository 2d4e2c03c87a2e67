"""One text that a demo shows, as it is generated or as it was recorded: the words, the experts, the figures."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

import numpy as np

from demos.live import LiveModel
from demos.terminal_view import ENDS, Pane, Summary, shown
from lm.accounting import kv_bytes
from lm.config import ModelConfig
from lm.generate import GeneratedToken
from lm.generation_trace import Recorder, TracedText
from lm.sampling import SamplingConfig


@dataclasses.dataclass
class Measured:
    """What was measured of a text so far, token by token.

    Attributes:
        config: the model's.
        prompt_tokens: before the first generated one.
        counted: layers over which a token's number of experts is averaged.
    """

    config: ModelConfig
    prompt_tokens: int
    counted: Sequence[int]
    text: str = ""
    experts: list[Sequence[int]] = dataclasses.field(default_factory=list)
    means: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    nats: list[float] = dataclasses.field(default_factory=list)

    def add(self, piece: str, experts: Sequence[int], seconds: float, nats: float) -> float:
        """A token; its number of experts."""
        self.text += piece
        self.experts.append(experts)
        self.means.append(statistics.fmean(experts[layer] for layer in self.counted))
        self.seconds.append(seconds)
        self.nats.append(nats)
        return self.means[-1]

    def summary(self, budget: float | None, *, static: bool = False) -> Summary | None:
        """The figures; None before the first token."""
        if not self.means:
            return None
        n_bytes, length = len(self.text.encode()), max(self.prompt_tokens + len(self.means) - 1, 1)
        return Summary(
            tokens=len(self.means),
            mean_experts=statistics.fmean(self.means),
            budget=budget,
            bits_per_byte=sum(self.nats) / math.log(2) / n_bytes if n_bytes else math.nan,
            # The first token's is the prefill of the prompt.
            milliseconds=1000 * statistics.median(self.seconds[1:] or self.seconds),
            cache_bytes=kv_bytes(self.config, length),
            full_attention_bytes=kv_bytes(dataclasses.replace(self.config, layer_plan="F"), length),
            static=static,
        )


class Side:
    """A text that grows in a pane.

    Args:
        live: the model that writes it.
        prompt: that it continues.
        recorder: is told every token, or None.
    """

    def __init__(
        self,
        live: LiveModel,
        prompt: str,
        *,
        title: str,
        max_new_tokens: int,
        sampling: SamplingConfig,
        recorder: Recorder | None = None,
    ) -> None:
        self.live, self.recorder = live, recorder
        ids = live.prompt(prompt)
        self.measured = Measured(live.model.config, len(ids), live.layers)
        self.pane = Pane(title=title, runs=[(prompt, None)], layers={n: [] for n in range(live.model.config.n_layers)})
        self.ended = False
        self._decoder = live.tokenizer.stream_decoder()
        self._stream = live.stream(ids, max_new_tokens=max_new_tokens, sampling=sampling)

    def advance(self) -> tuple[str, float] | None:
        """The next token's text and number of experts; None when the text has ended."""
        step: GeneratedToken | None = None if self.ended else next(self._stream, None)
        if step is None:
            if not self.ended:
                self.end(self.live.end)
            return None
        whole = self._decoder.push(step.token)
        if self.recorder is not None:
            self.recorder.add(step, whole)
        experts = self.measured.add(whole, step.experts, step.seconds, step.nats)
        for layer, count in enumerate(step.experts):
            self.pane.layers[layer].append(count)
        self.pane.runs.append((shown(whole), experts))
        self.pane.summary = self.measured.summary(self.live.budget, static=self.live.static)
        return shown(whole), experts

    def end(self, reason: str) -> None:
        """No more will come."""
        self.ended, self.pane.note = True, ENDS[reason]
        if self.recorder is not None:
            self.recorder.end = reason  # pyright: ignore[reportAttributeAccessIssue]


def recorded_pane(text: TracedText, experts_NL: np.ndarray, config: ModelConfig) -> Pane:
    """The pane of a trace; the numbers of experts are counted again, from the rows on record."""
    counted = text.counted_layers or tuple(range(config.n_layers))
    measured = Measured(config, len(text.prompt), counted)
    pane = Pane(title="", runs=[(text.prompt_text, None)], layers={n: [] for n in range(config.n_layers)})
    for piece, experts, seconds, nats in zip(text.pieces, experts_NL.tolist(), text.seconds, text.nats):
        pane.runs.append((shown(piece), measured.add(piece, experts, seconds, nats)))
        for layer, count in enumerate(experts):
            pane.layers[layer].append(count)
    pane.summary, pane.note = measured.summary(text.budget), ENDS[text.end]
    return pane


def timing_line(sides: Sequence[Side]) -> str:
    """What two texts, a token of each in turn, say about time; empty before there are pairs.

    Only passes for which both have a partner count, and none of the prefills.
    """
    one, other = (side.measured for side in sides)
    pairs = list(zip(one.seconds[1:], other.seconds[1:]))
    if len(pairs) < 2:
        return ""
    medians = [1000 * statistics.median(column) for column in zip(*pairs)]
    ratios = sorted(b / a for a, b in pairs)
    low, high = (ratios[int(share * (len(ratios) - 1))] for share in (0.25, 0.75))
    experts = [statistics.fmean(sum(step) / len(step) for step in side.experts) for side in (one, other)]
    return (
        f"{len(pairs)} pairs in turn: {experts[0]:.1f} experts {medians[0]:.2f} ms, {experts[1]:.1f} experts"
        f" {medians[1]:.2f} ms per token; the second takes {statistics.median(ratios):.2f} times as long"
        f" (quartiles {low:.2f} to {high:.2f})"
    )

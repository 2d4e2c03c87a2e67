"""How the next token is drawn, and where a text is to end.

Legend: V vocabulary.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from foundation.numbers import check_numbers

# Colder than this, logits overflow before anything but the most likely token has a chance.
COLDEST = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is drawn. What is switched on applies in the order of the attributes.

    Attributes:
        repetition_penalty: divides the logit of every token that the text holds already, its prompt included, where it
            is positive, and multiplies it where it is negative (CTRL, arXiv 1909.05858); 1 leaves it alone.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draw from so many of the most likely tokens; 0 keeps all.
        top_p: draw from the smallest set of tokens whose probability reaches this (arXiv 1904.09751); 1 keeps all.
        min_p: draw from tokens at least so probable, as a share of the most likely one's probability (arXiv
            2407.01082); 0 keeps all.
        seed: of the draws. Of several texts side by side each has its own: this one plus its place, from 0.

    Raises:
        ValueError: for a number outside its range, naming it.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, temperature=0, top_k=0)
        if 0 < self.temperature < COLDEST:
            raise ValueError(
                f"SamplingConfig.temperature: {self.temperature}, must be 0, for the most likely token, or at least"
                f" {COLDEST}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"SamplingConfig.top_p: {self.top_p}, must lie in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"SamplingConfig.min_p: {self.min_p}, must lie in [0, 1]")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise ValueError(f"SamplingConfig.repetition_penalty: {self.repetition_penalty}, must lie in [0.01, 100]")


def sample(logits_V: Tensor, sampling: SamplingConfig, generator: torch.Generator, seen: Iterable[int] = ()) -> int:
    """Draws a token id.

    Args:
        logits_V: fp32, on the CPU, where `generator` is.
        sampling: temperature 0 draws nothing and takes the largest logit.
        generator: moved by one draw.
        seen: tokens that the repetition penalty is for.
    """
    if sampling.repetition_penalty != 1:
        penalty, place = sampling.repetition_penalty, torch.tensor(sorted(set(seen)), dtype=torch.int64)
        held = logits_V[place]
        logits_V = logits_V.index_copy(0, place, torch.where(held > 0, held / penalty, held * penalty))
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    probabilities_V, order_V = torch.softmax(logits_V / sampling.temperature, dim=-1).sort(descending=True, stable=True)
    if sampling.top_k:
        probabilities_V[sampling.top_k :] = 0
        probabilities_V = probabilities_V / probabilities_V.sum()
    # A token stays while the mass before it is below top_p, so the first one always does.
    mass_before_V = probabilities_V.cumsum(0) - probabilities_V
    kept_V = torch.where(mass_before_V < sampling.top_p, probabilities_V, 0.0)
    if sampling.min_p:
        kept_V = torch.where(probabilities_V >= sampling.min_p * probabilities_V[0], kept_V, 0.0)
    return int(order_V[torch.multinomial(kept_V, 1, generator=generator)])


class StopStrings:
    """Cuts a growing text before the first of some strings. What may turn out to be the beginning of one is held back.

    Args:
        strings: none of them empty.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        if "" in strings:
            raise ValueError("stop: an empty string, which every text holds; legal: at least one character")
        self.strings = strings
        self.stopped = False
        self._held = ""

    def push(self, piece: str) -> str:
        """The text that is certain now; `stopped` says whether it ends here."""
        if self.stopped:
            return ""
        text = self._held + piece
        places = [place for string in self.strings if (place := text.find(string)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        longest = max((_overlap(text, string) for string in self.strings), default=0)
        self._held = text[len(text) - longest :]
        return text[: len(text) - longest]

    def flush(self) -> str:
        """What was held back, when nothing more comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """Characters at the end of `text` that `string` begins with."""
    longest = min(len(text), len(string) - 1)
    return next((n for n in range(longest, 0, -1) if string.startswith(text[len(text) - n :])), 0)

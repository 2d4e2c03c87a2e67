"""One generation at a time for `demos.serve`: what a page may ask for, and the events that answer it."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Generator
from typing import Any
from urllib.parse import parse_qs

from torch import Tensor

from demos.live import LiveModel
from demos.recording import token_data
from foundation.numbers import check_numbers
from lm.budget import budget_table
from lm.generation_trace import Recorder
from lm.sampling import SamplingConfig

# A prompt travels in the line of a request, of at most 64 KiB: nine letters for a Chinese character.
MOST_TOKENS, MOST_PROMPT = 2048, 5000
FIELDS = ("prompt", "seed", "max_new_tokens", "temperature", "budget", "pace")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """One generation, as a page asks for it.

    Attributes:
        budget: mean experts per token at the start; None as trained.
        pace: tokens per second at the most, so that one can follow and move the budget on the way.

    Raises:
        ValueError: for a number outside its range, naming it.
    """

    prompt: str
    max_new_tokens: int
    budget: float | None
    pace: float
    sampling: SamplingConfig

    def __post_init__(self) -> None:
        check_numbers(self, max_new_tokens=1, budget=0, pace=0.1)
        if self.max_new_tokens > MOST_TOKENS:
            raise ValueError(f"max_new_tokens: {self.max_new_tokens}; legal: 1 to {MOST_TOKENS}")
        if len(self.prompt) > MOST_PROMPT:
            raise ValueError(f"prompt: {len(self.prompt)} characters; legal: at most {MOST_PROMPT}")


def fields_of(query: str) -> dict[str, str]:
    """The fields of a query or a form; of a name that comes twice the last."""
    try:
        return {name: values[-1] for name, values in parse_qs(query, keep_blank_values=True, max_num_fields=20).items()}
    except ValueError as error:
        raise ValueError(f"a query that cannot be read ({error})") from None


def asked(fields: dict[str, str]) -> Asked:
    """A query as a request; what is not given has the form's defaults.

    Raises:
        ValueError: for a field that there is none, or a value that is no legal one, naming it.
    """
    for name in fields:
        if name not in FIELDS:
            raise ValueError(f"unknown field {name!r}; legal: {', '.join(FIELDS)}")
    return Asked(
        prompt=fields.get("prompt", ""),
        max_new_tokens=number(fields, "max_new_tokens", int, 160),
        budget=number(fields, "budget", float, None),
        pace=number(fields, "pace", float, 20.0),
        sampling=SamplingConfig(
            seed=number(fields, "seed", int, 0), temperature=number(fields, "temperature", float, 0.8)
        ),
    )


def number(fields: dict[str, str], name: str, kind: type, default: Any) -> Any:
    text = fields.get(name, "")
    try:
        return kind(text) if text else default
    except ValueError:
        raise ValueError(f"{name}: {text!r} is no {'whole number' if kind is int else 'number'}") from None


class Session:
    """The model, and the one generation that may run.

    Attributes:
        last: what the last one left, for `/page.html`.
    """

    def __init__(self, live: LiveModel) -> None:
        self.live = live
        self.last: Recorder | None = None
        self._tables: dict[float | None, tuple[list[float], Tensor] | None] = {}
        # Held while a generation runs; and while the model computes or its budget changes.
        self.running, self.model = threading.Lock(), threading.Lock()
        self.stopping = threading.Event()

    def table(self) -> tuple[list[float], Tensor] | None:
        """Thresholds of other budgets, as the model is now; None without text to calibrate on."""
        if self.live.budget not in self._tables:
            tokens_BT = self.live.calibration_BT()
            self._tables[self.live.budget] = None if tokens_BT is None else budget_table(self.live.model, tokens_BT)
        return self._tables[self.live.budget]

    def set_budget(self, mean: float | None) -> None:
        """Between two tokens.

        Raises:
            ValueError: as `LiveModel.set_budget`.
        """
        with self.model:
            self.live.set_budget(mean)

    def events(self, wanted: Asked) -> Generator[tuple[str, dict[str, Any]], None, None]:
        """(name, data) of each event of a generation; whoever stops iterating ends it.

        Raises:
            ValueError: before the first event, for a budget or a prompt that cannot be.
        """
        live = self.live
        self.stopping.clear()
        prompt = live.prompt(wanted.prompt)
        self.set_budget(wanted.budget)
        with self.model:
            recorder = Recorder(
                live.model,
                prompt=prompt,
                table=self.table(),
                prompt_text=wanted.prompt,
                source=str(live.folder),
                budget=wanted.budget,
                sampling=wanted.sampling,
            )
        self.last = recorder
        yield "head", {"prompt_tokens": len(prompt)}
        decoder = live.tokenizer.stream_decoder()
        stream = live.stream(prompt, max_new_tokens=wanted.max_new_tokens, sampling=wanted.sampling)
        with contextlib.closing(stream):
            while not self.stopping.is_set():
                due = time.monotonic() + 1 / wanted.pace
                with self.model:
                    step = next(stream, None)
                    if step is None:
                        break
                    piece = decoder.push(step.token)
                    part = recorder.add(step, piece)
                yield "token", token_data(part, text=piece, seconds=step.seconds, nats=step.nats)
                self.stopping.wait(max(due - time.monotonic(), 0))
        recorder.end = "stop" if self.stopping.is_set() else live.end
        yield "done", {"end": recorder.end}

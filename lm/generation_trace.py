"""A generation on record: the text and what it cost, what `RouterTrace` writes of the routers, and the scores behind
every generated token, so that another budget can be tried on them without the model.

    with traced_generation(model, folder, prompt=prompt) as record:
        for step in generate(model, prompt, ...):
            record.add(step, decoder.push(step.token))
    text, experts_NL = read_generation(folder)
    scores = read_scores(folder)

The folder holds the rows (`routing.trace`), `text.json` and `scores.npz`. Forward 0 of the rows is the prefill of the
prompt, each later one a generated token fed back, so generated token n (from 0) was predicted by the last position of
forward n.

Legend: N generated tokens, L layers, K slots per token (the most of any layer), E experts (likewise), M budgets.
"""

import contextlib
import dataclasses
import io
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from foundation.files import write_bytes
from foundation.serialize import load_json, save_json
from lm.budget import budget_table, cap_of, counted_layers
from lm.config import ModelConfig
from lm.generate import GeneratedToken
from lm.model import LanguageModel
from lm.sampling import SamplingConfig
from lm.text_budgets import BudgetChange
from routing.levels import levels_of
from routing.trace import RouterTrace, read_trace

TEXT, SCORES = "text.json", "scores.npz"
End = Literal["length", "document", "stop"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TracedText:
    """Attributes:
    n_layers: of the model; a layer in which a token used no expert has no row of it.
    prompt: token ids that were prefilled.
    tokens: ids that were generated.
    pieces: the text each of them added.
    prompt_text: the prompt as it was given.
    source: folder of the model.
    seconds: of the forward pass behind each token; the first one's is the prefill of the prompt.
    nats: minus the log of the model's probability of each token.
    end: why no more came: the number asked for, the document's end, or a stop string or person.
    counted_layers: those over which a token's number of experts is averaged: where it varies, or all that choose.
    cap: the most experts of any token in any of them.
    budget: mean experts per token asked for at the start; None as trained.
    budget_changes: what was asked for on the way.
    sampling: how tokens were drawn.
    config: the model's.
    """

    n_layers: int
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    pieces: tuple[str, ...]
    prompt_text: str = ""
    source: str = ""
    seconds: tuple[float, ...] = ()
    nats: tuple[float, ...] = ()
    end: End = "length"
    counted_layers: tuple[int, ...] = ()
    cap: int = 0
    budget: float | None = None
    budget_changes: tuple[BudgetChange, ...] = ()
    sampling: SamplingConfig | None = None
    config: ModelConfig | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TracedScores:
    """What each generated token's experts were decided on; padded slots have expert -1, level inf.

    Attributes:
        expert_NLK: int32, by slot, best first.
        level_NLK: float32; a slot was used where it is at or below the threshold (`routing.levels`).
        weight_NLK: float32; 0 for slots that were not used.
        threshold_NL: float32, in force when the token was predicted.
        logit_NLE: float32, of the real experts; -inf behind a layer's last one.
        mean_M, threshold_ML: float32; the thresholds for other budgets, from `lm.budget.budget_table`; empty where the
            trace was made without text to calibrate on.
    """

    expert_NLK: np.ndarray
    level_NLK: np.ndarray
    weight_NLK: np.ndarray
    threshold_NL: np.ndarray
    logit_NLE: np.ndarray
    mean_M: np.ndarray
    threshold_ML: np.ndarray

    @property
    def keep_NLK(self) -> np.ndarray:
        """The slots that were used, bool."""
        return self.level_NLK <= self.threshold_NL[..., None]


ARRAYS = tuple(field.name for field in dataclasses.fields(TracedScores))


class Recorder:
    """Collects a generation as it comes.

    Args:
        model: that generates; its budgets may change on the way.
        prompt: ids that are prefilled.
        table: means and thresholds of other budgets, from `lm.budget.budget_table`; None for none.
        trace: of the same model, which is told the rows, too; it hears the prefill by itself.
        about: further fields of `TracedText`.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        prompt: Sequence[int],
        table: tuple[list[float], Tensor] | None = None,
        trace: RouterTrace | None = None,
        **about: object,
    ) -> None:
        self.model, self.prompt, self.trace, self.about = model, tuple(prompt), trace, about
        self.end: End = "length"
        self.steps: list[tuple[int, str, float, float]] = []
        self._parts: list[dict[str, np.ndarray]] = []
        means, threshold_ML = ([], torch.zeros(0, model.config.n_layers)) if table is None else table
        self.table = {"mean_M": np.array(means, np.float32), "threshold_ML": threshold_ML.numpy()}

    def add(self, step: GeneratedToken, piece: str) -> dict[str, np.ndarray]:
        """Takes a token, before the next one is drawn, and the text that it added; its `token_scores`."""
        if self.trace is not None:
            if self.steps:
                for router, routing in zip(self.model.routers(), step.routings):
                    self.trace.add(router, routing)
            # Behind the prefill nobody listens, so that the clock shows what a step takes that is not recorded.
            self.trace.unhook()
        self.steps.append((step.token, piece, step.seconds, step.nats))
        self._parts.append(token_scores(self.model, step))
        return self._parts[-1]

    def text(self) -> TracedText:
        """All but the scores."""
        tokens, pieces, seconds, nats = zip(*self.steps) if self.steps else ((), (), (), ())
        return TracedText(
            n_layers=self.model.config.n_layers,
            prompt=self.prompt,
            tokens=tokens,
            pieces=pieces,
            seconds=seconds,
            nats=nats,
            end=self.end,
            counted_layers=counted_layers(self.model),
            cap=cap_of(self.model),
            config=self.model.config,
            **self.about,  # pyright: ignore[reportArgumentType]
        )

    def scores(self) -> TracedScores:
        """The scores of all tokens so far."""
        L = self.model.config.n_layers
        empty = {"expert_NLK": (0, L, 1), "level_NLK": (0, L, 1), "weight_NLK": (0, L, 1)}
        empty |= {"threshold_NL": (0, L), "logit_NLE": (0, L, 1)}
        columns = {
            name: _stack([part[name] for part in self._parts], PADDING.get(name, 0)) if self._parts else np.zeros(shape)
            for name, shape in empty.items()
        }
        return TracedScores(**columns, **self.table)


PADDING = {"expert_NLK": -1, "level_NLK": np.inf, "logit_NLE": -np.inf}


def token_scores(model: LanguageModel, step: GeneratedToken) -> dict[str, np.ndarray]:
    """One token's part of `TracedScores`, by name, without the N."""
    layers: dict[str, list[np.ndarray]] = {}
    for router, routing in zip(model.routers(), step.routings):
        assert routing.scores is not None
        position = len(routing.scores.logits_TE) - step.from_end
        levels = levels_of(router, routing.scores.of_token(position))
        found = {
            "expert_NLK": levels.expert_TK[0].int(),
            "level_NLK": levels.level_TK[0].float(),
            "weight_NLK": levels.weight_TK[0].float(),
            "threshold_NL": torch.tensor(levels.threshold),
            "logit_NLE": routing.scores.logits_TE[position].float(),
        }
        for name, value in found.items():
            layers.setdefault(name, []).append(value.cpu().numpy())
    return {name: _stack(values, PADDING.get(name, 0)) for name, values in layers.items()}


def _stack(arrays: Sequence[np.ndarray], padding: float) -> np.ndarray:
    """Stacks arrays whose last axes may differ."""
    if arrays[0].ndim == 0:
        return np.stack(arrays)
    longest = max(array.shape[-1] for array in arrays)
    widths = [[(0, 0)] * (array.ndim - 1) + [(0, longest - array.shape[-1])] for array in arrays]
    return np.stack([np.pad(array, width, constant_values=padding) for array, width in zip(arrays, widths)])


@contextlib.contextmanager
def traced_generation(
    model: LanguageModel,
    folder: Path | None,
    *,
    prompt: Sequence[int],
    calibration_BT: Tensor | None = None,
    **about: object,
) -> Iterator[Recorder | None]:
    """Records the prefill inside the block, and the tokens the block adds to the recorder, one generation; where
    `folder` is None there is none.

    Args:
        calibration_BT: text on which thresholds for other budgets are set, as the model is now; None for none.
        about: further fields of `TracedText`.

    Raises:
        ValueError: for a folder that holds a trace already.
    """
    if folder is None:
        yield None
        return
    trace = RouterTrace(model, folder)
    table = None if calibration_BT is None else budget_table(model, calibration_BT)
    recorder = Recorder(model, prompt=prompt, table=table, trace=trace, **about)
    with trace:
        yield recorder
    write_generation(folder, recorder.text(), recorder.scores())


def write_generation(folder: Path, text: TracedText, scores: TracedScores) -> None:
    """Writes `scores.npz` and, last, `text.json`."""
    packed = io.BytesIO()
    np.savez_compressed(packed, **{name: getattr(scores, name) for name in ARRAYS})
    write_bytes(folder / SCORES, packed.getvalue())
    save_json(folder / TEXT, text)


def read_generation(folder: Path) -> tuple[TracedText, np.ndarray]:
    """The text, and experts_NL: how many experts of each layer the position used that predicted each generated token.

    Raises:
        ValueError: for a folder that holds no trace of a generation.
    """
    rows = read_trace(folder)
    if not (folder / TEXT).exists():
        raise ValueError(f"{folder} holds a trace, but of no generation: {TEXT} is missing")
    text = load_json(TracedText, folder / TEXT)
    # In older traces the forward behind a token that ended the document has rows but no token.
    last = np.where(rows.forward == 0, len(text.prompt) - 1, 0)
    counted = (rows.token == last) & (rows.forward < len(text.tokens))
    experts_NL = np.zeros((len(text.tokens), text.n_layers), np.int64)
    np.add.at(experts_NL, (rows.forward[counted], rows.layer[counted]), 1)
    return text, experts_NL


def read_scores(folder: Path) -> TracedScores:
    """The scores behind the generated tokens.

    Raises:
        ValueError: for a trace that was written without them, or whose file cannot be read.
    """
    path = folder / SCORES
    if not path.is_file():
        raise ValueError(f"{folder} holds no scores ({SCORES}): it was recorded by an older version; record it again")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return TracedScores(**{name: archive[name] for name in ARRAYS})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read ({error}): the file is damaged") from error

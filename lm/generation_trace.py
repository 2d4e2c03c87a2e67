"""A generation on record: the text beside what `RouterTrace` writes of the routers, and both read back as experts per
generated token.

    with traced_generation(model, folder, prompt=prompt) as record:
        for step in generate(model, prompt, ...):
            record(step.token, decoder.push(step.token))
    text, experts_NL = read_generation(folder)

The folder holds the rows (`routing.trace`) and `text.json`. Forward 0 of the rows is the prefill of the prompt, each
later one a generated token fed back, so generated token n (from 0) was predicted by the last position of forward n.

Legend: N generated tokens, L layers.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from foundation.serialize import load_json, save_json
from lm.model import LanguageModel
from routing.trace import RouterTrace, read_trace

TEXT = "text.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TracedText:
    """Attributes:
    n_layers: of the model; a layer in which a token used no expert has no row of it.
    prompt: token ids that were prefilled.
    tokens: ids that were generated.
    pieces: the text each of them added.
    """

    n_layers: int
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    pieces: tuple[str, ...]


@contextlib.contextmanager
def traced_generation(
    model: LanguageModel, folder: Path | None, *, prompt: Sequence[int]
) -> Iterator[Callable[[int, str], None]]:
    """Records the forwards inside the block, and the tokens the block reports; nothing where `folder` is None.

    Raises:
        ValueError: for a folder that holds a trace already.
    """
    tokens: list[int] = []
    pieces: list[str] = []

    def record(token: int, piece: str) -> None:
        tokens.append(token)
        pieces.append(piece)

    with RouterTrace(model, folder) if folder is not None else contextlib.nullcontext():
        yield record
    if folder is not None:
        save_json(
            folder / TEXT,
            TracedText(
                n_layers=model.config.n_layers, prompt=tuple(prompt), tokens=tuple(tokens), pieces=tuple(pieces)
            ),
        )


def read_generation(folder: Path) -> tuple[TracedText, np.ndarray]:
    """The text, and experts_NL: how many experts of each layer the position used that predicted each generated token.

    Raises:
        ValueError: for a folder that holds no trace of a generation.
    """
    rows = read_trace(folder)
    if not (folder / TEXT).exists():
        raise ValueError(f"{folder} holds a trace, but of no generation: {TEXT} is missing")
    text = load_json(TracedText, folder / TEXT)
    # The forward behind a token that ended the document has rows but no token.
    last = np.where(rows.forward == 0, len(text.prompt) - 1, 0)
    counted = (rows.token == last) & (rows.forward < len(text.tokens))
    experts_NL = np.zeros((len(text.tokens), text.n_layers), np.int64)
    np.add.at(experts_NL, (rows.forward[counted], rows.layer[counted]), 1)
    return text, experts_NL

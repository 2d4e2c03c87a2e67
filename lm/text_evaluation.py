"""`python -m lm evaluate`: bits per byte of a text under a model folder, and the experts that it took.

Legend: B batch, T tokens.
"""

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from corpus.readers import Document
from corpus.sources import read_paths, read_standard_library
from corpus.tokenizer import Tokenizer
from foundation.numbers import check_numbers
from lm.budget import CALIBRATION_TOKENS, set_budget
from lm.evaluate import Evaluation, evaluate
from lm.model import IGNORED_TARGET
from lm.pretrained import find_model, load_pretrained, load_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Bits per UTF-8 byte of a text.

    Attributes:
        run: folder of a trained or imported model, or of the run that trained it.
        data: files or folders of text; Python's standard library by default.
        text_field: where the text stands in files of records.
        tokens: how many tokens of it at the most.
        context: tokens of a sequence; each sequence begins without a past.
        batch_size: sequences at once.
        experts: experts per token, in the mean, in every layer; as the model has them by default.
    """

    run: Path
    data: tuple[Path, ...] = ()
    text_field: str = "text"
    tokens: int = 100_000
    context: int = 512
    batch_size: int = 4
    experts: float | None = None

    def __post_init__(self) -> None:
        check_numbers(self, tokens=2, context=1, batch_size=1, experts=0)


def evaluate_text(config: EvaluateConfig) -> Evaluation:
    """See `EvaluateConfig`; prints what it returns.

    Raises:
        ValueError: for a folder without a model, a text without documents, or a number of experts that the model
            cannot have.
    """
    folder = find_model(config.run)
    model = load_pretrained(folder, "cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(folder, model)
    tokens, n_bytes = read_tokens(tokenizer, config.data, config.text_field, config.tokens)
    device = model.embedding_VD.device
    if config.experts is not None:
        rows = max(1, CALIBRATION_TOKENS // config.context)
        calibration_BT = next(batches(tokens, config.context, rows))[0].to(device)
        set_budget(model, config.experts, calibration_BT)
    pairs = batches(tokens, config.context, config.batch_size)
    result = evaluate(model, ((inputs.to(device), targets.to(device)) for inputs, targets in pairs), n_bytes=n_bytes)
    print(
        f"{result.bits_per_byte:.4f} bits per byte ({result.tokens:,} tokens, {result.n_bytes:,} bytes,"
        f" {statistics.fmean(result.mean_experts):.2f} experts per token)"
    )
    return result


def read_tokens(tokenizer: Tokenizer, data: Sequence[Path], text_field: str, most: int) -> tuple[list[int], int]:
    """The first tokens of a text, a boundary before each document, and the UTF-8 bytes of what follows the first.

    Args:
        data: files or folders; Python's standard library where there are none.
        text_field: where the text stands in files of records.
        most: tokens.

    Raises:
        ValueError: where there is no document.
    """
    tokens: list[int] = []
    n_bytes = 0
    for item in read_paths([str(path) for path in data], text_field=text_field) if data else read_standard_library():
        if not isinstance(item, Document):
            continue
        ids = tokenizer.encode(item.text)
        room = most - len(tokens) - 1
        # Of a document that does not fit, the bytes of the tokens that do; of a whole one those of its text, which
        # a tokenizer that normalises does not hold.
        n_bytes += len(item.text.encode()) if len(ids) <= room else int(tokenizer.n_bytes_V[ids[:room]].sum())
        tokens += [tokenizer.boundary_id, *ids[:room]]
        if len(tokens) >= most - 1:
            break
    if len(tokens) < 2:
        raise ValueError(f"data: no usable document in {list(map(str, data))}")
    return tokens, n_bytes


def batches(tokens: Sequence[int], context: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets [B, context] that cover a stream once; the last row is padded with targets that do not
    count."""
    n_rows = -(-(len(tokens) - 1) // context)
    stream = torch.zeros(n_rows * context + 1, dtype=torch.int64)
    stream[: len(tokens)] = torch.tensor(tokens)
    inputs_NT, targets_NT = stream[:-1].view(n_rows, context), stream[1:].clone().view(n_rows, context)
    targets_NT.flatten()[len(tokens) - 1 :] = IGNORED_TARGET
    yield from zip(inputs_NT.split(batch_size), targets_NT.split(batch_size))

"""`python -m ablations scaling noise`: the gradient-noise scale of a trained model, and what it says of batch sizes.

At the noise scale B a batch trains with twice the tokens and twice the steps that are the least possible; a batch of b
tokens needs 1 + b / B times the least tokens and 1 + B / b times the least steps (arXiv 1812.06162, equation 2.11). It
grows as the loss falls: what is measured holds for models of this loss.
"""

import dataclasses
import math
import random
from collections.abc import Iterator

import torch
from torch import Tensor

from ablations.scaling.noise_options import GROUPS, NoiseOptions
from ablations.scaling.noise_scale import Gradients, gradient_of
from corpus.readers import Document
from corpus.sources import read_paths, read_standard_library
from corpus.tokenizer import Tokenizer
from foundation.command import refuse_unwritable
from foundation.tables import write_rows
from lm.model import LanguageModel
from lm.pretrained import find_model, load_pretrained, load_tokenizer

# Documents are drawn from so many times the rows that are needed, so that rows do not all come from a few.
SPARE = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseRow:
    """What `plan --noise` reads.

    Attributes:
        loss: mean of the rows, nats per token.
        params: of the model, all.
        rows_small, rows_large: of the batches; a row has `seq_len` tokens.
        gradient_square, variance: of the mean gradient, and of one row's.
        noise_tokens: the noise scale; low_95 and high_95 bound its interval.
    """

    run: str
    loss: float
    params: int
    seq_len: int
    rows_small: int
    rows_large: int
    gradient_square: float
    variance: float
    noise_tokens: float
    low_95: float
    high_95: float


def noise_command(options: NoiseOptions) -> NoiseRow:
    """Measures, prints and writes.

    Raises:
        ValueError: for no model, and text that is too short.
    """
    refuse_unwritable("--csv", options.csv)
    folder = find_model(options.run)
    model = load_pretrained(folder, "cuda" if torch.cuda.is_available() else "cpu")
    rows_RT = read_rows_of(options, load_tokenizer(folder, model))
    row = measure(model, rows_RT, options)
    print(noise_text(row))
    if options.csv is not None:
        write_rows(options.csv, NoiseRow, [row])
    return row


def measure(model: LanguageModel, rows_RT: Tensor, options: NoiseOptions) -> NoiseRow:
    """Gradients of the loss of the text's own tokens, without the routers' losses: those are of a batch and no mean
    over rows."""
    gradients, losses = Gradients(GROUPS), []
    model.requires_grad_(True).train()
    model.begin_step(0, options.seed)
    with model.its_threads():
        for start in range(0, len(rows_RT) - options.small + 1, options.small):
            batch_BT = rows_RT[start : start + options.small].to(model.embedding_VD.device)
            model.zero_grad(set_to_none=True)
            loss = model(batch_BT[:, :-1], targets_BT=batch_BT[:, 1:]).loss
            loss.backward()
            losses.append(float(loss.detach()))
            gradients.add(gradient_of(model.parameters()))
    found = gradients.noise_scale(options.small)
    return NoiseRow(
        run=str(options.run),
        loss=sum(losses) / len(losses),
        params=sum(parameter.numel() for parameter in model.parameters()),
        seq_len=options.seq_len,
        rows_small=found.rows_small,
        rows_large=found.rows_large,
        gradient_square=found.gradient_square,
        variance=found.variance,
        noise_tokens=found.rows * options.seq_len,
        low_95=found.low_95 * options.seq_len,
        high_95=found.high_95 * options.seq_len,
    )


def read_rows_of(options: NoiseOptions, tokenizer: Tokenizer) -> Tensor:
    """Rows of the text, [R, T + 1] int64, each of one place in it, in an order that the seed draws.

    Raises:
        ValueError: for too little text.
    """
    texts = list(_texts(options))
    generator = random.Random(options.seed)
    generator.shuffle(texts)
    width, ids, rows = options.seq_len + 1, [], []
    for text in texts:
        ids += [tokenizer.boundary_id, *tokenizer.encode(text)]
        rows += [ids[start : start + width] for start in range(0, len(ids) - width + 1, width)]
        ids = ids[len(ids) // width * width :]
        if len(rows) >= SPARE * options.rows:
            break
    if len(rows) < options.rows:
        raise ValueError(
            f"{', '.join(options.data) or 'the standard library'}: {len(rows)} rows of {options.seq_len} tokens, must"
            f" be at least {options.rows} (--rows)"
        )
    generator.shuffle(rows)
    return torch.tensor(rows[: options.rows])


def _texts(options: NoiseOptions) -> Iterator[str]:
    found = read_paths(options.data, text_field=options.text_field) if options.data else read_standard_library()
    return (document.text for document in found if isinstance(document, Document))


def noise_text(row: NoiseRow) -> str:
    """In words."""
    if math.isinf(row.noise_tokens):
        return (
            f"the gradient over {row.rows_large} rows is not told from noise; its square came out as"
            f" {row.gradient_square:.3g}: more --rows are needed"
        )
    lines = [
        f"gradient-noise scale {row.noise_tokens:,.0f} tokens ({row.low_95:,.0f} to {row.high_95:,.0f}) at a loss of"
        f" {row.loss:.4f}, from {row.rows_large} rows of {row.seq_len} tokens"
    ]
    lines += [
        f"a batch of {share * row.noise_tokens:>12,.0f} tokens: {1 + share:.2f} times the least tokens,"
        f" {1 + 1 / share:.1f} times the least steps"
        for share in (0.1, 0.3, 1.0, 3.0)
    ]
    return "\n".join(lines)

"""`python -m lm recall`: what a trained model still knows of a text that grows: needles, and the loss by position.

A needle is a sentence with a name and a number, hidden in other text at some depth; at the end the same sentence is
begun again, and the model says how likely each of several numbers is to follow. That needs no skill in following
instructions, so small models can be asked, and chance is known.

The loss by position is that of documents read from their beginning: whether it goes on falling behind the length that a
model was trained at says whether its layers, positions and states go on working there.

Legend: B texts side by side, T tokens, C choices.
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from corpus.readers import Document
from corpus.sources import read_paths, read_standard_library
from corpus.tokenizer import Tokenizer
from foundation.command import leave_options, refuse_unwritable
from foundation.numbers import check_numbers
from foundation.tables import write_rows
from lm.evaluate import evaluating
from lm.generate import PREFILL_TOKENS, prefill
from lm.model import LanguageModel
from lm.pretrained import find_model, load_pretrained, load_tokenizer

NEEDLES_FILE, POSITIONS_FILE = "needles.csv", "positions.csv"
# Whose numbers are hidden; which of them is drawn.
NAMES = ("Alice", "Bruno", "Clara", "David", "Elena", "Felix", "Greta", "Henry", "Irene", "Jonas", "Karin", "Lucas")
# Positions of the first row of the loss; each further row has twice as many.
FIRST_POSITIONS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecallConfig:
    """Asks a model what it remembers of texts of growing length.

    Attributes:
        run: folder of a trained model, or of the run that trained it.
        data: files or folders of text to hide needles in and to predict; the Python standard library by default.
        text_field: key or column that holds the text.
        lengths: tokens of the texts with a needle; the longest is also how far the loss is followed.
        depths: where needles lie, from 0 (the beginning) to 1 (the end).
        needles: texts for each length and depth.
        choices: numbers of which one is right, so that guessing is right once in so many.
        documents: how many the loss is averaged over, the first that are long enough.
        trained_length: tokens of the texts that the model was trained on, if known: rows behind it are marked.
        seed: of names, numbers and places.
        out: folder for both tables as csv.

    Raises:
        ValueError: for a number outside its range.
    """

    run: Path
    data: tuple[str, ...] = ()
    text_field: str = "text"
    lengths: tuple[int, ...] = (128, 256, 512, 1024)
    depths: tuple[float, ...] = (0.0, 0.5, 0.9)
    needles: int = 10
    choices: int = 10
    documents: int = 20
    trained_length: int | None = None
    seed: int = 0
    out: Path | None = None

    def __post_init__(self) -> None:
        check_numbers(self, lengths=64, needles=1, choices=2, documents=1, trained_length=1, seed=0, depths=0)
        if not self.lengths:
            raise ValueError("RecallConfig.lengths: empty, must have at least one")
        if any(depth > 1 for depth in self.depths):
            raise ValueError(f"RecallConfig.depths: {self.depths}, must be at most 1")
        if self.choices > 9000:
            raise ValueError(f"RecallConfig.choices: {self.choices}, must be at most 9000: there are no more numbers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleRow:
    """Needles at one length and depth.

    Attributes:
        accuracy: share of needles whose number is the likeliest of the choices; `chance` is that of guessing.
        margin: nats by which the right number is likelier than the others are in the mean; 0 where nothing is
            remembered.
        standard_error: of the margin.
    """

    length: int
    depth: float
    needles: int
    accuracy: float
    chance: float
    margin: float
    standard_error: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class PositionRow:
    """The loss of the tokens at positions `first` to `last`, from 1 behind the boundary.

    Attributes:
        bits_per_byte: of all these tokens together.
        standard_error: over documents.
        beyond: 1 where the positions lie behind the trained length, 0 where not or where that is not known.
    """

    first: int
    last: int
    documents: int
    bits_per_byte: float
    standard_error: float
    beyond: int


@torch.no_grad()
def recall(config: RecallConfig) -> tuple[list[NeedleRow], list[PositionRow]]:
    """Measures, prints both tables, and returns their rows.

    Raises:
        ValueError: for text with too few tokens, or without a document as long as the longest length.
    """
    refuse_unwritable("--out", config.out, folder=True)
    folder = find_model(config.run)
    model = load_pretrained(folder, "cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(folder, model)
    items = read_paths(config.data, text_field=config.text_field) if config.data else read_standard_library()
    documents = list(_long_documents(config, tokenizer, (item.text for item in items if isinstance(item, Document))))
    print(
        f"plan {''.join(model.config.plan.letters)}, {len(documents)} documents of at least {max(config.lengths):,}"
        " tokens"
    )
    with evaluating(model):
        print(f"{'tokens':>8} {'depth':>6} {'found':>7} {'chance':>7} {'margin, nats':>18}")
        needles = []
        for row in needle_rows(config, model, tokenizer, documents):
            needles.append(row)
            print(
                f"{row.length:>8,} {row.depth:>6.2f} {row.accuracy:>7.1%} {row.chance:>7.1%}"
                f" {row.margin:>9.3f} ± {row.standard_error:.3f}",
                flush=True,
            )
        print(f"\n{'positions':>17} {'bits per byte':>18}")
        positions = position_rows(config, model, tokenizer, documents)
        for row in positions:
            print(
                f"{f'{row.first:,} to {row.last:,}':>17} {row.bits_per_byte:>9.4f} ± {row.standard_error:.4f}"
                + ("  beyond the trained length" if row.beyond else "")
            )
    if config.out is not None:
        leave_options(config.out)
        write_rows(config.out / NEEDLES_FILE, NeedleRow, needles)
        write_rows(config.out / POSITIONS_FILE, PositionRow, positions)
    return needles, positions


def _long_documents(config: RecallConfig, tokenizer: Tokenizer, texts: Iterator[str]) -> Iterator[list[int]]:
    """The first documents that are as long as the longest length, in tokens and cut there."""
    longest, found, most = max(config.lengths), 0, 0
    for text in texts:
        # No token is less than a byte: shorter texts need not be cut into tokens.
        ids = tokenizer.encode(text) if len(text.encode()) >= longest else []
        most = max(most, len(ids))
        if len(ids) >= longest:
            yield ids[:longest]
            if (found := found + 1) == config.documents:
                return
    if not found:
        raise ValueError(
            f"RecallConfig.lengths: no document has {longest:,} tokens, the longest that might has {most:,}; legal:"
            " shorter lengths, or text with longer documents in --data"
        )


def needle_rows(
    config: RecallConfig, model: LanguageModel, tokenizer: Tokenizer, documents: Sequence[Sequence[int]]
) -> Iterator[NeedleRow]:
    """A row per length and depth, as it is measured."""
    generator = np.random.default_rng(config.seed)
    hay = list(itertools.chain.from_iterable(documents))
    for length, depth in itertools.product(config.lengths, config.depths):
        found, margins = 0, []
        for _ in range(config.needles):
            name = NAMES[int(generator.integers(len(NAMES)))]
            numbers = [str(number) for number in generator.choice(9000, config.choices, replace=False) + 1000]
            begun, endings = _continuations(tokenizer, f"\nThe secret number of {name} is", numbers)
            needle = tokenizer.encode(f"\nThe secret number of {name} is {numbers[0]}.\n")
            n_hay = length - 1 - len(needle) - len(begun)
            if n_hay < 0:
                raise ValueError(
                    f"RecallConfig.lengths: {length}, must be at least {1 + len(needle) + len(begun)}: the needle and"
                    " the question take as many tokens"
                )
            start = int(generator.integers(len(hay) - n_hay + 1))
            before = round(depth * n_hay)
            around = hay[start : start + n_hay]
            prompt = [tokenizer.boundary_id, *around[:before], *needle, *around[before:], *begun]
            log_prob_C = continuation_log_probs(model, prompt, endings)
            found += int(log_prob_C.argmax() == 0)
            margins.append(float(log_prob_C[0] - log_prob_C[1:].mean()))
        yield NeedleRow(
            length=length,
            depth=depth,
            needles=config.needles,
            accuracy=found / config.needles,
            chance=1 / config.choices,
            margin=statistics.fmean(margins),
            standard_error=_standard_error(margins),
        )


def _continuations(tokenizer: Tokenizer, begun: str, endings: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """What all the sentences have in common, and how each goes on, in tokens: where a token reaches across the end of
    `begun` it belongs to the endings."""
    whole = [tokenizer.encode(f"{begun} {ending}") for ending in endings]
    common = 0
    while len({tuple(ids[: common + 1]) for ids in whole}) == 1:
        common += 1
    return whole[0][:common], [ids[common:] for ids in whole]


@torch.no_grad()
def continuation_log_probs(model: LanguageModel, prompt: Sequence[int], endings: Sequence[Sequence[int]]) -> Tensor:
    """Log-probabilities in nats of several endings of one prompt, which is read once; fp32 [C] on the CPU.

    Args:
        prompt: at least one token.
        endings: at least one token each; they may have different lengths.
    """
    longest = max(map(len, endings))
    device = model.embedding_VD.device
    cache = model.new_cache(1, len(prompt) + max(longest - 1, 1))
    first_V = prefill(model, prompt, cache).logits_BTV[0, -1].float().log_softmax(dim=-1)
    ids_CT = torch.tensor([[*ending, *[0] * (longest - len(ending))] for ending in endings], device=device)
    log_prob_C = first_V[ids_CT[:, 0]]
    if longest > 1:
        cache.reorder(torch.zeros(len(endings), dtype=torch.int64, device=device))
        # What an ending is filled up with comes behind it, and nothing looks ahead.
        log_prob_CTV = model(ids_CT[:, :-1], cache).logits_BTV.float().log_softmax(dim=-1)
        next_CT = log_prob_CTV.gather(-1, ids_CT[:, 1:, None])[..., 0]
        length_C = torch.tensor([len(ending) for ending in endings], device=device)
        counted_CT = torch.arange(1, longest, device=device) < length_C[:, None]
        log_prob_C = log_prob_C + (next_CT * counted_CT).sum(dim=-1)
    return log_prob_C.cpu()


def position_rows(
    config: RecallConfig, model: LanguageModel, tokenizer: Tokenizer, documents: Sequence[Sequence[int]]
) -> list[PositionRow]:
    """A row per range of positions, each twice as long as all before it together."""
    longest = max(config.lengths)
    edges = [0]
    while edges[-1] < longest:
        edges.append(min(longest, max(FIRST_POSITIONS, 2 * edges[-1])))
    if config.trained_length is not None and 0 < config.trained_length < longest:
        edges = sorted({*edges, config.trained_length})
    nats_DT = np.array([token_nats(model, [tokenizer.boundary_id, *ids]) for ids in documents])
    bytes_DT = tokenizer.n_bytes_V[np.array(documents)]
    rows = []
    for first, last in itertools.pairwise(edges):
        nats_D, bytes_D = nats_DT[:, first:last].sum(axis=1), bytes_DT[:, first:last].sum(axis=1)
        per_document = [float(value) for value in nats_D / bytes_D / math.log(2)]
        rows.append(
            PositionRow(
                first=first + 1,
                last=last,
                documents=len(documents),
                bits_per_byte=float(nats_D.sum() / bytes_D.sum() / math.log(2)),
                standard_error=_standard_error(per_document),
                beyond=int(config.trained_length is not None and first >= config.trained_length),
            )
        )
    return rows


@torch.no_grad()
def token_nats(model: LanguageModel, tokens: Sequence[int]) -> np.ndarray:
    """Loss in nats of every token but the first, fp64; the text is read piece by piece.

    Args:
        tokens: of one text, the boundary first; at least two.
    """
    tokens_1T = torch.tensor([list(tokens)], device=model.embedding_VD.device)
    cache = model.new_cache(1, len(tokens))
    losses = []
    pieces = zip(tokens_1T[:, :-1].split(PREFILL_TOKENS, dim=1), tokens_1T[:, 1:].split(PREFILL_TOKENS, dim=1))
    for piece_1T, next_1T in pieces:
        losses.append(model(piece_1T, cache, targets_BT=next_1T).losses_BT[0].double().cpu().numpy())
    return np.concatenate(losses)


def _standard_error(values: Sequence[float]) -> float:
    """Of their mean; 0 of a single one."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0

"""`python -m lm long-context`: a long text through one model, on a machine with little memory.

The prompt is read in pieces of a fixed size, so what grows with it is the cache alone. Printed, and written to a csv:
the bytes of the cache beside those of full attention in every layer, seconds per 1,000 tokens (of the linear layers
alone, too, which must not grow), the memory held, and the speed of decoding behind it all.

Legend: B batch (1 here), T tokens.
"""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, cast

import torch
import tyro
from torch import Tensor

from attention.cache import cache_bytes
from corpus.prepare import DEFAULT_VOCAB_SIZE
from corpus.readers import Document
from corpus.sources import read_paths, read_standard_library
from foundation.command import refuse_unwritable
from foundation.environment import device_name, peak_memory, short_commit
from foundation.numbers import check_numbers
from foundation.tables import read_rows, write_rows
from lm.block import Block
from lm.generate import PREFILL_TOKENS
from lm.long_context_figure import LongContextRow, draw_long_context
from lm.model import LanguageModel
from lm.options import ModelOptions
from lm.pretrained import find_model, load_pretrained, load_tokenizer
from moe.freed_memory import keep_freed_memory

# A row of the table stands for so many tokens.
ROW_TOKENS = 16 * PREFILL_TOKENS


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongContextConfig:
    """Reads a long text and goes on decoding.

    Attributes:
        run: folder of a trained model, or of the run that trained it. Without one the model has fresh weights and
            reads the text's bytes: time and memory are the same.
        model: the network without `run`.
        vocab_size: of its vocabulary; bytes need 256.
        data: files or folders of text; the Python standard library by default. Documents follow each other, from the
            first again when they end.
        tokens: of the prompt.
        decode_tokens: decoded after it.
        threads: CPU threads; 0 keeps torch's choice.
        csv: also write the rows there.
        figure: also draw them there; svg, png or pdf by the file's name.
        drawn_from: csv files of earlier runs: their rows are drawn, and nothing is run.
    """

    run: Path | None = None
    # A plan that shares keys and values needs more layers than the others' default, and a wide model is what long texts
    # cost memory in.
    model: Annotated[ModelOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=lambda: ModelOptions(n_layers=8, layer_plan="SSSFSSSR", window=128, d_expert=256)
    )
    vocab_size: int = DEFAULT_VOCAB_SIZE
    data: tuple[str, ...] = ()
    tokens: int = 200_000
    decode_tokens: int = 64
    threads: int = 0
    csv: Path | None = None
    figure: Path | None = None
    drawn_from: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        check_numbers(self, vocab_size=1, tokens=1, decode_tokens=1, threads=0)
        if self.drawn_from and self.figure is None:
            raise ValueError("drawn_from: without a figure to draw; legal: with --figure FILE")
        for path in self.drawn_from:
            if not path.is_file():
                raise ValueError(f"drawn_from: {path} is no file; legal: what --csv has written")


@torch.no_grad()
def long_context(config: LongContextConfig) -> list[LongContextRow]:
    """Runs it and prints a row after every `ROW_TOKENS` tokens; returns them."""
    refuse_unwritable("--csv", config.csv)
    refuse_unwritable("--figure", config.figure)
    if config.figure and config.drawn_from:
        rows = [row for path in config.drawn_from for row in read_rows(path, LongContextRow)]
        draw_long_context(rows, config.figure)
        return rows
    if config.threads:
        torch.set_num_threads(config.threads)
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokens_T = _model_and_tokens(config, device)
    plan = "".join(model.config.plan.letters)
    cache = model.new_cache(1, config.tokens + config.decode_tokens)
    print(
        f"commit {short_commit()}, {device_name()}, torch {torch.__version__}, {torch.get_num_threads()} threads; plan"
        f" {plan}, width {model.config.d_model}, {model.config.dtype}, the cache holds {cache.nbytes():,} bytes"
    )
    print(
        f"{'tokens':>8} {'cache':>13} {'full attention':>15} {'saved':>7} {'s / 1,000':>10} {'linear':>8}"
        f" {'softmax':>8} {'peak':>9}"
    )
    rows: list[LongContextRow] = []
    with _attention_seconds(model) as spent:
        for start in range(0, config.tokens, ROW_TOKENS):
            stop, began = min(start + ROW_TOKENS, config.tokens), time.perf_counter()
            for piece_T in tokens_T[start:stop].split(PREFILL_TOKENS):
                model(piece_T[None], cache, last_only=True)
            rows.append(_row(model, stop, stop - start, time.perf_counter() - began, spent, device))
            print(_line(rows[-1]), flush=True)
    times = []
    for _ in range(config.decode_tokens):
        began = time.perf_counter()
        model(tokens_T[-1:][None], cache)
        times.append(time.perf_counter() - began)
    rows[-1] = dataclasses.replace(rows[-1], decode_seconds=statistics.median(times), peak_bytes=peak_memory(device))
    print(
        f"decoding behind {config.tokens:,} tokens: {1 / rows[-1].decode_seconds:.0f} tokens/s; peak memory"
        f" {rows[-1].peak_bytes / 2**30:.2f} GiB"
    )
    if config.csv:
        write_rows(config.csv, LongContextRow, rows)
    if config.figure:
        draw_long_context(rows, config.figure)
    return rows


def _model_and_tokens(config: LongContextConfig, device: torch.device) -> tuple[LanguageModel, Tensor]:
    items = read_paths(config.data, text_field="text") if config.data else read_standard_library()
    texts = [item.text for item in items if isinstance(item, Document)]
    if not texts:
        raise ValueError(f"data: no usable document in {list(config.data)}")
    if config.run is None:
        if config.vocab_size < 256:
            raise ValueError(f"--vocab-size {config.vocab_size}: must be at least 256: the text's bytes")
        model = LanguageModel(config.model.config(config.vocab_size)).init_weights(0).to(device).eval()
        encode = lambda text: list(text.encode())  # noqa: E731
    else:
        folder = find_model(config.run)
        model = load_pretrained(folder, device)
        encode = load_tokenizer(folder, model).encode
    tokens: list[int] = []
    while len(tokens) < config.tokens:
        for text in texts:
            tokens += encode(text)
            if len(tokens) >= config.tokens:
                break
    return model, torch.tensor(tokens[: config.tokens], device=device)


@contextlib.contextmanager
def _attention_seconds(model: LanguageModel) -> Iterator[dict[bool, float]]:
    """Seconds since the last row of the attention layers that keep keys and values of all tokens or of a window
    (False), and of those whose state does not grow (True)."""
    spent, handles, began = {False: 0.0, True: 0.0}, [], {}

    def end(layer, linear: bool) -> None:
        spent[linear] += time.perf_counter() - began.pop(layer)

    for index, block in enumerate(model.blocks):
        layer, config = cast(Block, block).attention, model.config.attentions[index]
        kind = model.config.plan.kinds[index]
        linear = kind.state_bytes(config, 1, 1) == kind.state_bytes(config, 2, 1)
        handles += [
            layer.register_forward_pre_hook(lambda layer, *_: began.update({layer: time.perf_counter()})),
            layer.register_forward_hook(lambda layer, *_, linear=linear: end(layer, linear)),
        ]
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


def _row(
    model: LanguageModel, tokens: int, new: int, seconds: float, spent: dict[bool, float], device: torch.device
) -> LongContextRow:
    config, element = model.config, getattr(torch, model.config.dtype).itemsize
    ours = sum(cache_bytes(config.attentions, config.plan, tokens, element_size=element))
    whole = dataclasses.replace(config, layer_plan="F", blocks=())
    full = sum(cache_bytes(whole.attentions, whole.plan, tokens, element_size=element))
    row = LongContextRow(
        plan="".join(config.plan.letters),
        tokens=tokens,
        cache_bytes=ours,
        full_attention_bytes=full,
        saved=1 - ours / full,
        seconds=1000 * seconds / new,
        linear_seconds=1000 * spent[True] / new,
        softmax_seconds=1000 * spent[False] / new,
        decode_seconds=0.0,
        peak_bytes=peak_memory(device),
    )
    spent.update({False: 0.0, True: 0.0})
    return row


def _line(row: LongContextRow) -> str:
    return (
        f"{row.tokens:>8,} {row.cache_bytes:>13,} {row.full_attention_bytes:>15,} {row.saved:>7.1%}"
        f" {row.seconds:>10.3f} {row.linear_seconds:>8.3f} {row.softmax_seconds:>8.3f}"
        f" {row.peak_bytes / 2**30:>5.2f} GiB"
    )

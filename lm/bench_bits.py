"""`python -m lm bench-bits`: what fewer bits of the experts' weights cost and give: bits per byte, tokens per second
and the model folder's bytes, form by form, each at several numbers of experts.

Legend: B sequences, T tokens.
"""

import copy
import dataclasses
import re
import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

from corpus.prepare import DEFAULT_VOCAB_SIZE
from foundation.command import refuse_unwritable
from foundation.environment import device_name
from foundation.numbers import check_numbers
from foundation.tables import write_table
from foundation.timing import wall_seconds
from lm.accounting import decode_bytes
from lm.budget import set_budget
from lm.evaluate_text import Text, evaluate_documents, read_texts
from lm.model import LanguageModel
from lm.options import ModelOptions
from lm.pretrained import (
    find_model,
    has_calibration_tokens,
    load_calibration_tokens,
    load_pretrained,
    load_tokenizer,
    save_pretrained,
)
from lm.quantize import folder_bytes, packed_model
from lm.stored_text import stored_texts
from moe.config import ExpertFormat
from moe.freed_memory import keep_freed_memory
from routing.policy import Policy

BITS = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}
FORM = re.compile(r"(fp32|bf16|int8|int4)(?:-(\d+))?(-zero|-symmetric)?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchBitsConfig:
    """Measures a trained model, or times one with fresh weights of the sizes given.

    Attributes:
        run: a model folder, or the run that trained it; without it there are no bits per byte.
        model: the network without `run`.
        vocab_size: of its vocabulary.
        data: files and folders of text to measure bits per byte on; without them, every other row of the text stored
            with the model, the rows between being those that budgets are set on.
        text_field: key or column that holds the text.
        text_window: tokens that the model sees at once there.
        forms: of the experts' weights: fp32, bf16, int8, int4; behind a dash the group, 32 by default, and zero or
            symmetric, for with or without a zero point: int4-128-symmetric. The first is what others are compared with.
        experts: mean experts per token and layer.
        sequences: numbers of sequences that are decoded at once.
        context: tokens that lie in the cache before.
        steps: decode steps of a turn, of which the first does not count.
        prefill: tokens of a prompt that is timed.
        eight_bits: keys and values of the cache in 8 bits, see `lm cache`.
        repeats: turns that count, all forms one after the other in each; 0 times nothing.
        threads: CPU threads; 0 keeps torch's choice.
        csv: file for the table.
    """

    run: Path | None = None
    model: Annotated[ModelOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=ModelOptions)
    vocab_size: int = DEFAULT_VOCAB_SIZE
    data: tuple[str, ...] = ()
    text_field: str = "text"
    text_window: int = 256
    forms: tuple[str, ...] = ("fp32", "bf16", "int8", "int4")
    experts: tuple[float, ...] = (12, 6, 3)
    sequences: tuple[int, ...] = (1, 8)
    context: int = 128
    steps: int = 24
    prefill: int = 512
    eight_bits: Literal["int8", "fp8"] | None = None
    repeats: int = 5
    threads: int = 0
    csv: Path | None = None

    def __post_init__(self) -> None:
        check_numbers(self, vocab_size=1, text_window=1, experts=0, sequences=1, context=1, steps=2, prefill=1)
        check_numbers(self, repeats=0, threads=0)
        if not self.forms or not self.experts or not self.sequences:
            raise ValueError("BenchBitsConfig: no forms, experts or sequences; legal: at least one of each")
        for form in self.forms:
            form_of(form)
        if self.data and self.run is None:
            raise ValueError("BenchBitsConfig.data: text needs a trained model; legal: with --run only")


def form_of(name: str) -> ExpertFormat | None:
    """The form that a name stands for, None for fp32.

    Raises:
        ValueError: for another name.
    """
    found = FORM.fullmatch(name)
    if found is None:
        raise ValueError(f"BenchBitsConfig.forms: {name!r}; legal: fp32, bf16, int8, int4, int4-128-symmetric, ...")
    bits, group, zero = BITS[found[1]], int(found[2] or 32), found[3]
    if bits == 32:
        return None
    return ExpertFormat(bits=bits, group=group, zero_point=zero == "-zero" if zero else bits == 4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitsRow:
    """One form at one number of experts; None of what was not asked for.

    Attributes:
        experts: asked for; `mean_experts` is what the text used.
        more: bits per byte beyond those of the first form at the same number of experts.
        decode: sequences decoded at once: by `decode_1`, `decode_8` tokens per second of all of them together.
        megabytes_per_token: that a decode step of one sequence reads, see `lm.accounting.decode_bytes`.
    """

    form: str
    experts: float
    mean_experts: float | None
    bits_per_byte: float | None
    more: float | None
    prefill: float | None
    decode: dict[int, float]
    megabytes_per_token: float
    folder_bytes: int


@dataclasses.dataclass(frozen=True)
class _Variant:
    form: str
    experts: float
    model: LanguageModel
    policies: list[Policy]

    def install(self) -> LanguageModel:
        for router, policy in zip(self.model.routers(), self.policies):
            router.policy = policy
        return self.model


def bench_bits(config: BenchBitsConfig) -> list[BitsRow]:
    """Measures, prints the table, and returns its rows.

    Raises:
        ValueError: for a model or text that does not fit, or a number of experts that the model cannot use.
    """
    refuse_unwritable("--csv", config.csv)
    if config.threads:
        torch.set_num_threads(config.threads)
    keep_freed_memory()
    print(f"torch {torch.__version__}, {device_name()}, {torch.get_num_threads()} threads", flush=True)
    original, calibration_BT, texts, boundary = _subject(config)
    variants, sizes = [], {}
    for name in config.forms:
        model = packed_model(original, form_of(name))
        sizes[name] = _folder_bytes(model, calibration_BT)
        for experts in config.experts:
            set_budget(model, experts, torch.zeros(1, 1) if calibration_BT is None else calibration_BT)
            policies = [copy.deepcopy(router.policy) for router in model.routers()]
            variants.append(_Variant(name, experts, model, policies))
    del original
    quality = [_quality(config, variant, texts, boundary) for variant in variants]
    seconds = _seconds(config, variants, _stream(config, texts, variants[0].model))
    rows = []
    for place, variant in enumerate(variants):
        bits, mean = quality[place]
        base = quality[place % len(config.experts)][0]
        prefill, decode = seconds[place]
        bytes_read = decode_bytes(variant.model.config, config.context, variant.experts)
        rows.append(
            BitsRow(
                form=variant.form,
                experts=variant.experts,
                mean_experts=mean,
                bits_per_byte=bits,
                more=None if bits is None or base is None else bits - base,
                prefill=prefill,
                decode=decode,
                megabytes_per_token=bytes_read / 1e6,
                folder_bytes=sizes[variant.form],
            )
        )
    print(table(rows, config.sequences))
    if config.csv is not None:
        _write(config.csv, rows, config.sequences)
    return rows


def _subject(config: BenchBitsConfig) -> tuple[LanguageModel, Tensor | None, list[Text], int]:
    """The model in fp32, text to set budgets on, text to measure on, and the token that begins a document."""
    if config.run is None:
        return LanguageModel(config.model.config(config.vocab_size)).init_weights(0).eval(), None, [], 0
    folder = find_model(config.run)
    model = load_pretrained(folder)
    tokenizer = load_tokenizer(folder, model)
    calibration_BT = load_calibration_tokens(folder) if has_calibration_tokens(folder) else None
    if config.data:
        texts = read_texts(config.data, config.text_field, tokenizer)
    else:
        texts, calibration_BT = stored_texts(folder, tokenizer)[1::2], load_calibration_tokens(folder)[::2]
    return model, calibration_BT, texts, tokenizer.boundary_id


def _folder_bytes(model: LanguageModel, calibration_BT: Tensor | None) -> int:
    """Of the folder that the model is saved as, without a tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(Path(folder) / "model", model, calibration_BT)
        return folder_bytes(Path(folder) / "model")


def _quality(
    config: BenchBitsConfig, variant: _Variant, texts: Sequence[Text], boundary: int
) -> tuple[float | None, float | None]:
    """Bits per byte, and experts per token in the mean of the layers."""
    if not texts:
        return None, None
    window = config.text_window
    found = evaluate_documents(variant.install(), boundary, texts, window=window, stride=window, batch_size=8)
    print(f"{variant.form}, {variant.experts:g} experts: {found.bits_per_byte:.4f} bits per byte", flush=True)
    return found.bits_per_byte, statistics.fmean(found.mean_experts)


def _stream(config: BenchBitsConfig, texts: Sequence[Text], model: LanguageModel) -> Tensor:
    """Tokens for the timed passes: of the text, or drawn."""
    ids = [token for text in texts for token in text.ids]
    if ids:
        return torch.tensor(ids)
    return torch.randint(model.config.vocab_size, (8192,), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _seconds(
    config: BenchBitsConfig, variants: Sequence[_Variant], stream_N: Tensor
) -> list[tuple[float | None, dict[int, float]]]:
    """Tokens per second of each: of prefill, and of decoding by the number of sequences. In turns, so that a
    disturbance hits all alike."""
    if config.repeats == 0:
        return [(None, {}) for _ in variants]
    turns: list[list[dict[int, float]]] = [[] for _ in variants]
    for turn in range(config.repeats + 1):
        for place, variant in enumerate(variants):
            model = variant.install()
            found = {0: _prefill_seconds(config, model, stream_N)}
            found |= {n: _decode_seconds(config, model, stream_N, n) for n in config.sequences}
            # The first turn warms up.
            turns[place] += [found] if turn else []
    medians = [{n: statistics.median(found[n] for found in own) for n in own[0]} for own in turns]
    return [(config.prefill / own.pop(0), {n: n / seconds for n, seconds in own.items()}) for own in medians]


def _prefill_seconds(config: BenchBitsConfig, model: LanguageModel, stream_N: Tensor) -> float:
    tokens_BT = _sequences(stream_N, 1, config.prefill)
    cache = model.new_cache(1, config.prefill, eight_bits=config.eight_bits)
    return wall_seconds(lambda: model(tokens_BT, cache, last_only=True), "cpu")


def _decode_seconds(config: BenchBitsConfig, model: LanguageModel, stream_N: Tensor, n: int) -> float:
    """Of a step of n sequences, in the median."""
    length = config.context + config.steps
    tokens_BT = _sequences(stream_N, n, length)
    cache = model.new_cache(n, length, eight_bits=config.eight_bits)
    model(tokens_BT[:, : config.context], cache, last_only=True)
    seconds = [
        wall_seconds(partial(model, tokens_BT[:, at : at + 1], cache, last_only=True), "cpu")
        for at in range(config.context, length)
    ]
    # The first step describes the model to the call that computes the others.
    return statistics.median(seconds[1:])


def _sequences(stream_N: Tensor, n: int, length: int) -> Tensor:
    repeats = -(-n * length // len(stream_N))
    return stream_N.repeat(repeats)[: n * length].view(n, length)


def _write(path: Path, rows: Sequence[BitsRow], sequences: Sequence[int]) -> None:
    """The rows as csv, with a column for each number of sequences; tokens per second."""
    names = [field.name for field in dataclasses.fields(BitsRow) if field.name != "decode"]
    lines = ([*(getattr(row, name) for name in names), *(row.decode.get(n) for n in sequences)] for row in rows)
    columns = [*names, *(f"decode_{n}" for n in sequences)]
    write_table(path, columns, ([f"{x:.6g}" if isinstance(x, float) else x for x in line] for line in lines))


def table(rows: Sequence[BitsRow], sequences: Sequence[int]) -> str:
    """The rows as text; tokens per second."""

    def shown(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:,.{digits}f}"

    decodes = "".join(f"{f'decode {n}':>11}" for n in sequences)
    lines = [
        f"{'form':<20} {'experts':>8} {'used':>7} {'bits/byte':>10} {'more':>9} {'prefill':>9}{decodes}"
        f" {'MB/token':>9} {'folder MB':>10}"
    ]
    for row in rows:
        decodes = "".join(f"{shown(row.decode.get(n), 0):>11}" for n in sequences)
        lines.append(
            f"{row.form:<20} {row.experts:>8g} {shown(row.mean_experts, 2):>7} {shown(row.bits_per_byte, 4):>10}"
            f" {shown(row.more, 5):>9} {shown(row.prefill, 0):>9}{decodes} {row.megabytes_per_token:>9.3f}"
            f" {row.folder_bytes / 1e6:>10.2f}"
        )
    return "\n".join(lines)

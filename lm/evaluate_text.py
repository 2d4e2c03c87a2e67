"""`python -m lm evaluate RUN --data ...`: how well a model compresses text, by domain, with intervals, beside two
compressors that have learnt nothing: xz -9, and an n-gram model of bytes that learns as it goes.

Every document is predicted from its own boundary on, in windows: whole ones one behind the other, or sliding by a
stride, of which each predicts its last tokens with the others as context. Bits per byte of a domain are the bits of all
its documents by the bytes of all; micro pools the domains, macro is their mean. Intervals are percentiles over
resampled documents, domain by domain.

Legend: B batch, T tokens, N counted tokens, D documents, R resamples.
"""

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from corpus.compressors import ngram_bits_per_byte, xz_bits_per_byte
from corpus.contamination import LONG_NGRAM, NGRAM, overlaps
from corpus.readers import Document, read_file
from corpus.refine.shards import domain_of
from corpus.sources import find_files, read_paths
from corpus.tokenizer import Tokenizer
from foundation.command import CannotGoOn, refuse_unwritable
from foundation.files import write_bytes
from foundation.numbers import check_numbers
from foundation.tables import write_rows
from lm.arithmetic_coding import HEADER_BYTES, decode_text, encode_text
from lm.budget import set_budget
from lm.evaluate import Evaluation, evaluate
from lm.model import IGNORED_TARGET, LanguageModel
from lm.pretrained import find_model, load_calibration_tokens, load_pretrained, load_tokenizer

MICRO, MACRO = "micro", "macro"
# What the macro row has the mean over the domains of.
MEANS = (
    *("bits_per_byte", "xz_bits_per_byte", "normalised", "ngram_bits_per_byte", "ngram_normalised"),
    *("clean_bits_per_byte", "clean_bits_per_byte_30"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Bits per byte of a model on text, by domain.

    Attributes:
        run: folder of a trained model, or of the run that trained it.
        data: files and folders of text; a document's domain is its field `domain`, or the name of its file.
        text_field: key or column that holds the text; meta.text for one inside of another.
        window: tokens that the model sees at once.
        stride: tokens that each window predicts, the others being context; as long as the window unless told.
        train_data: the text that the model was trained on, to look for what it has seen (13-grams and 30-grams).
        remove_contaminated: leave out the documents that share an n-gram of this length, 13 or 30, with it.
        contamination_csv: file for what each document shares with it.
        experts: real experts per token, in the mean, in every layer; as the model has them by default.
        code: a text file to compress by the model, to decompress again, and to leave beside as FILE.lmac.
        csv: file for the table.
        batch_size: windows at once.
        resamples: of the documents, for the intervals.
        seed: of the resamples.
    """

    run: Path
    data: tuple[str, ...] = ()
    text_field: str = "text"
    window: int = 512
    stride: int | None = None
    train_data: tuple[str, ...] = ()
    remove_contaminated: Literal[13, 30] | None = None
    contamination_csv: Path | None = None
    experts: float | None = None
    code: Path | None = None
    csv: Path | None = None
    batch_size: int = 8
    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, experts=0, window=1, stride=1, batch_size=1, resamples=1, seed=0)
        if self.stride is not None and self.stride > self.window:
            raise ValueError(f"EvaluateConfig.stride: {self.stride}, must be at most the window, {self.window}")
        for name in ("remove_contaminated", "contamination_csv"):
            if getattr(self, name) is not None and not self.train_data:
                raise ValueError(f"EvaluateConfig.{name}: {getattr(self, name)}; legal: with --train-data only")
        if not self.data and self.code is None:
            raise ValueError("--data: nothing to evaluate; give text, or a file to --code")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DomainRow:
    """One domain's row, or that of all together.

    Attributes:
        low, high: 95 % interval of the bits per byte.
        normalised: bits per byte by those of xz -9 on the same text.
        ngram_bits_per_byte, ngram_normalised: the same of an n-gram model of order 5, see `corpus.ngram_code`.
        overlapping: documents that share a 13-gram with the training text; of it `clean_bits_per_byte` is without
            them. None where no training text was given.
        overlapping_30, clean_bits_per_byte_30: the same for 30-grams.
        removed: documents that were left out for what they share.
    """

    domain: str
    documents: int
    bytes: int
    tokens: int
    bits_per_byte: float
    low: float
    high: float
    xz_bits_per_byte: float
    normalised: float
    ngram_bits_per_byte: float
    ngram_normalised: float
    overlapping: int | None
    clean_bits_per_byte: float | None
    overlapping_30: int | None
    clean_bits_per_byte_30: float | None
    removed: int


@dataclasses.dataclass(frozen=True)
class Text:
    """One document of the evaluation."""

    domain: str
    text: str
    ids: list[int]
    n_bytes: int
    place: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedRow:
    """What a document has in common with the training text: n-grams of 13 and of 30 terms, and how many of them."""

    domain: str
    document: str
    ngrams: int
    shared: int
    ngrams_30: int
    shared_30: int


def evaluate_text(config: EvaluateConfig) -> list[DomainRow]:
    """Evaluates, prints the table, and returns its rows."""
    refuse_unwritable("--csv", config.csv)
    folder = find_model(config.run)
    model = load_pretrained(folder, "cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(folder, model)
    if config.experts is not None:
        set_budget(model, config.experts, load_calibration_tokens(folder).to(model.embedding_VD.device))
    rows: list[DomainRow] = []
    if config.data:
        texts, touched, removed = _without_contaminated(config, read_texts(config.data, config.text_field, tokenizer))
        stride = config.stride or config.window
        print(
            f"{len(texts):,} documents, each from its own boundary; windows of {config.window} tokens, "
            + ("one behind the other" if stride == config.window else f"of which each predicts its last {stride}"),
            flush=True,
        )
        found = evaluate_documents(
            model, tokenizer.boundary_id, texts, window=config.window, stride=stride, batch_size=config.batch_size
        )
        nats_D = np.pad(found.section_nats, (0, len(texts) - len(found.section_nats)))
        rows = _rows(config, texts, nats_D, touched, removed)
        print(f"{table(rows)}\n{statistics.fmean(found.mean_experts):.2f} experts per token in the mean of the layers")
        if config.csv is not None:
            write_rows(config.csv, DomainRow, rows)
    if config.code is not None:
        print(_code(config, model, tokenizer, config.code))
    return rows


def read_texts(data: Sequence[str], text_field: str, tokenizer: Tokenizer) -> list[Text]:
    """The documents of files and folders.

    Raises:
        ValueError: where there is none.
    """
    found: list[tuple[str, str, str]] = []
    files, _ = find_files(data)
    for file in files:
        for item in read_file(file, text_field=text_field):
            if isinstance(item, Document):
                domain = item.record.get("domain")
                found.append((domain if isinstance(domain, str) else domain_of(file), item.text, item.place))
    if not found:
        raise ValueError(f"--data: no usable document in {', '.join(data)}")
    batch = tokenizer.encode_batch([text for _, text, _ in found])
    return [Text(domain, text, ids, len(text.encode()), place) for (domain, text, place), ids in zip(found, batch)]


# By length of n-gram, which documents share one; empty where no training text was given.
Touched = dict[int, np.ndarray]


def _without_contaminated(config: EvaluateConfig, texts: list[Text]) -> tuple[list[Text], Touched, Counter[str]]:
    """The documents to evaluate, which of them share n-grams with the training text, and how many were left out, by
    domain."""
    if not config.train_data:
        return texts, {}, Counter()
    refuse_unwritable("--contamination-csv", config.contamination_csv)
    train = (
        item.text for item in read_paths(config.train_data, text_field=config.text_field) if isinstance(item, Document)
    )
    found = overlaps([text.text for text in texts], train, (NGRAM, LONG_NGRAM))
    if config.contamination_csv is not None:
        short, long = found[NGRAM], found[LONG_NGRAM]
        counts = zip(*(x.tolist() for x in (short.ngrams_D, short.shared_D, long.ngrams_D, long.shared_D)))
        names = ("ngrams", "shared", "ngrams_30", "shared_30")
        rows = (
            SharedRow(domain=text.domain, document=text.place, **dict(zip(names, numbers)))
            for text, numbers in zip(texts, counts)
        )
        write_rows(config.contamination_csv, SharedRow, rows)
    kept_D = np.ones(len(texts), bool)
    if config.remove_contaminated is not None:
        kept_D = ~found[config.remove_contaminated].touched_D
    removed = Counter(text.domain for text, kept in zip(texts, kept_D) if not kept)
    if not kept_D.any():
        raise ValueError(
            f"--remove-contaminated {config.remove_contaminated}: all {len(texts)} documents share a"
            f" {config.remove_contaminated}-gram with the training text; nothing is left to evaluate"
        )
    touched = {n: overlap.touched_D[kept_D] for n, overlap in found.items()}
    return [text for text, kept in zip(texts, kept_D) if kept], touched, removed


def evaluate_documents(
    model: LanguageModel, boundary_id: int, texts: Sequence[Text], *, window: int, stride: int, batch_size: int
) -> Evaluation:
    """The documents as sections; the boundary is given, every token behind it is predicted."""
    windows = list(_windows([text.ids for text in texts], boundary_id, window, stride))
    # Windows of one length together: little padding. Their order decides nothing.
    windows.sort(key=lambda one: -len(one[1]))
    section_N = np.concatenate([np.full(counted, document) for document, _, counted in windows])
    n_bytes = sum(text.n_bytes for text in texts)
    batches = window_batches(windows, batch_size, model.embedding_VD.device)
    return evaluate(model, batches, n_bytes=n_bytes, section_N=section_N)


def _windows(
    documents: Sequence[list[int]], boundary_id: int, window: int, stride: int
) -> Iterator[tuple[int, list[int], int]]:
    """(document, tokens with one before the first predicted, how many of the last are counted)."""
    for number, ids in enumerate(documents):
        tokens = [boundary_id, *ids]
        # The first window has nothing before it, and counts whole.
        stop, done = min(window, len(ids)), 0
        while done < len(ids):
            yield number, tokens[max(done - (window - stride), 0) : stop + 1], stop - done
            stop, done = min(stop + stride, len(ids)), stop


def window_batches(
    windows: Sequence[tuple[int, list[int], int]], batch_size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets, padded, of windows (section, tokens with one before the first predicted, how many of the last
    are counted)."""
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size]
        length = max(len(tokens) for _, tokens, _ in batch) - 1
        inputs_BT = torch.zeros(len(batch), length, dtype=torch.int64)
        targets_BT = torch.full((len(batch), length), IGNORED_TARGET)
        for row, (_, tokens, counted) in enumerate(batch):
            inputs_BT[row, : len(tokens) - 1] = torch.tensor(tokens[:-1])
            targets_BT[row, len(tokens) - 1 - counted : len(tokens) - 1] = torch.tensor(tokens[-counted:])
        yield inputs_BT.to(device), targets_BT.to(device)


def _rows(
    config: EvaluateConfig, texts: Sequence[Text], nats_D: np.ndarray, touched: Touched, removed: Counter[str]
) -> list[DomainRow]:
    bits_D, bytes_D = nats_D / math.log(2), np.array([text.n_bytes for text in texts])
    of_all = (texts, bits_D, bytes_D, touched)
    domains = sorted({text.domain for text in texts})
    of_D = np.array([domains.index(text.domain) for text in texts])
    generator = np.random.default_rng(config.seed)
    rows: list[DomainRow] = []
    sums_R: list[tuple[np.ndarray, np.ndarray]] = []
    for number, domain in enumerate(domains):
        own = np.flatnonzero(of_D == number)
        drawn = generator.choice(own, (config.resamples, len(own)))
        sums_R.append((bits_D[drawn].sum(axis=1), bytes_D[drawn].sum(axis=1)))
        data = "".join(texts[place].text for place in own.tolist()).encode()
        yardsticks = xz_bits_per_byte(data), ngram_bits_per_byte(data)
        row = _row(domain, own, of_all, yardsticks, sums_R[-1][0] / sums_R[-1][1])
        rows.append(dataclasses.replace(row, removed=removed[domain]))
    everything = np.arange(len(texts))
    total = int(bytes_D.sum())
    xz = sum(row.xz_bits_per_byte * row.bytes for row in rows) / total
    ngram = sum(row.ngram_bits_per_byte * row.bytes for row in rows) / total
    micro_R = sum(bits for bits, _ in sums_R) / sum(n for _, n in sums_R)
    micro = _row(MICRO, everything, of_all, (xz, ngram), np.asarray(micro_R))
    micro = dataclasses.replace(micro, removed=removed.total())
    macro_R = np.mean([bits / n for bits, n in sums_R], axis=0)
    means: dict[str, float | None] = {}
    for name in MEANS:
        values = [getattr(row, name) for row in rows if getattr(row, name) is not None]
        means[name] = float(np.mean(values)) if values else None
    low, high = np.quantile(macro_R, (0.025, 0.975)).tolist()
    macro = dataclasses.replace(micro, domain=MACRO, low=low, high=high, **means)  # pyright: ignore[reportArgumentType]
    return [*rows, micro, macro]


def _row(
    domain: str,
    own: np.ndarray,
    of_all: tuple[Sequence[Text], np.ndarray, np.ndarray, Touched],
    yardsticks: tuple[float, float],
    resampled_R: np.ndarray,
) -> DomainRow:
    texts, bits_D, bytes_D, touched = of_all
    low, high = np.quantile(resampled_R, (0.025, 0.975)).tolist()
    bits_per_byte = float(bits_D[own].sum() / bytes_D[own].sum())
    overlapping, clean = dict[int, int](), dict[int, float]()
    for n, touched_D in touched.items():
        overlapping[n] = int(touched_D[own].sum())
        kept = own[~touched_D[own]]
        if len(kept):
            clean[n] = float(bits_D[kept].sum() / bytes_D[kept].sum())
    return DomainRow(
        domain=domain,
        documents=len(own),
        bytes=int(bytes_D[own].sum()),
        tokens=sum(len(texts[place].ids) for place in own),
        bits_per_byte=bits_per_byte,
        low=low,
        high=high,
        xz_bits_per_byte=yardsticks[0],
        normalised=bits_per_byte / yardsticks[0],
        ngram_bits_per_byte=yardsticks[1],
        ngram_normalised=bits_per_byte / yardsticks[1],
        overlapping=overlapping.get(NGRAM),
        clean_bits_per_byte=clean.get(NGRAM),
        overlapping_30=overlapping.get(LONG_NGRAM),
        clean_bits_per_byte_30=clean.get(LONG_NGRAM),
        removed=0,
    )


def table(rows: Sequence[DomainRow]) -> str:
    seen = "  13-grams seen, 30-grams seen" if rows and rows[0].overlapping is not None else ""
    lines = [
        f"{'domain':<16} {'documents':>9} {'bytes':>12} {'bits per byte':>24} {'xz -9':>7} {'of xz':>7} {'n-gram':>7}"
        f" {'of it':>7}{seen}"
    ]
    for row in rows:
        found = []
        for count, clean in (
            (row.overlapping, row.clean_bits_per_byte),
            (row.overlapping_30, row.clean_bits_per_byte_30),
        ):
            without = "" if clean is None else f", without {clean:.4f}"
            found += [] if count is None else [f"in {count:,}{without}"]
        found += [f"{row.removed:,} removed"] if row.removed else []
        interval = f"{row.bits_per_byte:.4f} [{row.low:.4f}, {row.high:.4f}]"
        lines.append(
            f"{row.domain:<16} {row.documents:>9,} {row.bytes:>12,} {interval:>24} {row.xz_bits_per_byte:>7.4f}"
            f" {row.normalised:>7.3f} {row.ngram_bits_per_byte:>7.4f} {row.ngram_normalised:>7.3f}  {'; '.join(found)}"
        )
    return "\n".join(lines)


def _code(config: EvaluateConfig, model: LanguageModel, tokenizer: Tokenizer, file: Path) -> str:
    """Codes a file, decodes the code, and says what came out."""
    try:
        data = file.read_bytes()
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--code {file}: {error}") from error
    if not text:
        raise ValueError(f"--code {file}: an empty file")
    target = file.with_name(f"{file.name}.lmac")
    refuse_unwritable("--code", target)
    code, bits = encode_text(model, tokenizer, text, window=config.window)
    write_bytes(target, code)
    if decode_text(model, tokenizer, target.read_bytes()).encode() != data:
        raise CannotGoOn(f"{target}: does not decode to {file}")
    return (
        f"{file}: {len(data):,} bytes coded in {len(code):,} ({8 * len(code) / len(data):.4f} bits per byte),"
        f" {HEADER_BYTES} of them a header; -log2 p sums up to {bits / 8:,.1f} bytes, {bits / len(data):.4f} bits per"
        f" byte; decoded bit for bit from {target}"
    )

"""The passes over the shards: what each does to one shard, as functions that any process can run.

    read      input file  -> shards/<shard>.jsonl            items as they came in
    judge     shard       -> judged/<shard>.jsonl            items after layers 1 to 8
    score     shard       -> scored/<shard>.jsonl            verdicts of layers 9 and 10, cluster
                             bands/<shard>.npy               [documents, 14], see near_duplicates
                             units/<shard>.npy               paragraphs and spans, sorted by hash
                             facts/<shard>.npy               of each document what is decided together
    edit      shard       -> edited/<shard>.jsonl            what paragraphs that stood before leave
                             bands_after/, facts_after/      the same, after that

Between them and behind them the parent decides what needs all documents (`corpus.refine.together`).

Legend: N documents, U units.
"""

import functools
import json
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from corpus.refine.cascade import Verdict, rule_layers, through
from corpus.refine.config import RefineConfig
from corpus.refine.hashing import text_hash
from corpus.refine.layer import Layer
from corpus.refine.length import LONGEST, Length
from corpus.refine.models import Models
from corpus.refine.near_duplicates import BANDS, bands_of, units_of, without
from corpus.refine.page import Page
from corpus.refine.perplexity import Perplexity
from corpus.refine.quality import Quality
from corpus.refine.shards import Item, items_of, line_of, numbered_items, write_array, writing

UNIT = np.dtype([("hash", "<u8"), ("document", "<u4"), ("unit", "<u4")])
# Whether a document is kept so far, its cluster, and what decides which documents of a cluster stay.
FACT = np.dtype([("alive", "?"), ("cluster", "<i2"), ("priority", "<u8")])


@dataclass(frozen=True)
class Job:
    """Attributes:
    work: folder of the passes' files.
    """

    config: RefineConfig
    work: Path

    def file(self, name: str, shard: str, suffix: str) -> Path:
        return self.work / name / f"{shard}.{suffix}"

    @property
    def models(self) -> Path:
        return self.work / "models"


@functools.cache
def _rules(config: RefineConfig) -> list[Layer]:
    return rule_layers(config)


@functools.cache
def _models(folder: Path) -> Models:
    return Models.load(folder)


def _scoring(job: Job) -> list[Layer]:
    models = _models(job.models)
    layers: list[Layer] = [Perplexity(models.perplexity), Quality(models.quality)]
    return [layer for layer in layers if layer.name not in job.config.without]


def judge(job: Job, shard: str) -> None:
    """Layers 1 to 8."""
    seconds: defaultdict[str, float] = defaultdict(float)
    with writing(job.file("judged", shard, "jsonl")) as out:
        for item in items_of(job.file("shards", shard, "jsonl")):
            if item.layer is None and len(item.text) > LONGEST:
                item.layer, item.reason = Length.name, f"more than {LONGEST:,} characters"
            elif item.layer is None:
                page = Page(item.text, record=item.record)
                _settle(item, page, through(_rules(job.config), page, seconds))
            out.write(line_of(item))
    _write_seconds(job, "judged", shard, seconds)


def _settle(item: Item, page: Page, verdict: Verdict) -> None:
    item.language, item.layer, item.reason, item.also = page.language, verdict.layer, verdict.reason, verdict.also
    # What is dropped stays as it came in.
    if verdict.layer is None:
        item.change(page.text)
        item.masked = {kind: item.masked.get(kind, 0) + count for kind, count in page.masked.items()}
        for layer, change in verdict.changed.items():
            item.changed[layer] = item.changed.get(layer, 0) + change


def score(job: Job, shard: str) -> None:
    """Layers 9 and 10, and what layers 11 and 12 need of every document."""
    models, layers = _models(job.models), _scoring(job)
    seconds: defaultdict[str, float] = defaultdict(float)
    bands: list[np.ndarray] = []
    units: list[np.ndarray] = []
    facts: list[tuple[bool, int, int]] = []
    with writing(job.file("scored", shard, "jsonl")) as out:
        for number, item in enumerate(items_of(job.file("judged", shard, "jsonl"))):
            page = Page(item.text if len(item.text) <= LONGEST else "", language=item.language)
            verdict = through(layers, page, seconds) if page.text else Verdict()
            started = time.thread_time()
            bands.append(bands_of(page))
            if item.layer is None and verdict.layer is None:
                units.append(_unit_rows(page, number))
            seconds["near_duplicates"] += time.thread_time() - started
            started = time.thread_time()
            cluster = models.topics.cluster(page) if models.topics is not None else 0
            seconds["clusters"] += time.thread_time() - started
            would = [name for name in (verdict.layer, *verdict.also) if name is not None]
            facts.append((item.layer is None and not would, cluster, text_hash(item.text)))
            row = {"would": would, "reason": verdict.reason, "scores": page.scores}
            out.write(json.dumps(row).encode() + b"\n")
    write_array(job.file("bands", shard, "npy"), np.array(bands, np.uint64).reshape(-1, BANDS))
    write_array(job.file("facts", shard, "npy"), np.array(facts, FACT))
    rows_U = np.concatenate(units) if units else np.empty(0, UNIT)
    # They come in the order of documents and units.
    write_array(job.file("units", shard, "npy"), rows_U[np.argsort(rows_U["hash"], kind="stable")])
    _write_seconds(job, "scored", shard, seconds)


def _unit_rows(page: Page, number: int) -> np.ndarray:
    _, hashes_U = units_of(page)
    rows_U = np.empty(len(hashes_U), UNIT)
    rows_U["hash"], rows_U["document"], rows_U["unit"] = hashes_U, number, np.arange(len(hashes_U))
    return rows_U


def edit(job: Job, shard: str) -> None:
    """Takes out paragraphs that stood before, and judges what is left by all layers of a page again. Only documents
    that change are written."""
    seconds: defaultdict[str, float] = defaultdict(float)
    bands, facts = np.load(job.file("bands", shard, "npy")), np.load(job.file("facts", shard, "npy"))
    rows_U, before_U = np.load(job.file("units", shard, "npy")), np.load(job.file("before", shard, "npy"))
    places_U = defaultdict(list)
    for document, unit in zip(rows_U["document"][before_U].tolist(), rows_U["unit"][before_U].tolist()):
        places_U[document].append(unit)
    layers = [*_rules(job.config), *_scoring(job)]
    topics = _models(job.models).topics
    with writing(job.file("edited", shard, "jsonl")) as out:
        for number, item in numbered_items(job.file("judged", shard, "jsonl"), places_U):
            started = time.thread_time()
            page = Page(item.text, language=item.language, record=item.record)
            units, hashes_U = units_of(page)
            stood_before_U = np.zeros(len(hashes_U), bool)
            stood_before_U[places_U[number]] = True
            text = without(page, units, stood_before_U)
            if text == page.text:
                continue
            n_taken = len(page.text) - len(text)
            page.text = text
            verdict = through(layers, page)
            reason = None if verdict.layer is None else f"what stood nowhere before fails {verdict.layer}"
            row: dict[str, Any] = {"document": number, "text": page.text, "reason": reason, "changed": n_taken}
            row["scores"], row["masked"], row["language"] = page.scores, page.masked, page.language
            out.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
            cluster = topics.cluster(page) if topics is not None else 0
            facts[number] = reason is None, cluster, text_hash(page.text)
            bands[number] = bands_of(page)
            seconds["near_duplicates"] += time.thread_time() - started
    write_array(job.file("bands_after", shard, "npy"), bands)
    write_array(job.file("facts_after", shard, "npy"), facts)
    _write_seconds(job, "edited", shard, seconds)


def _write_seconds(job: Job, name: str, shard: str, seconds: dict[str, float]) -> None:
    """Last of a pass over a shard: says that it is done."""
    with writing(job.file(name, shard, "done")) as out:
        out.write(json.dumps(seconds).encode())

"""The last pass: of every shard what is kept and what is dropped, and the counts that the report is made of."""

import heapq
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from corpus.refine.clusters import Clusters
from corpus.refine.hashing import text_hash
from corpus.refine.near_duplicates import NearDuplicates
from corpus.refine.passes import Job
from corpus.refine.shards import Item, items_of, with_text, writing
from corpus.refine.together import ALSO_CROWDED, ALSO_DUPLICATE, CROWDED, DUPLICATE, DUPLICATE_AFTER

SAMPLES, EXCERPT = 10, 400
# Counts by these keys; each adds up over shards.
COUNTS = (
    "totals",
    "dropped",
    "dropped_bytes",
    "alone",
    "reasons",
    "changed",
    "changed_documents",
    "masked",
    "languages",
    "domains",
)


def outcomes(job: Job, shard: str) -> Iterator[tuple[Item, dict[str, Any]]]:
    """Every item of a shard with its last verdict, and its scores."""
    edits = {row["document"]: row for row in _rows(job, "edited", shard)}
    flags = np.load(job.file("decided", shard, "npy"))
    items = items_of(job.file("judged", shard, "jsonl"))
    for number, (item, scored) in enumerate(zip(items, _rows(job, "scored", shard), strict=True)):
        flag, edited = int(flags[number]), edits.get(number)
        scores = scored["scores"]
        item.also += scored["would"] if item.layer is not None else scored["would"][1:]
        if item.layer is None and scored["would"]:
            item.layer, item.reason = scored["would"][0], scored["reason"]
        elif item.layer is None and flag & DUPLICATE:
            item.layer, item.reason = NearDuplicates.name, "nearly an earlier document"
        elif item.layer is None and edited is not None:
            item.changed[NearDuplicates.name] = edited["changed"]
            scores = edited["scores"]
            if edited["reason"] is not None:
                item.layer, item.reason = NearDuplicates.name, edited["reason"]
            else:
                item.change(edited["text"])
                item.language = edited["language"]
                item.masked = dict(Counter(item.masked) + Counter(edited["masked"]))
        if item.layer is None and flag & DUPLICATE_AFTER:
            item.layer, item.reason = NearDuplicates.name, "nearly an earlier document, repeated paragraphs aside"
        elif item.layer is None and flag & CROWDED:
            item.layer, item.reason = Clusters.name, "its topic is full"
        else:
            item.also += [NearDuplicates.name] * bool(flag & ALSO_DUPLICATE) + [Clusters.name] * bool(
                flag & ALSO_CROWDED
            )
        yield item, scores


def _rows(job: Job, name: str, shard: str) -> Iterator[dict[str, Any]]:
    with open(job.file(name, shard, "jsonl"), "rb") as file:
        yield from map(json.loads, file)


def write(job: Job, shard: str) -> None:
    """Writes kept/<shard>.jsonl.gz, dropped/<shard>.jsonl.gz and the counts of both."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in COUNTS}
    samples: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    with (
        writing(job.file("kept", shard, "jsonl.gz"), compressed=True) as kept,
        writing(job.file("dropped", shard, "jsonl.gz"), compressed=True) as dropped,
    ):
        for item, scores in outcomes(job, shard):
            _count(counts, item)
            facts: dict[str, Any] = {"domain": item.domain}
            if item.layer is None:
                facts |= {"language": item.language, "refined": scores}
                out = with_text({**item.record, **facts}, job.config.text_field, item.text)
                kept.write(_json(out))
                continue
            facts |= {"dropped_by": item.layer, "reason": item.reason, "also": item.also, "place": item.place}
            came = with_text(item.record, job.config.text_field, item.as_it_came()) if item.text else item.record
            dropped.write(_json({**came, **facts}))
            _sample(samples.setdefault(item.layer, []), item)
    shown = {layer: sorted(found, key=lambda pair: -pair[0]) for layer, found in samples.items()}
    with writing(job.file("written", shard, "done")) as out:
        out.write(json.dumps({**counts, "samples": shown}, ensure_ascii=False).encode("utf-8", "surrogatepass"))


def _json(record: dict[str, Any]) -> bytes:
    # Half a surrogate pair in another field becomes its escape: as bytes of its own it would make the line no UTF-8.
    return json.dumps(record, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace") + b"\n"


def _count(counts: dict[str, Counter[str]], item: Item) -> None:
    kept = item.layer is None
    n_bytes = len(item.text.encode()) if kept else 0
    # Not by +=, which forgets what is 0: of a corpus nothing may be kept.
    counts["totals"].update({"in": 1, "bytes_in": item.n_bytes, "kept": int(kept), "bytes_kept": n_bytes})
    for name, key in (("languages", item.language or "other"), ("domains", item.domain)):
        counts[name].update({f"{key}\tin": 1, f"{key}\tkept": int(kept)})
        counts[name].update({f"{key}\tbytes_in": item.n_bytes, f"{key}\tbytes_kept": n_bytes})
    if item.layer is not None:
        counts["dropped"][item.layer] += 1
        counts["dropped_bytes"][item.layer] += item.n_bytes
        counts["alone"][item.layer] += not item.also
        counts["reasons"][f"{item.layer}\t{item.reason}\t{item.language or 'other'}"] += 1
        return
    counts["masked"].update(item.masked)
    for layer, change in item.changed.items():
        counts["changed"][layer] += change
        counts["changed_documents"][layer] += 1


def _sample(found: list[tuple[int, dict[str, Any]]], item: Item) -> None:
    """Keeps the documents of the lowest hashes: the same ones in every run."""
    value = text_hash(item.text + item.place)
    if len(found) == SAMPLES and value >= -found[0][0]:
        return
    shown = {
        "reason": item.reason,
        "language": item.language,
        "domain": item.domain,
        "alone": not item.also,
        "text": item.text[:EXCERPT],
    }
    heapq.heappush(found, (-value, shown))
    if len(found) > SAMPLES:
        heapq.heappop(found)

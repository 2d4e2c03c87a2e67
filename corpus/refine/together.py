"""What only all documents together decide: groups of near-duplicates, paragraphs that stood before, full clusters.

Memory: some 40 bytes per document; paragraphs are sorted range by range of their hashes, so that of them never more
than `RANGE_BYTES` are held.

Legend: N documents, U units, K clusters.
"""

import itertools
from collections.abc import Sequence
from typing import overload

import numpy as np

from corpus.refine import clusters
from corpus.refine.config import RefineConfig
from corpus.refine.near_duplicates import NearDuplicates, first_of_group, near_others
from corpus.refine.passes import UNIT, Job
from corpus.refine.shards import write_array, writing

RANGE_BYTES = 1 << 25
# Flags of `decided/<shard>.npy`: dropped before or after paragraphs went, dropped from a full cluster; and of documents
# that were dropped before, which of the two layers would have dropped them too.
DUPLICATE, DUPLICATE_AFTER, CROWDED, ALSO_DUPLICATE, ALSO_CROWDED = 1, 2, 4, 8, 16


class _Arrays(Sequence[np.ndarray]):
    """An array of each shard, in order: memory maps that are open while they are looked at, because a corpus may have
    more shards than a process may have files."""

    def __init__(self, job: Job, name: str, shards: Sequence[str]):
        self._paths = [job.file(name, shard, "npy") for shard in shards]

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> "np.ndarray | list[np.ndarray]":
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        return np.load(self._paths[index], mmap_mode="r")


def _facts(job: Job, name: str, shards: Sequence[str], field: str) -> np.ndarray:
    return np.concatenate([np.array(facts[field]) for facts in _Arrays(job, name, shards)])


def mark(job: Job, shards: Sequence[str]) -> None:
    """Decides the first round of near-duplicates, and which units stood before: `before/<shard>.npy`, bool [U]."""
    alive_N = _facts(job, "facts", shards, "alive")
    duplicate_N = np.zeros(len(alive_N), bool)
    if NearDuplicates.name not in job.config.without:
        duplicate_N = first_of_group(_Arrays(job, "bands", shards), alive_N) != np.arange(len(alive_N))
    units = _Arrays(job, "units", shards)
    starts = _starts(job, shards)
    stood = [np.zeros(len(rows), bool) for rows in units]
    if NearDuplicates.name not in job.config.without:
        _mark_units(units, stood, starts, alive_N & ~duplicate_N)
    for shard, before_U, start, stop in zip(shards, stood, starts, starts[1:]):
        write_array(job.file("before", shard, "npy"), before_U)
        write_array(job.file("duplicates", shard, "npy"), duplicate_N[start:stop])
    with writing(job.work / "marked"):
        pass


def _starts(job: Job, shards: Sequence[str]) -> np.ndarray:
    return np.cumsum([0, *(len(facts) for facts in _Arrays(job, "facts", shards))])


def _mark_units(
    units: Sequence[np.ndarray], stood: Sequence[np.ndarray], starts: np.ndarray, alive_N: np.ndarray
) -> None:
    total = sum(map(len, units))
    n_ranges = total * UNIT.itemsize // RANGE_BYTES + 1
    edges = [(number << 64) // n_ranges for number in range(n_ranges + 1)]
    for low, high in itertools.pairwise(edges):
        parts = []
        for number, rows in enumerate(units):
            hashes = rows["hash"]
            first = int(np.searchsorted(hashes, np.uint64(low)))
            last = len(rows) if high == 1 << 64 else int(np.searchsorted(hashes, np.uint64(high)))
            document_U = rows["document"][first:last].astype(np.int64) + starts[number]
            shard_U = np.full(last - first, number)
            parts.append((np.array(hashes[first:last]), document_U, shard_U, np.arange(first, last)))
        hash_U, document_U, shard_U, place_U = map(np.concatenate, zip(*parts))
        alive_U = alive_N[document_U]
        # Within a shard units are in the order of hash, document and unit; shards come in order.
        order = np.flatnonzero(alive_U)[np.argsort(hash_U[alive_U], kind="stable")]
        again = order[1:][hash_U[order][1:] == hash_U[order][:-1]]
        for number, before_U in enumerate(stood):
            before_U[place_U[again[shard_U[again] == number]]] = True


def decide(job: Job, shards: Sequence[str], config: RefineConfig) -> None:
    """Decides the rest: near-duplicates among what paragraphs left, and full clusters. Writes the flags of every
    document."""
    alive_before_N, alive_N = (_facts(job, name, shards, "alive") for name in ("facts", "facts_after"))
    duplicate_N = np.concatenate([np.array(part) for part in _Arrays(job, "duplicates", shards)])
    flags_N = np.where(duplicate_N, DUPLICATE, 0).astype(np.uint8)
    alive_N &= ~duplicate_N
    bands = _Arrays(job, "bands_after", shards)
    if NearDuplicates.name not in config.without:
        again_N = first_of_group(bands, alive_N) != np.arange(len(alive_N))
        flags_N[again_N] |= DUPLICATE_AFTER
        alive_N &= ~again_N
        flags_N[near_others(bands, alive_N) & ~alive_before_N] |= ALSO_DUPLICATE
    if clusters.Clusters.name not in config.without:
        crowded_N = _crowded(job, shards, alive_N, config.cluster_limit)
        flags_N[crowded_N & alive_N] |= CROWDED
        flags_N[crowded_N & ~alive_N] |= ALSO_CROWDED
    starts = _starts(job, shards)
    for shard, start, stop in zip(shards, starts, starts[1:]):
        write_array(job.file("decided", shard, "npy"), flags_N[start:stop])
    with writing(job.work / "decided.done"):
        pass


def _crowded(job: Job, shards: Sequence[str], alive_N: np.ndarray, limit: float) -> np.ndarray:
    """Documents beyond the cap of their cluster, in the order of their priorities; those that are not alive, too, where
    they would have been beyond it."""
    cluster_N, priority_N = (_facts(job, "facts_after", shards, field) for field in ("cluster", "priority"))
    n_clusters = _n_clusters(job)
    sizes_K = np.bincount(cluster_N[alive_N], minlength=n_clusters)
    most = clusters.cap(sizes_K, limit, n_clusters)
    crowded_N = np.zeros(len(alive_N), bool)
    for k in np.flatnonzero(sizes_K > most):
        own = np.flatnonzero(cluster_N == k)
        last = np.partition(priority_N[own[alive_N[own]]], most - 1)[most - 1]
        crowded_N[own] = priority_N[own] > last
    return crowded_N


def _n_clusters(job: Job) -> int:
    path = job.models / "topics.npz"
    if not path.is_file():
        return 1
    with np.load(path) as file:
        return len(file["centres"])

"""The trunk's activations at the boundary: computed once, stored memory-mapped, shared by every branch.

Legend: B batch, T tokens, D model width.

A cache is a folder with one data file and a sealed manifest that says whose activations these are and holds a checksum
per batch. It is filled under another name, batch by batch, and a fill that was interrupted goes on where it stopped;
the final name appears when all of it is there.
"""

import collections
import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from foundation.files import (
    CorruptFileError,
    DiskFullError,
    fsync_path,
    naming,
    read_sealed,
    require_space,
    write_sealed,
)
from foundation.serialize import to_dict
from staged_training.data import TokenBatches
from staged_training.processes import ALONE, Processes

DATA, MANIFEST, PROGRESS = "activations.bin", "manifest.json", "progress.jsonl"

_CONTINUES = "the same command continues where it stopped"

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheIdentity:
    """What the stored numbers depend on.

    Attributes:
        trunk: hash of the trunk's config and data.
        weights: SHA-256 of the weights below the boundary.
        tokens: hash of the packed tokens and the name of their split.
        batches: batch numbers, ascending, in the order they are stored.
        shape: [B, T, D] of every batch.
        dtype: "float32" or "bfloat16".
    """

    trunk: str
    weights: str
    boundary: int
    tokens: str
    batches: tuple[int, ...]
    shape: tuple[int, int, int]
    dtype: str

    @property
    def batch_bytes(self) -> int:
        """Of one batch's activations."""
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize

    @property
    def n_bytes(self) -> int:
        """Of all activations; the manifest comes on top."""
        return self.batch_bytes * len(self.batches)


class ActivationBatches:
    """Stored x_BTD with the targets of their tokens, read from a verified cache."""

    def __init__(self, folder: Path, identity: CacheIdentity, batches: TokenBatches) -> None:
        self.folder, self.batches, self.identity = folder, batches, identity
        self._place = {batch: place for place, batch in enumerate(identity.batches)}
        self._data = np.memmap(
            folder / DATA, dtype=np.uint8, mode="r", shape=(len(identity.batches), identity.batch_bytes)
        )

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index not in self._place:
            raise IndexError(f"batch {index} is not among the {len(self._place)} whose activations are stored")
        _, targets_BT = self.batches[index]
        # A copy: the mapping is read-only and a tensor over it would invite writes that crash.
        raw = torch.from_numpy(self._data[self._place[index]].copy())
        x_BTD = raw.view(getattr(torch, self.identity.dtype)).view(self.identity.shape)
        return x_BTD.to(self.batches.device), targets_BT


def cached_activations(
    folder: Path,
    identity: CacheIdentity,
    batches: TokenBatches,
    compute: Callable[[Tensor], Tensor],
    processes: Processes = ALONE,
) -> ActivationBatches:
    """Opens the cache, after filling it where it is missing, incomplete, someone else's or damaged.

    Args:
        compute: from tokens_BT to the x_BTD at the boundary.
        processes: that compute each batch together; the first writes.

    Raises:
        DiskFullError: before anything is computed, naming what is needed and what is free.
    """
    partial = folder.with_name(f"{folder.name}.partial")

    def begun() -> dict[int, str] | None:
        """None where the cache can be opened; else what is in it already, see `_resumable`."""
        if folder.exists():
            try:
                verify(folder, identity)
                return None
            except CorruptFileError as error:
                log.warning("activation cache refused and rebuilt: %s", error)
                shutil.rmtree(folder)
        return _resumable(partial, identity) or _begun(partial, identity)

    if (done := processes.from_first(begun)) is not None:
        # What all compute, in the order of all, whoever writes it.
        missing = (
            (place, compute(batches[batch][0])) for place, batch in enumerate(identity.batches) if place not in done
        )
        if processes.first:
            _fill(partial, identity, missing, done)
            partial.rename(folder)
            fsync_path(folder.parent)
        else:
            collections.deque(missing, maxlen=0)
        processes.from_first(lambda: None)
    return ActivationBatches(folder, identity, batches)


def verify(folder: Path, identity: CacheIdentity) -> None:
    """Compares manifest and every batch with what is asked.

    Raises:
        CorruptFileError: naming the cache and what is wrong with it.
    """
    try:
        manifest = read_sealed(folder / MANIFEST)
        asked = to_dict(identity)
        if differing := [key for key in asked if manifest["identity"].get(key) != asked[key]]:
            shown = ", ".join(
                f"{key} is {_short(manifest['identity'].get(key))} instead of {_short(asked[key])}" for key in differing
            )
            raise CorruptFileError(f"it belongs to another run: {shown}")
        size = (folder / DATA).stat().st_size if (folder / DATA).is_file() else 0
        if size != identity.n_bytes:
            raise CorruptFileError(f"{DATA} has {size} bytes instead of {identity.n_bytes}")
        data = np.memmap(folder / DATA, dtype=np.uint8, mode="r", shape=(len(identity.batches), identity.batch_bytes))
        for batch, row, expected in zip(identity.batches, data, manifest["checksums"]):
            if _checksum(row) != expected:
                raise CorruptFileError(f"batch {batch} in {DATA} does not match its checksum")
    except CorruptFileError as error:
        raise CorruptFileError(f"{folder}: {error}") from None


def _begun(partial: Path, identity: CacheIdentity) -> dict[int, str]:
    """A new fill with nothing in it."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    require_space(partial.parent, identity.n_bytes, f"activation cache {partial.stem}")
    partial.mkdir()
    with naming(partial / PROGRESS, _CONTINUES):
        (partial / PROGRESS).write_text(json.dumps(to_dict(identity)) + "\n")
    _reserve(partial, identity.n_bytes)
    return {}


def _fill(partial: Path, identity: CacheIdentity, missing: Iterable[tuple[int, Tensor]], done: dict[int, str]) -> None:
    data = np.memmap(partial / DATA, dtype=np.uint8, mode="r+", shape=(len(identity.batches), identity.batch_bytes))
    with naming(partial / PROGRESS, _CONTINUES), open(partial / PROGRESS, "a", encoding="utf-8") as progress:
        for place, x_BTD in missing:
            assert (tuple(x_BTD.shape), x_BTD.dtype) == (identity.shape, getattr(torch, identity.dtype)), (
                x_BTD.shape,
                x_BTD.dtype,
            )
            data[place] = x_BTD.contiguous().view(-1).view(torch.uint8).cpu().numpy()
            done[place] = _checksum(data[place])
            progress.write(json.dumps([place, done[place]]) + "\n")
            progress.flush()
    data.flush()
    fsync_path(partial / DATA)
    (partial / PROGRESS).unlink()
    write_sealed(
        partial / MANIFEST,
        {"identity": to_dict(identity), "checksums": [done[place] for place in range(len(identity.batches))]},
    )
    fsync_path(partial)


def _reserve(partial: Path, n_bytes: int) -> None:
    """Makes the data file with all its blocks: a disk that runs full under a mapped file kills the process instead of
    raising an error."""
    try:
        with open(partial / DATA, "wb") as file:
            _allocate(file, n_bytes)
    except OSError as error:
        shutil.rmtree(partial)
        raise DiskFullError(
            f"activation cache {partial.name} needs {n_bytes / 2**20:.1f} MiB in {partial.parent}: {error}"
        ) from error


def _allocate(file: IO[bytes], n_bytes: int) -> None:
    """Gives a file its blocks; where the system has no call for it (macOS), by writing them."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, n_bytes)
        return
    block = bytes(1 << 20)
    for start in range(0, n_bytes, len(block)):
        file.write(block[: n_bytes - start])
    file.flush()


def _resumable(partial: Path, identity: CacheIdentity) -> dict[int, str]:
    """Places and checksums of the batches that an interrupted fill has really left on the disk."""
    try:
        first, *lines = (partial / PROGRESS).read_text().splitlines()
        if json.loads(first) != to_dict(identity) or (partial / DATA).stat().st_size != identity.n_bytes:
            return {}
        data = np.memmap(partial / DATA, dtype=np.uint8, mode="r", shape=(len(identity.batches), identity.batch_bytes))
    except (OSError, ValueError):
        return {}
    done = {}
    for line in lines:
        try:
            place, checksum = json.loads(line)
        except ValueError:
            # The line that was being written when the fill stopped.
            break
        if _checksum(data[place]) == checksum:
            done[place] = checksum
    return done


def weights_hash(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _checksum(row: np.ndarray) -> str:
    return hashlib.sha256(row.data).hexdigest()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."

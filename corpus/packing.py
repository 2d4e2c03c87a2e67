"""Token streams on disk: plain little-endian binary shards and one JSON index, read by memory map.

All documents of a split form one stream, each after its boundary token; a position in it is one integer, whatever the
shards.

    index.json                  format, dtype, counts, and size and SHA-256 of each file below
    tokens_00000.bin ...        uint16, or uint32 where the vocabulary needs it
    document_offsets.bin        int64, where each document's boundary token stands, and the length of the stream at the
                                end
"""

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from foundation.files import sha256_file

FORMAT = 1
INDEX = "index.json"
OFFSETS = "document_offsets.bin"
OFFSETS_DTYPE = "<i8"


def pack(
    folder: Path,
    documents: Iterable[tuple[Sequence[int], int]],
    *,
    vocab_size: int,
    boundary_id: int,
    shard_tokens: int,
) -> "PackedTokens":
    """Writes a stream into `folder`, which must not exist.

    The index is written last. For a folder that appears at once, complete and synced, see
    `foundation.files.atomic_folder`.

    Args:
        documents: ids without boundary, and the UTF-8 bytes of the text, of each.
        shard_tokens: tokens that a shard file holds.

    Raises:
        ValueError: for no documents or a shard size below 1.
    """
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens must be at least 1, got {shard_tokens}")
    folder.mkdir()
    dtype = "<u2" if vocab_size <= 1 << 16 else "<u4"
    offsets, n_bytes = array("q", [0]), 0

    def with_boundaries() -> Iterator[np.ndarray]:
        nonlocal n_bytes
        for ids, n_document_bytes in documents:
            tokens = np.array([boundary_id, *ids], dtype=np.int64)
            assert 0 <= tokens.min() <= tokens.max() < vocab_size
            offsets.append(offsets[-1] + len(tokens))
            n_bytes += n_document_bytes
            yield tokens.astype(dtype)

    shards = _write_shards(folder, with_boundaries(), shard_tokens)
    if not shards:
        raise ValueError("no documents to pack")
    index = {
        "format": FORMAT,
        "dtype": dtype,
        "n_tokens": offsets[-1],
        "n_documents": len(offsets) - 1,
        "n_bytes": n_bytes,
        "shards": shards,
        "document_offsets": _write(folder / OFFSETS, np.array(offsets, dtype=OFFSETS_DTYPE)),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1))
    return PackedTokens(folder)


def _write_shards(folder: Path, arrays: Iterable[np.ndarray], length: int) -> list[dict[str, object]]:
    """The concatenation of `arrays` in files of `length`, the last one shorter; each is written as it comes."""
    shards: list[dict[str, object]] = []
    file, room = None, 0
    for part in arrays:
        while len(part):
            if file is None:
                file, room = _Writing(folder / f"tokens_{len(shards):05d}.bin"), length
            file.write(part[:room])
            part, room = part[room:], max(room - len(part), 0)
            if not room:
                shards.append(file.close())
                file = None
    return shards if file is None else [*shards, file.close()]


class _Writing:
    """A file on its way, and what the index says of it."""

    def __init__(self, path: Path):
        self._path, self._file = path, path.open("wb")
        self._size, self._hash = 0, hashlib.sha256()

    def write(self, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values).view(np.uint8).data
        self._file.write(data)
        self._hash.update(data)
        self._size += len(data)

    def close(self) -> dict[str, object]:
        self._file.close()
        return {"file": self._path.name, "size": self._size, "sha256": self._hash.hexdigest()}


def _write(path: Path, values: np.ndarray) -> dict[str, object]:
    file = _Writing(path)
    file.write(values)
    return file.close()


class ShardedTokens:
    """The shards as one sequence: `len`, an index or a slice (step 1).

    A slice within one shard is a view of the memory map.
    """

    def __init__(self, shards: list[np.ndarray]):
        self._shards = shards
        self._starts = np.cumsum([0, *map(len, shards)])
        self.dtype = shards[0].dtype

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int | slice) -> np.ndarray | int:
        if not isinstance(index, slice):
            position = range(len(self))[index]
            return int(self._slice(position, position + 1)[0])
        start, stop, step = index.indices(len(self))
        if step != 1:
            raise ValueError(f"a slice of packed tokens has step 1, got {step}")
        return self._slice(start, max(start, stop))

    def _slice(self, start: int, stop: int) -> np.ndarray:
        first = max(int(np.searchsorted(self._starts, start, side="right")) - 1, 0)
        parts: list[np.ndarray] = []
        for shard, shard_start in zip(self._shards[first:], self._starts[first:]):
            if shard_start >= stop:
                break
            parts.append(shard[start - shard_start if start > shard_start else 0 : stop - shard_start])
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, self.dtype)


class PackedTokens:
    """A packed stream, opened for reading.

    Attributes:
        tokens: see `ShardedTokens`.
        document_offsets: int64 [documents + 1]; document d is tokens[offsets[d] : offsets[d + 1]], boundary first.
        n_bytes: UTF-8 bytes of all texts.

    Raises:
        ValueError: naming the file that is missing or does not have its size.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index_path = self.folder / INDEX
        try:
            index = json.loads(index_path.read_text())
            if index["format"] != FORMAT:
                raise ValueError(f"format {index['format']}, this version reads format {FORMAT}")
            self.n_bytes: int = index["n_bytes"]
            self.n_documents: int = index["n_documents"]
            n_tokens: int = index["n_tokens"]
            dtype: str = index["dtype"]
            offsets, shards = index["document_offsets"], index["shards"]
            self._files = [
                (self.folder / entry["file"], int(entry["size"]), str(entry["sha256"])) for entry in (offsets, *shards)
            ]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{index_path}: no readable index of packed tokens here ({error})") from error
        for path, expected, _ in self._files:
            size = path.stat().st_size if path.is_file() else None
            if size != expected:
                raise ValueError(
                    f"{path}: {'missing' if size is None else f'{size} bytes'}, the index says {expected} bytes"
                )
        offsets_file, *shard_files = [path for path, _, _ in self._files]
        self.document_offsets: np.ndarray = np.memmap(offsets_file, dtype=OFFSETS_DTYPE, mode="r")
        self.tokens = ShardedTokens([np.memmap(path, dtype=dtype, mode="r") for path in shard_files])
        if (
            not len(self.tokens) == self.document_offsets[-1] == n_tokens
            or len(self.document_offsets) != self.n_documents + 1
        ):
            raise ValueError(f"{index_path}: the counts do not agree with the files")

    def __len__(self) -> int:
        return len(self.tokens)

    def window(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length) as a fresh int64 array.

        Raises:
            ValueError: where they are not all there.
        """
        if start < 0 or length < 1 or start + length > len(self):
            raise ValueError(f"no window of {length} tokens at position {start}: the stream has {len(self)} tokens")
        return np.array(self.tokens[start : start + length], dtype=np.int64)

    def fingerprint(self) -> str:
        """Equal for equal tokens in equal shards."""
        return sha256_file(self.folder / INDEX)

    def verify(self) -> None:
        """Reads every file and compares its SHA-256 with the index.

        Raises:
            ValueError: naming the first that differs.
        """
        for path, _, expected in self._files:
            if sha256_file(path) != expected:
                raise ValueError(f"{path}: content differs from its checksum")

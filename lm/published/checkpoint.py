"""A published checkpoint: safetensors files, one or several shards with an index, read and written tensor by tensor."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from foundation.files import CorruptFileError, DiskFullError, read_json, write_json
from lm.published.mxfp4 import BLOCKS, GROUP, SCALES, dequantised

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SHARD_BYTES = 5_000_000_000


class Entry(NamedTuple):
    """One tensor of a checkpoint.

    Attributes:
        shard: the file it lies in.
        shape, dtype: as its header says.
    """

    shard: str
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """The safetensors files of a folder; headers are read now, tensors when they are asked for.

    Args:
        folder: where they lie.
        single: name of the file where there is one only.

    Raises:
        ValueError: where there are none, or shards of the index are missing; names them.
        CorruptFileError: for a file that cannot be read, or lacks what the index promises; names it.
    """

    def __init__(self, folder: Path, single: str = SINGLE) -> None:
        self.folder, self.single = folder, single
        self.entries: dict[str, Entry] = {}
        self._names: dict[str, str] = {}
        self._rows: dict[str, tuple[str, slice | tuple[int, slice]]] = {}
        self._packed: dict[str, dict[str, Entry]] = {}
        self._files: dict[str, Any] = {}
        promised = self._promised()
        shards = sorted(set(promised.values())) or [single]
        if missing := [shard for shard in shards if not (folder / shard).is_file()]:
            raise ValueError(f"{folder}: {', '.join(missing)} missing, of {len(shards)} files of the checkpoint")
        for shard in shards:
            file = self._files[shard] = self._open(shard)
            for name in file.keys():  # noqa: SIM118
                view = file.get_slice(name)
                self.entries[name] = Entry(shard, tuple(view.get_shape()), view.get_dtype())
        if lost := [name for name, shard in promised.items() if name not in self.entries]:
            raise CorruptFileError(
                f"{folder / INDEX} promises {lost[0]} in {promised[lost[0]]}, which does not hold it"
                f" ({len(lost)} such tensors)"
            )

    def read(self, name: str) -> Tensor:
        """One tensor, as it is stored.

        Raises:
            ValueError: for a dtype that is no floating point of 16 or 32 bits; names the tensor.
        """
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise ValueError(f"{self.folder / entry.shard}: {name} is {entry.dtype}; legal: {', '.join(DTYPES)}")
        file = self._files[entry.shard]
        if name in self._packed:
            blocks, scales = (self._files[one.shard].get_tensor(name + end) for end, one in self._packed[name].items())
            try:
                return dequantised(blocks, scales)
            except ValueError as error:
                raise CorruptFileError(f"{self.folder / entry.shard}: {name}: {error}") from None
        if name in self._rows:
            whole, rows = self._rows[name]
            return file.get_slice(self._names.get(whole, whole))[rows]
        return file.get_tensor(self._names.get(name, name))

    def rename(self, patterns: Mapping[str, str]) -> None:
        """Calls tensors by other names from now on.

        Args:
            patterns: regular expressions of whole names, each with what `re.sub` makes of one.
        """
        for name in list(self.entries):
            for pattern, other in patterns.items():
                if re.fullmatch(pattern, name) and (new := re.sub(pattern, other, name)) not in self.entries:
                    self._names[new] = self._names.pop(name, name)
                    self.entries[new] = self.entries.pop(name)
                    break

    def unpack(self) -> int:
        """Takes tensors in MXFP4, each stored as blocks and scales, for the bf16 ones that they stand for from now on;
        returns how many there are."""
        for blocks in [name for name in self.entries if name.endswith(BLOCKS)]:
            name = blocks.removesuffix(BLOCKS)
            parts = {end: self.entries.get(name + end) for end in (BLOCKS, SCALES)}
            found = {end: part for end, part in parts.items() if part is not None and part.dtype == "U8"}
            if len(found) == 2 and len(found[BLOCKS].shape) == 4:
                E, F, G, _ = found[BLOCKS].shape
                for end in found:
                    del self.entries[name + end]
                self._packed[name] = found
                self.entries[name] = Entry(found[BLOCKS].shard, (E, G * GROUP, F), "BF16")
        return len(self._packed)

    def unstack(self, stacked: Mapping[str, Sequence[Mapping[str, int]]]) -> None:
        """Takes tensors [E, R, C] for the matrices of E experts from now on.

        Args:
            stacked: of a tensor, for every expert the names and heights of what lies below each other in it. One of
                another shape stays as it is.
        """
        for whole, experts in stacked.items():
            shape = (len(experts), sum(experts[0].values()))
            if whole in self.entries and self.entries[whole].shape[:-1] == shape:
                entry = self.entries.pop(whole)
                for e, heights in enumerate(experts):
                    at = 0
                    for name, height in heights.items():
                        self.entries[name] = entry._replace(shape=(height, entry.shape[-1]))
                        self._rows[name] = whole, (e, slice(at, at + height))
                        at += height

    def cut(self, pieces: Mapping[str, Mapping[str, int]]) -> None:
        """Takes tensors for several from now on, one below the other.

        Args:
            pieces: of a tensor, the names and heights of what it is made of. One of another height stays as it is.
        """
        for whole, heights in pieces.items():
            if whole in self.entries and self.entries[whole].shape[:1] == (sum(heights.values()),):
                entry, at = self.entries.pop(whole), 0
                for name, height in heights.items():
                    self.entries[name] = entry._replace(shape=(height, *entry.shape[1:]))
                    self._rows[name] = whole, slice(at, at + height)
                    at += height

    def _promised(self) -> dict[str, str]:
        """By tensor, the file that the index says it is in; empty without an index."""
        if (self.folder / INDEX).is_file():
            promised = read_json(self.folder / INDEX).get("weight_map")
            if not isinstance(promised, dict) or not promised:
                raise CorruptFileError(f"{self.folder / INDEX} has no weight_map")
            return promised
        if not (self.folder / self.single).is_file():
            other = sorted(path.name for path in self.folder.glob("*.bin"))
            found = f"; {other[0]} is pickled, which is never read here" if other else ""
            raise ValueError(f"{self.folder} holds no {self.single} and no {INDEX}{found}")
        return {}

    def _open(self, shard: str) -> Any:
        try:
            return safetensors.safe_open(self.folder / shard, "pt")
        except (safetensors.SafetensorError, OSError) as error:
            raise CorruptFileError(f"{self.folder / shard} cannot be read ({error}): get the file again") from error


def write_checkpoint(
    folder: Path,
    sizes: Mapping[str, int],
    tensors: Callable[[str], Tensor],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a checkpoint shard by shard, in the order of `sizes`.

    Args:
        sizes: bytes of each tensor.
        tensors: each of them by name, asked for when it is its turn.
        shard_bytes: a file's size; a tensor that is larger has one of its own.

    Raises:
        DiskFullError: naming the folder.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    one = len(shards) == 1
    names = [SINGLE if one else f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for file, inside in zip(names, shards):
        try:
            safetensors.torch.save_file(
                {name: tensors(name).contiguous() for name in inside}, folder / file, metadata={"format": "pt"}
            )
        except safetensors.SafetensorError as error:
            raise DiskFullError(f"{folder / file} could not be written: {error}") from error
    if not one:
        where = {name: file for file, inside in zip(names, shards) for name in inside}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where})

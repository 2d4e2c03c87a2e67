"""The tensors of a checkpoint that several processes wrote, and what is cut of whole ones: in torch's distributed
format, one file per process, which any number of processes can load.

Its index says as a pickle which tensor lies in which file. A checksum shows that a file is as it was written, not who
wrote it: continue runs of your own only.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.tensor import DTensor, distribute_tensor

MODEL, OPTIMIZER, MERGED = "model", "optimizer", "merged"


def whole_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and the optimizer's state, whole, on the CPU, by the names that a checkpoint of one process gives
    them."""
    known = FileSystemReader(folder).read_metadata().state_dict_metadata
    found: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in known.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load_shards(found, checkpoint_id=folder, no_dist=True)
    weights, optimizer = {}, {}
    for path, tensor in found.items():
        part, _, name = path.partition(".")
        if part == MODEL:
            weights[name] = tensor
        elif part == MERGED:
            optimizer[f"{MERGED}:{name}"] = tensor
        else:
            name, _, key = name.removeprefix("state.").rpartition(".")
            optimizer[f"{key}:{name}"] = tensor
    return weights, optimizer


@torch.no_grad()
def fill(state: dict[str, Any], weights: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
    """Copies whole tensors into what a process has of them.

    Args:
        state: as its processes write it: "model", "optimizer" and, where weights are merged, "merged".
        weights, optimizer: see `whole_tensors`.
    """
    for name, tensor in state[MODEL].items():
        tensor.copy_(cut_as(weights[name], tensor))
    for name, entries in state[OPTIMIZER]["state"].items():
        for key, tensor in entries.items():
            tensor.copy_(cut_as(optimizer[f"{key}:{name}"], tensor))
    for name, tensor in state.get(MERGED, {}).items():
        tensor.copy_(cut_as(optimizer[f"{MERGED}:{name}"], tensor))


def cut_as(whole: Tensor, part: Tensor) -> Tensor:
    """A tensor that all processes have whole, cut over them as another of its shape is."""
    if not isinstance(part, DTensor):
        return whole
    # Without a source rank nothing is sent: each process cuts its part out of what is the same everywhere.
    return distribute_tensor(whole.to(part.device), part.device_mesh, part.placements, src_data_rank=None)

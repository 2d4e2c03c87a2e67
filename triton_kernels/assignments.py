"""Sort the slots that a router filled by expert: which rows each expert computes, and where each token finds its rows again.

Legend: T tokens, K slots per token, E experts, N = T * K slots, and rows once they are sorted.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from triton_kernels.checks import check_backend


class Rows(NamedTuple):
    """The fields of `routing.assignments.Assignments`, which says what they hold; weight_N carries the gradient of the slots' weights."""

    weight_N: Tensor
    token_N: Tensor
    expert_N: Tensor
    expert_offsets: Tensor
    token_offsets: Tensor
    row_of_slot_N: Tensor


def sort_slots(
    expert_TK: Tensor, weight_TK: Tensor, keep_TK: Tensor | None, *, n_experts: int, padded: bool | None = None, backend: str = "auto"
) -> Rows:
    """A stable sort by expert of the kept slots.

    expert_TK  integers in [0, n_experts); what a dropped slot holds does not matter
    weight_TK  floating point
    keep_TK    bool, or None to keep every slot
    padded     leave dropped slots as rows of weight zero behind the last expert (True; the default but on the CPU, where counting the kept ones
               makes nobody wait, and the only way of the Triton kernels)
    backend    "torch", "triton", or "auto": Triton on CUDA tensors

    Raises ValueError for shapes that differ, and for padded = False with the Triton kernels.
    """
    if expert_TK.shape != weight_TK.shape or (keep_TK is not None and keep_TK.shape != expert_TK.shape):
        shapes = f"experts {tuple(expert_TK.shape)}, weights {tuple(weight_TK.shape)}, keep {None if keep_TK is None else tuple(keep_TK.shape)}"
        raise ValueError(f"slots must have one shape [T, K], got {shapes}")
    # Slots can be taken out only by waiting for their number.
    if check_backend(backend, expert_TK) == "torch" or (backend == "auto" and padded is False):
        return sort_slots_torch(expert_TK, weight_TK, keep_TK, n_experts, expert_TK.device.type != "cpu" if padded is None else padded)
    if padded is False:
        raise ValueError("sort_slots: padded = False; the Triton kernels cannot know how many slots are kept, and leave the others as padding")
    # Imported here because machines without Triton (macOS) still have the torch backend.
    from triton_kernels.assignments_triton import sort_slots_op

    return Rows(*sort_slots_op(weight_TK, expert_TK, keep_TK, n_experts)[:-1])


def sort_slots_torch(expert_TK: Tensor, weight_TK: Tensor, keep_TK: Tensor | None, n_experts: int, padded: bool) -> Rows:
    n_tokens, n_slots = expert_TK.shape
    # Dropped slots sort behind every expert. A stable sort of slots that lie in token order leaves each expert's rows in token order.
    # int16 because torch's radix sort on the CPU is several times faster on narrow integers.
    bucket_TK = expert_TK if keep_TK is None else expert_TK.masked_fill(~keep_TK, n_experts)
    bucket_N = bucket_TK.reshape(-1).to(torch.int16 if n_experts < 2**15 else torch.int32)
    expert_N, slot_of_row_N = torch.sort(bucket_N, stable=True)
    row_of_slot_N = torch.empty_like(slot_of_row_N)
    row_of_slot_N[slot_of_row_N] = torch.arange(n_tokens * n_slots, device=slot_of_row_N.device)
    bounds = torch.arange(n_experts + 1, device=expert_N.device, dtype=expert_N.dtype)
    expert_offsets = torch.searchsorted(expert_N, bounds)
    if keep_TK is None:
        token_offsets = torch.arange(n_tokens + 1, device=expert_TK.device) * n_slots
    else:
        kept_N = keep_TK.reshape(-1)
        token_offsets = torch.nn.functional.pad(keep_TK.sum(dim=1).cumsum(dim=0), (1, 0))
        if padded:
            # Kept slots first, each group in its old order: a compaction whose size the host need not know.
            row_of_slot_N = row_of_slot_N[torch.sort((~kept_N).to(torch.uint8), stable=True)[1]]
            weight_TK = weight_TK.masked_fill(~keep_TK, 0.0)
        else:
            row_of_slot_N = row_of_slot_N[kept_N]
            n_rows = row_of_slot_N.shape[0]
            expert_N, slot_of_row_N = expert_N[:n_rows], slot_of_row_N[:n_rows]
    return Rows(
        token_N=slot_of_row_N // max(n_slots, 1),
        expert_N=expert_N.to(torch.int64),
        weight_N=weight_TK.reshape(-1).index_select(0, slot_of_row_N),
        expert_offsets=expert_offsets,
        token_offsets=token_offsets,
        row_of_slot_N=row_of_slot_N,
    )

"""Copies of weights as products in bf16 read them (`kept_weights.c`): made once, and used while a weight is unchanged.

They take half of the weights' memory again, for as long as a weight lives, so models that would not leave enough of it
keep none. What changes a weight in place is counted by torch, and the copy is made anew. What writes through `.data` is
not counted, so whenever a cache is first used numbers of every row are looked at: a single number written so is the one
thing that goes unseen.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from foundation.environment import memory_bytes
from triton_kernels.native.library import call, rounds_products, threads

# As in kept_weights.c.
PANEL_COLUMNS = 32
# Weights of more than this share of the machine's memory are not copied.
MOST_OF_MEMORY = 0.25


class Kept(NamedTuple):
    """A copy, and what its weight was when it was made."""

    address: int
    version: int
    looked_at: int
    panels: Tensor


KEPT = WeakTensorKeyDictionary()


def keeps_weights(dtype: torch.dtype, n_bytes: int) -> bool:
    """Whether a model that computes in this dtype keeps copies of weights of so many bytes."""
    return rounds_products(dtype) and n_bytes <= MOST_OF_MEMORY * memory_bytes()


def kept_panels(weight: Tensor, *, transposed: bool) -> Tensor | None:
    """Panels of a dense weight [I, O] or [E, I, O] in fp32, or of a transposed one [O, I]; None where nobody could say
    whether they are still its own."""
    if weight.is_inference():
        return None
    # One of each row, and in time of every column.
    step = (weight.shape[-1] - 1) | 1
    looked_at = int(weight.detach().view(torch.int32).flatten()[::step].sum())
    stands = weight.data_ptr(), weight._version, looked_at
    kept = KEPT.get(weight)
    if kept is None or kept[:3] != stands:
        n_experts, (n_in, n_out) = weight.shape[:-2].numel(), weight.shape[-2:]
        if transposed:
            n_in, n_out = n_out, n_in
        n_panels = n_experts * -(-n_out // PANEL_COLUMNS)
        panels = torch.empty(n_panels, -(-n_in // 2), PANEL_COLUMNS, dtype=torch.int32)
        call("keep_weights", weight.detach(), panels, n_experts, n_in, n_out, transposed, threads())
        kept = KEPT[weight] = Kept(*stands, panels)
    return kept.panels

"""How one tensor of ours is made of published ones, and back: each layout only moves numbers, so both ways are exact.

Legend: D model width, F expert width, E experts, H heads, K head width, X channels, W taps.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Both directions.

    Attributes:
        join: ours from the published tensors, in the order that `Stored.theirs` has them.
        split: its inverse.
    """

    join: Callable[[Sequence[Tensor]], Tensor]
    split: Callable[[Tensor], Sequence[Tensor]]


class Stored(NamedTuple):
    """Where a tensor of ours is found in a published checkpoint.

    Attributes:
        ours: its name in `LanguageModel.state_dict`.
        theirs: the published tensors that it is made of.
        layout: how.
    """

    ours: str
    theirs: tuple[str, ...]
    layout: Layout


SAME = Layout(lambda parts: parts[0], lambda whole: [whole])


def rows(*heights: int) -> Layout:
    """Matrices [height, D] one below the other."""
    return Layout(lambda parts: torch.cat(list(parts)), lambda whole: whole.split(heights))


def reshaped(ours: Sequence[int], theirs: Sequence[int]) -> Layout:
    """The same numbers in the same order, in another shape."""
    return Layout(lambda parts: parts[0].reshape(*ours), lambda whole: [whole.reshape(*theirs)])


def transposed_rows(n_parts: int) -> Layout:
    """Matrices [F, D], n_parts of equal height, as one [D, n_parts F]."""
    return Layout(lambda parts: torch.cat(list(parts)).T, lambda whole: whole.T.chunk(n_parts))


def experts(n_experts: int, n_parts: int) -> Layout:
    """For every expert its matrices [F, D], n_parts of equal height, as one [E, D, n_parts F]."""
    one = transposed_rows(n_parts)

    def join(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([one.join(parts[e * n_parts : (e + 1) * n_parts]) for e in range(n_experts)])

    return Layout(join, lambda whole: [part for matrix in whole for part in one.split(matrix)])

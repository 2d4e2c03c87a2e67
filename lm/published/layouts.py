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
        any_heights: whether files split the rows among the published tensors in more than one way; export writes that
            of `layout`.
    """

    ours: str
    theirs: tuple[str, ...]
    layout: Layout
    any_heights: bool = False


SAME = Layout(lambda parts: parts[0], lambda whole: [whole])


def rows(*heights: int) -> Layout:
    """Matrices [height, D] one below the other."""
    return Layout(lambda parts: torch.cat(list(parts)), lambda whole: whole.split(heights))


def reshaped(ours: Sequence[int], theirs: Sequence[int]) -> Layout:
    """The same numbers in the same order, in another shape."""
    return Layout(lambda parts: parts[0].reshape(*ours), lambda whole: [whole.reshape(*theirs)])


def reordered(order: Sequence[int]) -> Layout:
    """The rows of one matrix in another order.

    Args:
        order: of every row of ours, which published one it is.
    """
    back = sorted(range(len(order)), key=order.__getitem__)
    return Layout(lambda parts: parts[0][list(order)], lambda whole: [whole[back]])


def chained(first: Layout, second: Layout) -> Layout:
    """One layout that makes one tensor of the published ones, and another that makes ours of it."""
    return Layout(lambda parts: second.join([first.join(parts)]), lambda whole: first.split(second.split(whole)[0]))


TRANSPOSED = Layout(lambda parts: parts[0].mT, lambda whole: [whole.mT])


def headwise(n_heads: int, *groups: tuple[int, ...], order: Sequence[int] | None = None) -> Layout:
    """Matrices that hold, head by head, several things one below the other, sorted by thing instead.

    Args:
        n_heads: of all matrices.
        groups: for every published matrix [n_heads * sum(heights), D], the heights of the things that each of its
            heads holds. Ours is thing by thing, every one with all its heads.
        order: which of the things, counted through all matrices, comes at each place of ours; as they are by default.
    """
    heights = [height for group in groups for height in group]
    places = list(order or range(len(heights)))

    def join(parts: Sequence[Tensor]) -> Tensor:
        things = [
            thing.flatten(0, 1)
            for part, group in zip(parts, groups)
            for thing in part.unflatten(0, (n_heads, -1)).split(group, dim=1)
        ]
        return torch.cat([things[place] for place in places])

    def split(whole: Tensor) -> list[Tensor]:
        pieces = whole.split([n_heads * heights[place] for place in places])
        things = iter([pieces[places.index(place)].unflatten(0, (n_heads, -1)) for place in range(len(places))])
        return [torch.cat([next(things) for _ in group], dim=1).flatten(0, 1) for group in groups]

    return Layout(join, split)


def below(*layouts: tuple[int, int, Layout]) -> Layout:
    """Several layouts of [rows, D] one below the other.

    Args:
        layouts: of each, how many published tensors it takes, how many rows it makes, and itself.
    """

    def join(parts: Sequence[Tensor]) -> Tensor:
        found, at = [], 0
        for n_parts, _, layout in layouts:
            found.append(layout.join(parts[at : at + n_parts]))
            at += n_parts
        return torch.cat(found)

    def split(whole: Tensor) -> list[Tensor]:
        pieces = whole.split([height for _, height, _ in layouts])
        return [part for piece, (_, _, layout) in zip(pieces, layouts) for part in layout.split(piece)]

    return Layout(join, split)


def transposed_rows(n_parts: int) -> Layout:
    """Matrices [F, D], n_parts of equal height, as one [D, n_parts F]."""
    return Layout(lambda parts: torch.cat(list(parts)).T, lambda whole: whole.T.chunk(n_parts))


def experts(n_experts: int, n_parts: int) -> Layout:
    """For every expert its matrices [F, D], n_parts of equal height, as one [E, D, n_parts F]."""
    one = transposed_rows(n_parts)

    def join(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([one.join(parts[e * n_parts : (e + 1) * n_parts]) for e in range(n_experts)])

    return Layout(join, lambda whole: [part for matrix in whole for part in one.split(matrix)])

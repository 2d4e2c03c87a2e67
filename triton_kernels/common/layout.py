"""How a tensor lies in memory, where a kernel computes its offsets from the shape. Nothing here imports Triton."""

from torch import Tensor


def in_one_piece(x: Tensor) -> Tensor:
    """x with the strides of a fresh tensor, copied only if its elements lie otherwise.

    `.contiguous()` leaves the stride of an axis of size 1 as it is, whatever that says, and a launcher that hands it to
    a kernel has the next row read elsewhere."""
    if not x.is_contiguous():
        return x.contiguous()
    strides, step = [], 1
    for size in reversed(x.shape):
        strides.append(step)
        step *= max(1, size)
    return x if 1 not in x.shape else x.as_strided(x.shape, strides[::-1])

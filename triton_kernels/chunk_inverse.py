"""The inverse every delta rule needs: of the unit lower triangular matrix that says how the tokens of a chunk correct one another."""

import torch
from torch import Tensor


def invert_unit_lower(a_XCC: Tensor, block: int = 4) -> Tensor:
    """(I + a)^-1 of strictly lower triangular matrices [X, C, C]; C is at most `block`, or `block` times a power of two.

    Diagonal blocks by doubling, (I - a)(I + a^2)(I + a^4)...: exact because a^block = 0, and so short that the powers cannot grow (at 16 they reach
    1e6 when keys repeat and beta is 2). Neighbouring blocks are then merged: the inverse of [[P, 0], [R, Q]] is [[P^-1, 0], [-Q^-1 R P^-1, Q^-1]].
    """
    size = a_XCC.shape[-1]
    block = min(block, size)
    n_blocks = size // block
    diagonal = a_XCC.view(-1, n_blocks, block, n_blocks, block).diagonal(dim1=1, dim2=3).movedim(-1, 1).reshape(-1, block, block)
    inverse = torch.eye(block, dtype=a_XCC.dtype, device=a_XCC.device) - diagonal
    power, reach = diagonal, 2
    while reach < block:
        power = torch.bmm(power, power)
        inverse = torch.baddbmm(inverse, inverse, power)
        reach *= 2
    while block < size:
        n_blocks //= 2
        upper, lower = inverse.view(-1, n_blocks, 2, block, block).unbind(2)
        between = torch.stack([a_XCC[:, i + block : i + 2 * block, i : i + block] for i in range(0, size, 2 * block)], dim=1)
        merged = a_XCC.new_zeros(len(a_XCC), n_blocks, 2 * block, 2 * block)
        merged[..., :block, :block] = upper
        merged[..., block:, block:] = lower
        merged[..., block:, :block] = -(lower @ (between @ upper))
        inverse, block = merged, 2 * block
    return inverse.view(a_XCC.shape)

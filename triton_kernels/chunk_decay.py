"""What a gate means inside the chunks of a block, for the torch references: the one thing that differs between the linear-attention ops.

Everything is an exponential of a difference that is at most 0, so nothing overflows and the hidden half of a chunk gives no 0 * inf. Exponentials
are powers of two: on a CPU exp2 is 4 to 25 times faster than exp.
Letters: n chunks of a block, M = B * H, C chunk length, P pairs of neighbouring sub-chunks, s their length, K key width.
"""

from math import e, log2
from typing import Protocol

import torch
from torch import Tensor

# Sub-chunks of this length are computed pair by pair.
EXACT = 4


class Decay(Protocol):
    # With c the inclusive cumulative log-decay: e^c and e^{c_C - c} [n, M, C, 1 or K], e^{c_C} [n, M, 1 or K, 1].
    from_start: Tensor
    to_end: Tensor
    whole: Tensor

    def scores(self, rows: Tensor, keys: Tensor) -> Tensor:
        """sum_d rows_id keys_jd e^{c_id - c_jd} [n, M, C, C] for j <= i, else 0; rows and keys are [n, M, C, K]."""
        ...

    def scores_backward(self, dscores: Tensor, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of rows and keys; takes `dscores` for its own."""
        ...


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of [n, M, ., .] stacks, as one batch that is read in place (torch.matmul would copy transposed operands)."""
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])


class ScalarDecay:
    """One decay per token and head: e^{c_i - c_j} multiplies the scores from outside."""

    def __init__(self, g_nMC: Tensor, within: Tensor | None = None):
        """within: e^{c_i - c_j} [n or 1, M or 1, C, C] where it is known already, as it is for a fixed decay."""
        c = g_nMC.cumsum(-1) * log2(e)
        self.from_start, self.to_end, self.whole = c.exp2()[..., None], (c[..., -1:] - c).exp2_()[..., None], c[..., -1:, None].exp2()
        self.within = decay_within(g_nMC) if within is None else within

    def scores(self, rows: Tensor, keys: Tensor) -> Tensor:
        return product(rows, keys.mT).mul_(self.within.to(rows.dtype))

    def scores_backward(self, dscores: Tensor, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        dscores.mul_(self.within.to(dscores.dtype))
        return product(dscores, keys), product(dscores.mT, rows)


def decay_within(g_nMC: Tensor) -> Tensor:
    """e^{c_i - c_j} [n, M, C, C], 0 above the diagonal."""
    c, C = g_nMC.cumsum(-1) * log2(e), g_nMC.shape[-1]
    # Masked before the exponential: above the diagonal it would overflow.
    hidden_CC = torch.full((C, C), -torch.inf, dtype=c.dtype, device=c.device).triu_(1)
    return (c[..., :, None] + hidden_CC).sub_(c[..., None, :]).exp2_()


class ChannelDecay:
    """One decay per key channel. It stands inside the dot product, and e^{c_i} e^{-c_j} would overflow, so the triangle is cut by halving: each
    later half meets its earlier half through products anchored at the later half's first row, which makes both exponents at most 0 and lets
    no row see the decays of its future."""

    def __init__(self, g_nMCK: Tensor):
        c = g_nMCK.cumsum(2) * log2(e)
        self.c, self.exact = c, min(EXACT, c.shape[2])
        self.from_start, self.to_end, self.whole = c.exp2(), (c[:, :, -1:] - c).exp2_(), c[:, :, -1, :, None].exp2()
        self.levels: list[tuple[int, Tensor, Tensor]] = []
        half = c.shape[2] // 2
        while half >= self.exact:
            early, late = halves(c, half)
            anchor = late[:, :, :, :1]
            self.levels.append((half, (late - anchor).exp2_(), (anchor - early).exp2_()))
            half //= 2

    def scores(self, rows: Tensor, keys: Tensor) -> Tensor:
        n, M, C, _ = rows.shape
        out = rows.new_zeros(n, M, C, C)
        for half, late, early in self.levels:
            decayed_rows = (halves(rows, half)[1] * late).to(rows.dtype)
            decayed_keys = (halves(keys, half)[0] * early).to(rows.dtype)
            off_diagonal(out, half).copy_(torch.bmm(decayed_rows.flatten(0, 2), decayed_keys.flatten(0, 2).mT).unflatten(0, (n, M, -1)))
        diagonal, row_blocks = blocks(out, self.exact), rows.unflatten(2, (-1, self.exact))
        for j, decayed in enumerate(self.exact_columns(keys)):
            diagonal[..., j:, j] = (row_blocks[..., j:, :] * decayed).sum(-1)
        return out

    def scores_backward(self, dscores: Tensor, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        drows, dkeys = torch.zeros_like(self.c), torch.zeros_like(self.c)
        for half, late, early in self.levels:
            d = off_diagonal(dscores, half).flatten(0, 2)
            decayed_rows = (halves(rows, half)[1] * late).to(rows.dtype).flatten(0, 2)
            decayed_keys = (halves(keys, half)[0] * early).to(rows.dtype).flatten(0, 2)
            halves(drows, half)[1].addcmul_(torch.bmm(d, decayed_keys).view_as(late), late)
            halves(dkeys, half)[0].addcmul_(torch.bmm(d.mT, decayed_rows).view_as(late), early)
        diagonal = blocks(dscores, self.exact)
        row_blocks, key_blocks, drow_blocks, dkey_blocks = (x.unflatten(2, (-1, self.exact)) for x in (rows, keys, drows, dkeys))
        for j, decay in enumerate(self.exact_columns(None)):
            d = decay * diagonal[..., j:, j, None]
            drow_blocks[..., j:, :] += d * key_blocks[..., j : j + 1, :]
            dkey_blocks[..., j, :] += (d * row_blocks[..., j:, :]).sum(3)
        return drows, dkeys

    def exact_columns(self, keys: Tensor | None):
        """For key j of the smallest sub-chunks: e^{c_i - c_j} for its rows i >= j, times key j where keys are given."""
        c = self.c.unflatten(2, (-1, self.exact))
        for j in range(self.exact):
            decay = (c[..., j:, :] - c[..., j : j + 1, :]).exp2_()
            yield decay if keys is None else decay.mul_(keys.unflatten(2, (-1, self.exact))[..., j : j + 1, :])


def halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """[n, M, C, K] -> earlier and later halves [n, M, P, s, K]."""
    early, late = x.unflatten(2, (-1, 2, half)).unbind(3)
    return early, late


def off_diagonal(scores: Tensor, half: int) -> Tensor:
    """[n, M, C, C] -> the scores of later rows with earlier keys [n, M, P, s, s]."""
    return scores.unflatten(3, (-1, 2, half)).unflatten(2, (-1, 2, half))[:, :, :, 1, :, :, 0].diagonal(dim1=2, dim2=4).movedim(-1, 2)


def blocks(scores: Tensor, size: int) -> Tensor:
    """[n, M, C, C] -> diagonal blocks [n, M, P, s, s]."""
    return scores.unflatten(3, (-1, size)).unflatten(2, (-1, size)).diagonal(dim1=2, dim2=4).movedim(-1, 2)

"""What a gate means inside the chunks of a block, for the torch references: the one thing that differs between the linear-attention ops.

Everything is an exponential of a difference that is at most 0, so nothing overflows and the hidden half of a chunk gives no 0 * inf. Exponentials
are powers of two: on a CPU exp2 is 4 to 25 times faster than exp.
Letters: n chunks of a block, M = B * H, r kinds of rows that read (queries; queries and keys), C chunk length, P pairs of neighbouring sub-chunks,
s their length, K key width.
"""

from math import e, log2

import torch
from torch import Tensor

from triton_kernels.chunk import Scratch


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a @ b of [n, M, ., .] stacks as one batch, whose operands are read in place (torch.matmul would copy transposed ones)."""
    if out.dtype == a.dtype:
        torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out=out.flatten(0, 1))
    else:
        out.flatten(0, 1).copy_(torch.bmm(a.flatten(0, 1), b.flatten(0, 1)))
    return out


def add_product(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out += a @ b; `out` may be wider than the product's dtype."""
    a_X, b_X, out_X = a.flatten(0, 1), b.flatten(0, 1), out.flatten(0, 1)
    if out.dtype == a.dtype:
        out_X.baddbmm_(a_X, b_X)
    else:
        out_X.add_(torch.bmm(a_X, b_X))
    return out


class ScalarDecay:
    """One decay per token and head: e^{c_i - c_j} multiplies the scores from outside.

    With c the inclusive cumulative log-decay, from_start = e^c and to_end = e^{c_C - c} are [n, M, C, 1 or K], whole = e^{c_C} is [n, M, 1 or K, 1].
    """

    def __init__(self, g_nMC: Tensor, scratch: Scratch, within: Tensor | None = None):
        """within: e^{c_i - c_j} [1, M, C, C] where it is known already, as it is for a fixed decay."""
        c = g_nMC.cumsum(-1) * log2(e)
        self.from_start, self.to_end, self.whole = c.exp2()[..., None], (c[..., -1:] - c).exp2_()[..., None], c[..., -1:, None].exp2()
        if within is None:
            within = decay_within(c, scratch("decay within", c.dtype, *c.shape, c.shape[-1]))
        self.within = within[:, :, None]

    def scores(self, rows_nMrCK: Tensor, keys_nMCK: Tensor, out_nMrCC: Tensor) -> Tensor:
        """sum_d rows_id keys_jd e^{c_id - c_jd} for j <= i; what stands above the diagonal is 0."""
        product(rows_nMrCK.flatten(2, 3), keys_nMCK.mT, out_nMrCC.flatten(2, 3))
        return out_nMrCC.mul_(self.within.to(out_nMrCC.dtype))

    def scores_backward(self, d_nMrCC: Tensor, rows_nMrCK: Tensor, keys_nMCK: Tensor, drows_nMrCK: Tensor, dkeys_nMCK: Tensor) -> None:
        """Adds the gradients of rows and keys to drows and dkeys; takes d, the scores' gradient, for its own."""
        d_nMRC = d_nMrCC.mul_(self.within.to(d_nMrCC.dtype)).flatten(2, 3)
        add_product(drows_nMrCK.flatten(2, 3), d_nMRC, keys_nMCK)
        add_product(dkeys_nMCK, d_nMRC.mT, rows_nMrCK.flatten(2, 3))


def decay_within(c: Tensor, out: Tensor) -> Tensor:
    """2^{c_i - c_j} [..., C, C], 0 above the diagonal, of cumulative log2-decays [..., C]."""
    torch.sub(c[..., :, None], c[..., None, :], out=out)
    # Masked before the exponential: above the diagonal it would overflow.
    hidden_CC = torch.full(out.shape[-2:], -torch.inf, dtype=c.dtype, device=c.device).triu_(1)
    return out.add_(hidden_CC).exp2_()


class ChannelDecay:
    """One decay per key channel. It stands inside the dot product, and e^{c_i} e^{-c_j} would overflow, so the triangle is cut by halving down to
    single rows: each later half meets its earlier half through a product anchored at the later half's first row, which makes both exponents at most
    0 and lets no row see the decays of its future."""

    def __init__(self, g_nMCK: Tensor, scratch: Scratch):
        c = g_nMCK.cumsum(2).mul_(log2(e))
        self.scratch = scratch
        self.from_start = torch.exp2(c, out=scratch("from start", c.dtype, *c.shape))
        self.to_end = torch.sub(c[:, :, -1:], c, out=scratch("to end", c.dtype, *c.shape)).exp2_()
        self.whole = c[:, :, -1, :, None].exp2()
        self.levels: list[tuple[int, Tensor, Tensor]] = []
        half = c.shape[2] // 2
        while half > 0:
            early, late = halves(c, half)
            anchor = late[..., :1, :]
            to_late, from_early = scratch(f"level {half}", c.dtype, 2, *late.shape).unbind()
            torch.sub(late, anchor, out=to_late)
            torch.sub(anchor, early, out=from_early)
            self.levels.append((half, to_late.exp2_(), from_early.exp2_()))
            half //= 2

    def operands(self, half: int, late: Tensor, early: Tensor, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The later rows [X, r s, K] and the earlier keys [X, s, K] of every pair, decayed to and from the pair's anchor; X = n M P."""
        n, M, r, _, K = rows.shape
        late_rows = self.scratch("late rows", rows.dtype, n, M, late.shape[2], r, half, K)
        early_keys = self.scratch("early keys", keys.dtype, *early.shape)
        late_rows.copy_(halves(rows, half)[1].transpose(2, 3)).mul_(late[:, :, :, None])
        early_keys.copy_(halves(keys, half)[0]).mul_(early)
        return late_rows.flatten(0, 2).flatten(1, 2), early_keys.flatten(0, 2)

    def scores(self, rows_nMrCK: Tensor, keys_nMCK: Tensor, out_nMrCC: Tensor) -> Tensor:
        out_nMrCC.zero_()
        out_nMrCC.diagonal(dim1=-2, dim2=-1).copy_((rows_nMrCK * keys_nMCK[:, :, None]).sum(-1))
        for half, late, early in self.levels:
            late_rows, early_keys = self.operands(half, late, early, rows_nMrCK, keys_nMCK)
            scores = torch.bmm(late_rows, early_keys.mT).view(*late.shape[:3], -1, half, half)
            off_diagonal(out_nMrCC, half).copy_(scores.transpose(2, 3))
        return out_nMrCC

    def scores_backward(self, d_nMrCC: Tensor, rows_nMrCK: Tensor, keys_nMCK: Tensor, drows_nMrCK: Tensor, dkeys_nMCK: Tensor) -> None:
        diagonal = d_nMrCC.diagonal(dim1=-2, dim2=-1)[..., None]
        drows_nMrCK.addcmul_(diagonal, keys_nMCK[:, :, None])
        dkeys_nMCK.add_((rows_nMrCK * diagonal).sum(2))
        for half, late, early in self.levels:
            late_rows, early_keys = self.operands(half, late, early, rows_nMrCK, keys_nMCK)
            d = off_diagonal(d_nMrCC, half).transpose(2, 3).flatten(0, 2).flatten(1, 2)
            # With one row in each half these are no products worth a matmul.
            dlate = d * early_keys if half == 1 else torch.bmm(d, early_keys)
            dearly = (d * late_rows).sum(1) if half == 1 else torch.bmm(d.mT, late_rows)
            halves(drows_nMrCK, half)[1].transpose(2, 3).addcmul_(dlate.view(*late.shape[:3], -1, *late.shape[3:]), late[:, :, :, None])
            halves(dkeys_nMCK, half)[0].addcmul_(dearly.view_as(early), early)


def halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """[..., C, K] -> earlier and later halves [..., P, s, K]."""
    early, late = x.unflatten(-2, (-1, 2, half)).unbind(-3)
    return early, late


def off_diagonal(scores: Tensor, half: int) -> Tensor:
    """[..., C, C] -> the blocks where later halves meet their earlier halves [..., P, s, s]."""
    pairs = scores.unflatten(-1, (-1, 2, half)).unflatten(-4, (-1, 2, half))[..., 1, :, :, 0, :]
    return pairs.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)

"""What a gate means inside chunks, for the torch references: the one thing that differs between the linear-attention
ops.

Everything is an exponential of a difference that is at most 0, so nothing overflows and the hidden half of a chunk
gives no 0 * inf. Exponentials are powers of two: on a CPU exp2 is 4 to 25 times faster than exp.
Legend: X chunks times heads, r kinds of rows that read (queries; queries and keys), C chunk length, P pairs of
neighbouring sub-chunks, s their length, K key width.
"""

from dataclasses import dataclass
from math import e, log2

import torch
from torch import Tensor

from triton_kernels.linear.chunks_torch import Scratch
from triton_kernels.linear.products_torch import add_matmul, matmul

# Bits by which a fixed decay may shrink a chunk and still be taken out of its scores: the rest of fp32's exponent is
# left to what is multiplied.
FIXED_BITS = 60
# A log-decay below this is a zero: where a reset by -1e4 entered the cumulative sums, the ordinary decays behind it, as
# differences of such sums, would lose their digits.
STRONGEST = -100.0


@dataclass(frozen=True)
class ScalarDecay:
    """One decay per token and head: e^{c_i - c_j} multiplies the scores from outside.

    With c the inclusive cumulative log-decay, from_start = e^c and to_end = e^{c_C - c} are [X, C, 1 or K], whole =
    e^{c_C} is [X, 1 or K, 1] and within = e^{c_i - c_j} is [X, C, C]. `applied`: rows and keys come multiplied by
    from_start and to_end, and `within` is what is left, e^{-c_C}; it may be one chunk's [M, C, C], which the others
    share."""

    from_start: Tensor
    to_end: Tensor
    whole: Tensor
    within: Tensor
    applied: bool = False

    @classmethod
    def of(cls, g_XC: Tensor, scratch: Scratch) -> "ScalarDecay":
        c = g_XC.cumsum(1).mul_(log2(e))
        within = torch.sub(c[:, :, None], c[:, None, :], out=scratch("decay within", *c.shape, c.shape[1]))
        # Masked before the exponential: above the diagonal it would overflow.
        within.add_(torch.full(within.shape[1:], -torch.inf, dtype=c.dtype, device=c.device).triu_(1)).exp2_()
        return cls(c.exp2()[..., None], (c[:, -1:] - c).exp2_()[..., None], c[:, -1:, None].exp2(), within)

    @classmethod
    def fixed(cls, g_M: Tensor, chunk: int) -> "ScalarDecay | None":
        """One chunk's, the same for all, to be applied to rows and keys; None where it is too strong for that."""
        c = g_M[:, None] * torch.arange(1, chunk + 1, device=g_M.device) * log2(e)
        if float(c.amin()) < -FIXED_BITS:
            return None
        within = (-c[:, -1:, None]).exp2().expand(-1, chunk, chunk).tril()
        return cls(c.exp2()[..., None], (c[:, -1:] - c).exp2()[..., None], c[:, -1:, None].exp2(), within, True)

    def repeated(self, n_chunks: int) -> "ScalarDecay":
        """One chunk's, for each of n."""
        return ScalarDecay(
            *(x.repeat(n_chunks, 1, 1) for x in (self.from_start, self.to_end, self.whole)), self.within, self.applied
        )

    def first(self, X: int) -> "ScalarDecay":
        """That of the first X rows."""
        if len(self.whole) == X:
            return self
        return ScalarDecay(self.from_start[:X], self.to_end[:X], self.whole[:X], self.within, self.applied)

    def decayed(self, scores_XrCC: Tensor) -> Tensor:
        scores = scores_XrCC.view(-1, len(self.within), *scores_XrCC.shape[1:])
        return scores.mul_(self.within[:, None]).flatten(0, 1)

    def scores(self, rows_XrCK: Tensor, keys_XCK: Tensor, out_XrCC: Tensor) -> Tensor:
        """sum_d rows_id keys_jd e^{c_id - c_jd} for j <= i; what stands above the diagonal is 0."""
        matmul(rows_XrCK.flatten(1, 2), keys_XCK.mT, out_XrCC.flatten(1, 2))
        return self.decayed(out_XrCC)

    def scores_backward(
        self, d_XrCC: Tensor, rows_XrCK: Tensor, keys_XCK: Tensor, drows_XrCK: Tensor, dkeys_XCK: Tensor
    ) -> None:
        """Adds the gradients of rows and keys to drows and dkeys; takes d, the scores' gradient, for its own."""
        d_XRC = self.decayed(d_XrCC).flatten(1, 2)
        add_matmul(drows_XrCK.flatten(1, 2), d_XRC, keys_XCK)
        add_matmul(dkeys_XCK, d_XRC.mT, rows_XrCK.flatten(1, 2))


class ChannelDecay:
    """One decay per key channel. It stands inside the dot product, and e^{c_i} e^{-c_j} would overflow, so the triangle
    is cut by halving down to single rows: each later half meets its earlier half through a product anchored at the
    later half's first row, which makes both exponents at most 0 and lets no row see the decays of its future."""

    applied = False

    def __init__(self, g_XCK: Tensor, scratch: Scratch):
        c = torch.cumsum(g_XCK, 1, out=scratch("cumulative", *g_XCK.shape)).mul_(log2(e))
        self.scratch, last = scratch, c[:, -1:]
        self.from_start = torch.exp2(c, out=scratch("from start", *c.shape))
        self.to_end = torch.sub(last, c, out=scratch("to end", *c.shape)).exp2_()
        self.whole = last.mT.exp2()
        self.levels: list[tuple[int, Tensor, Tensor]] = []
        half = c.shape[1] // 2
        while half > 0:
            decay = scratch(f"level {half}", *c.shape)
            (early, late, anchor), (from_early, to_late, _) = (
                scratch.once(halves, c, half),
                scratch.once(halves, decay, half),
            )
            torch.sub(late, anchor, out=to_late)
            torch.sub(anchor, early, out=from_early)
            decay.exp2_()
            self.levels.append((half, to_late, from_early))
            half //= 2

    def operands(
        self, half: int, to_late: Tensor, from_early: Tensor, rows: Tensor, keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The later rows [X, P, r, s, K] and the earlier keys [X, P, s, K] of every pair, decayed to and from the
        pair's anchor."""
        once, shape = self.scratch.once, to_late.shape
        late_rows = self.scratch("late rows", *shape[:2], rows.shape[1], *shape[2:])
        torch.mul(once(halves, rows, half)[1], to_late[:, None], out=once(torch.transpose, late_rows, 1, 2))
        early_keys = torch.mul(once(halves, keys, half)[0], from_early, out=self.scratch("early keys", *shape))
        return once(flat_pairs, late_rows), once(flat_pairs, early_keys)

    def scores(self, rows_XrCK: Tensor, keys_XCK: Tensor, out_XrCC: Tensor) -> Tensor:
        out_XrCC.zero_()
        products = torch.mul(rows_XrCK, keys_XCK[:, None], out=self.scratch("diagonal", *rows_XrCK.shape))
        out_XrCC.diagonal(dim1=-2, dim2=-1).copy_(products.sum(-1))
        for half, to_late, from_early in self.levels:
            late_rows, early_keys = self.operands(half, to_late, from_early, rows_XrCK, keys_XCK)
            blocks = self.scratch.once(off_diagonal, out_XrCC, half)
            found = self.scratch("blocks", *late_rows.shape[:2], half)
            blocks.copy_(matmul(late_rows, early_keys.mT, found).view(blocks.shape))
        return out_XrCC

    def scores_backward(
        self, d_XrCC: Tensor, rows_XrCK: Tensor, keys_XCK: Tensor, drows_XrCK: Tensor, dkeys_XCK: Tensor
    ) -> None:
        once, scratch, diagonal = self.scratch.once, self.scratch, d_XrCC.diagonal(dim1=-2, dim2=-1)[..., None]
        drows_XrCK.addcmul_(diagonal, keys_XCK[:, None])
        dkeys_XCK.add_(torch.mul(rows_XrCK, diagonal, out=scratch("diagonal", *rows_XrCK.shape)).sum(1))
        for half, to_late, from_early in self.levels:
            late_rows, early_keys = self.operands(half, to_late, from_early, rows_XrCK, keys_XCK)
            d = once(off_diagonal, d_XrCC, half).reshape(len(late_rows), -1, half)
            dlate, dearly = scratch("late gradient", *late_rows.shape), scratch("early gradient", *early_keys.shape)
            if half == 1:
                # With one row in each half these are no products worth a matmul.
                torch.mul(d, early_keys, out=dlate)
                torch.sum(late_rows.mul_(d), 1, keepdim=True, out=dearly)
            else:
                matmul(d, early_keys, dlate)
                matmul(d.mT, late_rows, dearly)
            dlate_XrPsK = once(of_rows, dlate, *to_late.shape[:3])
            once(halves, drows_XrCK, half)[1].addcmul_(dlate_XrPsK, to_late[:, None])
            once(halves, dkeys_XCK, half)[0].addcmul_(once(torch.Tensor.view, dearly, *to_late.shape), from_early)


def halves(x: Tensor, half: int) -> tuple[Tensor, Tensor, Tensor]:
    """[..., C, K] -> earlier and later halves [..., P, s, K], and the first rows of the later ones."""
    early, late = x.view(*x.shape[:-2], -1, 2, half, x.shape[-1]).unbind(-3)
    return early, late, late[..., :1, :]


def flat_pairs(x: Tensor) -> Tensor:
    """[X, P, ..., K] -> [X P, ..., K] with one axis between."""
    return x.view(x.shape[0] * x.shape[1], -1, x.shape[-1])


def of_rows(x: Tensor, X: int, P: int, s: int) -> Tensor:
    """[X P, r s, K] -> [X, r, P, s, K]."""
    return x.view(X, P, -1, s, x.shape[-1]).transpose(1, 2)


def off_diagonal(scores_XrCC: Tensor, half: int) -> Tensor:
    """[X, r, C, C] -> the blocks where later halves meet their earlier halves [X, P, r, s, s]."""
    pairs = scores_XrCC.unflatten(-1, (-1, 2, half)).unflatten(-4, (-1, 2, half))[..., 1, :, :, 0, :]
    return pairs.diagonal(dim1=-4, dim2=-2).movedim(-1, 1)

"""Kimi delta attention in torch: the chunked form used on a CPU and as the kernels' reference.

    S_t = (I - b_t k_t k_t^T) Diag(e^{g_t}) S_{t-1} + b_t k_t v_t^T        o_t = S_t^T q_t

Its definition, token by token, is `gated_delta_rule_recurrence` with a log-decay of [B, T, H, K].
Letters: B batch, T tokens, G query/key heads, H value heads, n chunks of a block, M = B * H, C chunk length, R = 2C (queries stacked on keys),
P pairs of neighbouring sub-chunks, s their length, K key width, V value width, S sequences.
"""

import torch
from torch import Tensor

from triton_kernels.chunk import chunk_layout
from triton_kernels.delta_chunked import ChunkedDeltaRule

# Sub-chunks of this length are computed pair by pair.
EXACT = 4


class ChannelDecay:
    """One decay per key channel. It stands inside the dot product, and e^{c_i} e^{-c_j} would overflow, so the triangle is cut by halving: each
    later half meets its earlier half through products anchored at the later half's first row, which makes both exponents at most 0 and lets
    no row see the decays of its future."""

    def __init__(self, g: Tensor | None, qk: Tensor):
        assert g is not None
        c = g.cumsum(2)
        self.c, self.exact = c, min(EXACT, g.shape[2])
        self.from_start, self.to_end, self.whole = c.exp(), (c[:, :, -1:] - c).exp_(), c[:, :, -1].exp()[..., None]
        self.levels: list[tuple[int, Tensor, Tensor]] = []
        half = c.shape[2] // 2
        while half >= self.exact:
            early, late = halves(c, half)
            anchor = late[:, :, :, :1]
            self.levels.append((half, (late - anchor).exp_(), (anchor - early).exp_()))
            half //= 2

    def scores(self, qk: Tensor, k: Tensor) -> Tensor:
        n, M, R, _ = qk.shape
        C = R // 2
        out = qk.new_zeros(n, M, 2, C, C)
        for half, late, early in self.levels:
            rows, keys = late_rows(qk, half) * late[:, :, :, None], halves(k, half)[0] * early
            off_diagonal(out, half).copy_((rows.flatten(3, 4) @ keys.mT).unflatten(3, (2, half)))
        diagonal, rows = blocks(out, self.exact), late_rows(qk, self.exact, whole=True)
        for j, decayed in enumerate(self.exact_columns(k)):
            diagonal[..., j:, j] = torch.linalg.vecdot(rows[..., j:, :], decayed[:, :, :, None])
        out[:, :, 1].tril_(-1)
        return out.view(n, M, R, C)

    def scores_backward(self, dscores: Tensor, qk: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        C = k.shape[2]
        dscores = dscores.unflatten(2, (2, C))
        dscores[:, :, 1].tril_(-1)
        dqk, dk = torch.zeros_like(qk), torch.zeros_like(k)
        for half, late, early in self.levels:
            d = off_diagonal(dscores, half).flatten(3, 4)
            rows, keys = late_rows(qk, half) * late[:, :, :, None], halves(k, half)[0] * early
            late_rows(dqk, half).addcmul_((d @ keys).unflatten(3, (2, half)), late[:, :, :, None])
            halves(dk, half)[0].addcmul_(d.mT @ rows.flatten(3, 4), early)
        diagonal, rows, drows = blocks(dscores, self.exact), late_rows(qk, self.exact, whole=True), late_rows(dqk, self.exact, whole=True)
        k_blocks, dk_blocks = k.unflatten(2, (-1, self.exact)), dk.unflatten(2, (-1, self.exact))
        for j, decay in enumerate(self.exact_columns(None)):
            d = diagonal[..., j:, j, None]
            drows[..., j:, :].addcmul_(d, (decay * k_blocks[..., j : j + 1, :])[:, :, :, None])
            dk_blocks[..., j, :] += ((d * rows[..., j:, :]).sum(3) * decay).sum(3)
        return dqk, dk

    def exact_columns(self, k: Tensor | None):
        """For key j of the smallest sub-chunks: e^{c_i - c_j} for its rows i >= j, times k_j where k is given."""
        c = self.c.unflatten(2, (-1, self.exact))
        for j in range(self.exact):
            decay = (c[..., j:, :] - c[..., j : j + 1, :]).exp_()
            yield decay if k is None else decay.mul_(k.unflatten(2, (-1, self.exact))[..., j : j + 1, :])


def halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """[n, M, C, K] -> earlier and later halves [n, M, P, s, K]."""
    early, late = x.unflatten(2, (-1, 2, half)).unbind(3)
    return early, late


def late_rows(qk: Tensor, half: int, whole: bool = False) -> Tensor:
    """[n, M, 2C, K] -> query and key rows of the later halves (of all sub-chunks if `whole`) [n, M, P, 2, s, K]."""
    x = qk.unflatten(2, (2, -1, half)) if whole else qk.unflatten(2, (2, -1, 2, half))[:, :, :, :, 1]
    return x.transpose(2, 3)


def off_diagonal(scores: Tensor, half: int) -> Tensor:
    """[n, M, 2, C, C] -> the scores of later rows with earlier keys [n, M, P, 2, s, s]."""
    return scores.unflatten(4, (-1, 2, half)).unflatten(3, (-1, 2, half))[:, :, :, :, 1, :, :, 0].diagonal(dim1=3, dim2=5).movedim(-1, 2)


def blocks(scores: Tensor, size: int) -> Tensor:
    """[n, M, 2, C, C] -> diagonal blocks [n, M, P, 2, s, s]."""
    return scores.unflatten(4, (-1, size)).unflatten(3, (-1, size)).diagonal(dim1=3, dim2=5).movedim(-1, 2)


def kimi_delta_attention_torch(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTHK: Tensor,
    beta_BTH: Tensor,
    initial_SHKV: Tensor,
    *,
    scale: float,
    normalize_qk: bool,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Chunked reference in fp32 (fp64 for fp64 inputs); the arguments are those of `kimi_delta_attention`, checked and filled in by it."""
    layout = chunk_layout(v_BTHV.shape[1], chunk_size, cu_seqlens)
    options = (ChannelDecay, scale, normalize_qk)
    return ChunkedDeltaRule.apply(q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK, beta_BTH, initial_SHKV, layout, options)  # pyright: ignore

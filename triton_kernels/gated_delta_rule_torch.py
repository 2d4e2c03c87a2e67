"""The gated delta rule in torch: the chunked form used on a CPU and as the kernels' reference, and the recurrence that defines both.

    S_t = e^{g_t} (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T        o_t = S_t^T q_t

Letters: B batch, T tokens, G query/key heads, H value heads, n chunks of a block, M = B * H, C chunk length, R = 2C (queries stacked on keys),
K key width, V value width, S sequences.
"""

from itertools import pairwise

import torch
from torch import Tensor

from triton_kernels.chunk import chunk_layout
from triton_kernels.delta_blocks import product
from triton_kernels.delta_chunked import ChunkedDeltaRule


class ScalarDecay:
    """One decay per token and head, or none: D_ij = e^{c_i - c_j} multiplies the scores from outside."""

    def __init__(self, g: Tensor | None, qk: Tensor):
        n, M, R, _ = qk.shape
        visible = torch.ones(R // 2, R // 2, dtype=qk.dtype, device=qk.device).tril()
        visible_2CC = torch.stack([visible, visible.tril(-1)])
        if g is None:
            self.from_start = self.to_end = self.whole = qk.new_ones(n, M, 1, 1)
            self.within = visible_2CC.flatten(0, 1)
            return
        c = g.cumsum(-1)
        self.from_start, self.to_end, self.whole = c.exp()[..., None], (c[..., -1:] - c).exp_()[..., None], c[..., -1:].exp()[..., None]
        # Masked before the exponential as well: above the diagonal it would overflow, and inf * 0 is NaN.
        within = (c[..., :, None] - c[..., None, :]).tril_().exp_()
        self.within = (within[:, :, None] * visible_2CC).flatten(2, 3)

    def scores(self, qk: Tensor, k: Tensor) -> Tensor:
        return product(qk, k.mT).mul_(self.within)

    def scores_backward(self, dscores: Tensor, qk: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        dscores = dscores.mul_(self.within)
        return product(dscores, k), product(dscores.mT, qk)


def gated_delta_rule_torch(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTH: Tensor | None,
    beta_BTH: Tensor,
    initial_SHKV: Tensor,
    *,
    scale: float,
    normalize_qk: bool,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Chunked reference in fp32 (fp64 for fp64 inputs); the arguments are those of `gated_delta_rule`, checked and filled in by it."""
    layout = chunk_layout(v_BTHV.shape[1], chunk_size, cu_seqlens)
    options = (ScalarDecay, scale, normalize_qk)
    return ChunkedDeltaRule.apply(q_BTGK, k_BTGK, v_BTHV, log_decay_BTH, beta_BTH, initial_SHKV, layout, options)  # pyright: ignore


def gated_delta_rule_recurrence(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, log_decay_BTH: Tensor, beta_BTH: Tensor, initial_SHKV: Tensor, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, token by token in the dtype given (fp64 in tests), q scaled: what every other form is checked against.

    `log_decay` is [B, T, H], or [B, T, H, K] for a decay per key channel (Kimi delta attention)."""
    offsets = [0, q_BTHK.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    g = log_decay_BTH if log_decay_BTH.dim() == 4 else log_decay_BTH[..., None]
    outputs, finals = [torch.zeros_like(v_BTHV[:, :0])], []
    for sequence, (first, last) in enumerate(pairwise(offsets)):
        state = initial_SHKV if cu_seqlens is None else initial_SHKV[sequence : sequence + 1]
        for t in range(first, last):
            k = k_BTHK[:, t, :, :, None]
            state = g[:, t, :, :, None].exp() * state
            error = v_BTHV[:, t, :, None, :] - (k * state).sum(-2, keepdim=True)
            state = state + beta_BTH[:, t, :, None, None] * k * error
            outputs.append((q_BTHK[:, t, :, None, :] @ state).transpose(1, 2))
        finals.append(state)
    return torch.cat(outputs, 1), torch.cat(finals)

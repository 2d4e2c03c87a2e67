"""The gated delta rule in torch: the chunked form used on a CPU and as the kernels' reference, and the recurrence that defines both.

    S_t = e^{g_t} (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T        o_t = S_t^T q_t

Letters: B batch, T tokens, G query/key heads, H value heads, n chunks of a block, M = B * H, C chunk length, R = 2C (queries stacked on keys),
K key width, V value width, S sequences.
"""

from itertools import pairwise

import torch
from torch import Tensor

from triton_kernels.chunk_decay import ScalarDecay
from triton_kernels.chunk_rule import Rule, chunked_rule


def gated_delta_rule_torch(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTH: Tensor | None,
    beta_BTH: Tensor,
    initial_SHKV: Tensor | None,
    *,
    scale: float,
    normalize_qk: bool,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Chunked reference in fp32 (fp64 for fp64 inputs); the arguments are those of `gated_delta_rule`, checked and filled in by it."""
    g_BTH = beta_BTH.new_zeros(()).expand(beta_BTH.shape) if log_decay_BTH is None else log_decay_BTH
    rule = Rule(decay=ScalarDecay, scale=scale, normalize_qk=normalize_qk)
    return chunked_rule(q_BTGK, k_BTGK, v_BTHV, g_BTH, beta_BTH, initial_SHKV, cu_seqlens, chunk_size, rule)


def gated_delta_rule_recurrence(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTH: Tensor,
    beta_BTH: Tensor | None,
    initial_SHKV: Tensor,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, token by token in the dtype given (fp64 in tests), q scaled: what every other form is checked against.

    `log_decay` is [B, T, H], or [B, T, H, K] for a decay per key channel (Kimi delta attention). Without beta nothing is corrected: the value itself
    is written (decayed linear attention)."""
    offsets = [0, q_BTHK.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    g = log_decay_BTH if log_decay_BTH.dim() == 4 else log_decay_BTH[..., None]
    outputs, finals = [torch.zeros_like(v_BTHV[:, :0])], []
    for sequence, (first, last) in enumerate(pairwise(offsets)):
        state = initial_SHKV if cu_seqlens is None else initial_SHKV[sequence : sequence + 1]
        for t in range(first, last):
            k, written = k_BTHK[:, t, :, :, None], v_BTHV[:, t, :, None, :]
            state = g[:, t, :, :, None].exp() * state
            if beta_BTH is not None:
                written = beta_BTH[:, t, :, None, None] * (written - (k * state).sum(-2, keepdim=True))
            state = state + k * written
            outputs.append((q_BTHK[:, t, :, None, :] @ state).transpose(1, 2))
        finals.append(state)
    return torch.cat(outputs, 1), torch.cat(finals)

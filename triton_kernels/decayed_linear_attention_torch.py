"""Decayed linear attention in torch: the chunked form used on a CPU and as the kernels' reference, and the recurrence that defines both.

    S_t = e^{g_t} S_{t-1} + k_t v_t^T        o_t = S_t^T q_t

Lightning attention (arXiv 2401.04658) and RetNet (2307.08621) fix g per head, simple GLA (2312.06635, scalar gate) makes it depend on the token.
Letters: B batch, T tokens, H heads, K key width, V value width, C chunk length, S sequences.
"""

from functools import partial

import torch
from torch import Tensor

from triton_kernels.chunk_decay import ScalarDecay, decay_within
from triton_kernels.chunk_rule import Rule, chunked_rule
from triton_kernels.gated_delta_rule_torch import gated_delta_rule_recurrence


def token_log_decay(log_decay: Tensor | None, q_BTHK: Tensor) -> Tensor:
    """Any legal log_decay as [B, T, H]."""
    return (q_BTHK.new_zeros((), dtype=torch.float32) if log_decay is None else log_decay).expand(q_BTHK.shape[:3])


def decayed_linear_attention_torch(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay: Tensor | None,
    initial_SHKV: Tensor | None,
    *,
    scale: float,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """The chunked form behind `decayed_linear_attention`; log_decay is None, [H] or [B, T, H]."""
    g_BTH = token_log_decay(log_decay, q_BTHK)
    within = None
    if log_decay is None or log_decay.dim() == 1:
        # One decay per head: all chunks share one matrix, which is most of the exponentials.
        batch, _, heads, _ = q_BTHK.shape
        g_H = g_BTH.new_zeros(heads) if log_decay is None else log_decay.detach().to(torch.promote_types(q_BTHK.dtype, torch.float32))
        within = decay_within(g_H.repeat(batch)[None, :, None].expand(-1, -1, chunk_size))
    rule = Rule(decay=partial(ScalarDecay, within=within), scale=scale)
    return chunked_rule(q_BTHK, k_BTHK, v_BTHV, g_BTH, None, initial_SHKV, cu_seqlens, chunk_size, rule)


def decayed_linear_attention_recurrence(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTH: Tensor,
    initial_SHKV: Tensor,
    *,
    scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, token by token in the dtype given (fp64 in tests): what every other form is checked against."""
    return gated_delta_rule_recurrence(scale * q_BTHK, k_BTHK, v_BTHV, log_decay_BTH, None, initial_SHKV, cu_seqlens)

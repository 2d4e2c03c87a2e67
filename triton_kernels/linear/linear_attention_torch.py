"""Linear attention in torch: the chunked forms that train on a CPU and that the kernels are held to, and the recurrence
that defines them all.

    decayed linear attention  S_t = e^{g_t} S_{t-1} + k_t v_t^T                           o_t = scale * S_t^T q_t in all
                              three
    gated delta rule          S_t = (I - b_t k_t k_t^T) e^{g_t} S_{t-1} + b_t k_t v_t^T
    Kimi delta attention      the same with a diagonal matrix of decays, one per key channel

Legend: B batch, T tokens, G query/key heads, H value heads, C chunk length, K key width, V value width, S sequences.
"""

from itertools import pairwise

import torch
from torch import Tensor

from triton_kernels.linear.chunked_rule_torch import chunked_rule

# Longer chunks do more arithmetic, and their matrices [C, C] leave a core's first cache.
MAX_CHUNK = 32


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
    g = q_BTHK.new_zeros(q_BTHK.shape[2], dtype=torch.float32) if log_decay is None else log_decay
    # One number per head without a gradient takes a shorter way.
    g = token_log_decay(g, q_BTHK) if g.requires_grad else g
    return chunked_rule(
        q_BTHK,
        k_BTHK,
        v_BTHV,
        g,
        beta=None,
        initial=initial_SHKV,
        cu_seqlens=cu_seqlens,
        chunk=min(chunk_size, MAX_CHUNK),
        scale=scale,
        normalize_qk=False,
    )


def delta_rule_torch(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    log_decay: Tensor | None,
    beta_BTH: Tensor,
    initial_SHKV: Tensor | None,
    *,
    scale: float,
    normalize_qk: bool,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """The chunked form behind `gated_delta_rule` (log_decay None or [B, T, H]) and `kimi_delta_attention` ([B, T, H,
    K])."""
    g = beta_BTH.new_zeros(()).expand(beta_BTH.shape) if log_decay is None else log_decay
    return chunked_rule(
        q_BTGK,
        k_BTGK,
        v_BTHV,
        g,
        beta=beta_BTH,
        initial=initial_SHKV,
        cu_seqlens=cu_seqlens,
        chunk=min(chunk_size, MAX_CHUNK),
        scale=scale,
        normalize_qk=normalize_qk,
    )


def token_log_decay(log_decay: Tensor | None, q_BTHK: Tensor) -> Tensor:
    """Any legal log_decay of decayed linear attention as [B, T, H]."""
    return (q_BTHK.new_zeros((), dtype=torch.float32) if log_decay is None else log_decay).expand(q_BTHK.shape[:3])


def linear_attention_recurrence(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay: Tensor,
    beta_BTH: Tensor | None,
    initial_SHKV: Tensor,
    *,
    scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, token by token in the dtype given (fp64 in tests): what every other form is checked against.
    log_decay is [B, T, H], or [B, T, H, K] for a decay per key channel; without beta nothing is corrected: the value
    itself is written (decayed linear attention)."""
    offsets = [0, q_BTHK.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    g = log_decay if log_decay.dim() == 4 else log_decay[..., None]
    outputs, finals = [torch.zeros_like(v_BTHV[:, :0])], []
    for sequence, (first, last) in enumerate(pairwise(offsets)):
        state = initial_SHKV if cu_seqlens is None else initial_SHKV[sequence : sequence + 1]
        for t in range(first, last):
            k, written = k_BTHK[:, t, :, :, None], v_BTHV[:, t, :, None, :]
            state = g[:, t, :, :, None].exp() * state
            if beta_BTH is not None:
                written = beta_BTH[:, t, :, None, None] * (written - (k * state).sum(-2, keepdim=True))
            state = state + k * written
            outputs.append((scale * q_BTHK[:, t, :, None, :] @ state).transpose(1, 2))
        finals.append(state)
    return torch.cat(outputs, 1), torch.cat(finals)

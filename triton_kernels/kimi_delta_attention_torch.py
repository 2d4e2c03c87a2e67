"""Kimi delta attention in torch: the chunked form used on a CPU and as the kernels' reference.

    S_t = (I - b_t k_t k_t^T) Diag(e^{g_t}) S_{t-1} + b_t k_t v_t^T        o_t = S_t^T q_t

Its definition, token by token, is `gated_delta_rule_recurrence` with a log-decay of [B, T, H, K].
Letters: B batch, T tokens, G query/key heads, H value heads, n chunks of a block, M = B * H, C chunk length, R = 2C (queries stacked on keys),
P pairs of neighbouring sub-chunks, s their length, K key width, V value width, S sequences.
"""

from torch import Tensor

from triton_kernels.chunk_decay import ChannelDecay
from triton_kernels.chunk_rule import Rule, chunked_rule


def kimi_delta_attention_torch(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTHK: Tensor,
    beta_BTH: Tensor,
    initial_SHKV: Tensor | None,
    *,
    scale: float,
    normalize_qk: bool,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Chunked reference in fp32 (fp64 for fp64 inputs); the arguments are those of `kimi_delta_attention`, checked and filled in by it."""
    rule = Rule(decay=ChannelDecay, scale=scale, normalize_qk=normalize_qk)
    return chunked_rule(q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK, beta_BTH, initial_SHKV, cu_seqlens, chunk_size, rule)

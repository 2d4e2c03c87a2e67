"""Kimi delta attention (KDA): the gated delta rule with a decay per key channel.

    S_t = (I - b_t k_t k_t^T) Diag(e^{g_t}) S_{t-1} + b_t k_t v_t^T        o_t = scale * S_t^T q_t

Letters: B batch, T tokens, G query/key heads, H value heads (a multiple of G), K key width, V value width, S sequences (B of them, or those packed
by `cu_seqlens`).
"""

from typing import Any

from torch import Tensor

from triton_kernels.checks import check_backend, check_shape
from triton_kernels.gated_delta_rule import check_delta_inputs, check_delta_step, delta_step, initial_state
from triton_kernels.kimi_delta_attention_torch import kimi_delta_attention_torch

OP = "kimi_delta_attention"


def kimi_delta_attention(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTHK: Tensor,
    beta_BTH: Tensor,
    *,
    scale: float | None = None,
    normalize_qk: bool = False,
    initial_state_BHKV: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Chunked Kimi delta attention, with the arguments of `gated_delta_rule` but a `log_decay_BTHK` for every key channel (nats per token, <= 0,
    finite, bounded below or not). Returns o [B, T, H, V] in v's dtype and the final state [S, H, K, V] in fp32 (fp64 for fp64 inputs); gradients
    flow to every tensor, states included.

    Raises ValueError for shapes, dtypes or offsets that do not fit. Source: Kimi Linear, arXiv 2510.26692.
    """
    check_delta_inputs(OP, q_BTGK, k_BTGK, v_BTHV, beta_BTH, cu_seqlens, chunk_size)
    batch, tokens, heads, _ = v_BTHV.shape
    key_width = q_BTGK.shape[3]
    check_shape(OP, "log_decay_BTHK", log_decay_BTHK, {"B": batch, "T": tokens, "H": heads, "K": key_width})
    options: dict[str, Any] = {"scale": key_width**-0.5 if scale is None else scale, "normalize_qk": normalize_qk}
    options |= {"cu_seqlens": cu_seqlens, "chunk_size": chunk_size}
    initial = initial_state(OP, initial_state_BHKV, cu_seqlens, key_width, v_BTHV)
    if check_backend(backend, q_BTGK) == "triton":
        # Imported here: Triton exists on Linux only, and its interpreter must be chosen before a kernel is defined.
        from triton_kernels.delta_triton import delta_rule_triton

        return delta_rule_triton(OP, q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK, beta_BTH, initial, **options)
    return kimi_delta_attention_torch(q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK, beta_BTH, initial, **options)


def kimi_delta_attention_step(
    q_BGK: Tensor,
    k_BGK: Tensor,
    v_BHV: Tensor,
    log_decay_BHK: Tensor,
    beta_BH: Tensor,
    state_BHKV: Tensor,
    *,
    scale: float | None = None,
    normalize_qk: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token of `kimi_delta_attention`. Returns o [B, H, V] in v's dtype and the new state [B, H, K, V] in the state's dtype (fp32)."""
    check_delta_step(OP, q_BGK, k_BGK, v_BHV, beta_BH, state_BHKV)
    check_shape(OP, "log_decay_BHK", log_decay_BHK, {"B": v_BHV.shape[0], "H": v_BHV.shape[1], "K": q_BGK.shape[2]})
    return delta_step(q_BGK, k_BGK, v_BHV, log_decay_BHK, beta_BH, state_BHKV, scale=scale, normalize_qk=normalize_qk)

"""Kimi delta attention (KDA): the gated delta rule with a decay per key channel.

    S_t = (I - b_t k_t k_t^T) Diag(e^{g_t}) S_{t-1} + b_t k_t v_t^T        o_t = scale * S_t^T q_t

Legend as in `gated_delta_rule.py`.
"""

from torch import Tensor

from triton_kernels.linear.delta_rule import DeltaTensors, check_delta_inputs, run_delta_rule

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
    """Chunked Kimi delta attention.

    Args:
        log_decay_BTHK: of every key channel, nats per token, <= 0, finite, bounded below or not. The other arguments
            are those of `gated_delta_rule`.

    Returns:
        o_BTHV in v's dtype and the final state [S, H, K, V] in fp32 (fp64 for fp64 inputs); gradients flow to every
        tensor, states included.

    Raises:
        ValueError: for shapes, dtypes or offsets that do not fit.

    Source: Kimi Linear, arXiv 2510.26692.
    """
    if log_decay_BTHK is None:
        raise ValueError(f"{OP}: log_decay_BTHK=None; legal is a tensor, without a decay call gated_delta_rule")
    sizes = check_delta_inputs(
        OP, q_BTGK=q_BTGK, k_BTGK=k_BTGK, v_BTHV=v_BTHV, log_decay_BTHK=log_decay_BTHK, beta_BTH=beta_BTH
    )
    return run_delta_rule(
        OP,
        sizes,
        DeltaTensors(q=q_BTGK, k=k_BTGK, v=v_BTHV, log_decay=log_decay_BTHK, beta=beta_BTH, initial=initial_state_BHKV),
        scale=scale,
        normalize_qk=normalize_qk,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
        backend=backend,
    )

"""The gated delta rule (gated DeltaNet), or the plain delta rule where there is no decay.

    S_t = e^{g_t} (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T        o_t = scale * S_t^T q_t

Legend: B batch, T tokens, G query/key heads, H value heads (a multiple of G), K key width, V value width, S sequences
(B of them, or those packed by `cu_seqlens`).
"""

from torch import Tensor

from triton_kernels.linear.delta_rule import DeltaTensors, check_delta_inputs, run_delta_rule

OP = "gated_delta_rule"


def gated_delta_rule(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTH: Tensor | None,
    beta_BTH: Tensor,
    *,
    scale: float | None = None,
    normalize_qk: bool = False,
    initial_state_BHKV: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Chunked gated delta rule: the state forgets by e^{log_decay}, then the part that k reads is moved toward v by
    beta.

    Args:
        q_BTGK, k_BTGK: queries and keys; value head h reads query head h // (H / G), H being a multiple of G.
        v_BTHV: values, in the dtype of q and k.
        log_decay_BTH: nats per token, <= 0 and finite; None for the plain delta rule.
        beta_BTH: in [0, 2]. Above 1 the transition has negative eigenvalues, and k must have unit length for stability.
        scale: of the queries; K^-1/2 by default.
        normalize_qk: divides q and k by their length over K.
        initial_state_BHKV: the state before the first token, one per sequence; zero by default.
        cu_seqlens: int64 [S + 1] from 0 to T: B = 1 packs S sequences, empty ones allowed; states are then [S, H, K,
            V].
        chunk_size: tokens of a chunk, a power of two.
        backend: "torch", "triton", "native" (in C, on a CPU, in chunks of its own size), or "auto": Triton on
            CUDA tensors, C where it takes them.

    Returns:
        o_BTHV in v's dtype and the final state in fp32 (fp64 for fp64 inputs); gradients flow to every tensor, states
        included.

    Raises:
        ValueError: for shapes, dtypes or offsets that do not fit.

    Sources: arXiv 2412.06464 (gate), 2406.06484 (WY form), 2411.12537 (beta to 2).
    """
    sizes = check_delta_inputs(
        OP, q_BTGK=q_BTGK, k_BTGK=k_BTGK, v_BTHV=v_BTHV, log_decay_BTH=log_decay_BTH, beta_BTH=beta_BTH
    )
    return run_delta_rule(
        OP,
        sizes,
        DeltaTensors(q=q_BTGK, k=k_BTGK, v=v_BTHV, log_decay=log_decay_BTH, beta=beta_BTH, initial=initial_state_BHKV),
        scale=scale,
        normalize_qk=normalize_qk,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
        backend=backend,
    )

"""Decayed linear attention: lightning and RetNet (a fixed decay per head), simple GLA (one that depends on the token),
plain linear attention (none).

    S_t = e^{g_t} S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t

Legend: B batch, T tokens, H heads, K key width, V value width, S sequences (B of them, or those packed by
`cu_seqlens`).
"""

import math

import torch

from triton_kernels.common.checks import (
    check_backend,
    check_dtype,
    check_number,
    check_placed,
    check_range,
    check_shape,
    check_tensors,
)
from triton_kernels.linear.delta_rule import check_sequences
from triton_kernels.linear.native import chunked_rule_native, takes_rule

OP = "decayed_linear_attention"


def decayed_linear_attention(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    log_decay: torch.Tensor | None,
    *,
    scale: float = 1.0,
    initial_state_BHKV: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunked linear attention with a scalar decay per head, current token included, no denominator.

    Args:
        q_BTHK, k_BTHK, v_BTHV: in one dtype.
        log_decay: nats per token, <= 0 and finite: None for no decay, [H] for a fixed one per head, [B, T, H] for one
            per token.
        scale: of the queries.
        initial_state_BHKV: the state before the first token, one per sequence; zero by default.
        cu_seqlens: int64 [S + 1] from 0 to T: B = 1 packs S sequences, empty ones allowed; states are then [S, H, K,
            V].
        chunk_size: tokens of a chunk; the kernels take powers of two from 16 on.
        backend: "torch", "triton", "native" (in C, on a CPU, in chunks of its own size), or "auto": Triton on
            CUDA tensors, C where it takes them.

    Returns:
        o_BTHV in v's dtype and the final state in fp32 (fp64 for fp64 inputs); gradients flow to every tensor, states
        included.

    Raises:
        ValueError: for shapes, dtypes or offsets that do not fit.

    Sources: arXiv 2401.04658 (lightning), 2307.08621 (RetNet), 2312.06635 (GLA).
    """
    sizes = check_tensors(OP, q_BTHK=q_BTHK, k_BTHK=k_BTHK, v_BTHV=v_BTHV)
    check_dtype(OP, {"q_BTHK": q_BTHK, "k_BTHK": k_BTHK, "v_BTHV": v_BTHV})
    check_placed(OP, q_BTHK=q_BTHK, k_BTHK=k_BTHK, v_BTHV=v_BTHV, log_decay=log_decay)
    check_number(OP, "scale", scale)
    if chunk_size < 1:
        raise ValueError(f"{OP}: chunk_size={chunk_size}, must be at least 1")
    if log_decay is not None:
        check_shape(
            OP, "log_decay", log_decay, {axis: sizes[axis] for axis in ("H" if log_decay.dim() == 1 else "BTH")}
        )
        check_range(OP, "log_decay", log_decay, -math.inf, 0)
    initial = check_sequences(OP, sizes, q_BTHK, cu_seqlens, initial_state_BHKV)
    tensors = (q_BTHK, k_BTHK, log_decay, initial)
    chosen = check_backend(backend, q_BTHK, native=takes_rule(v_BTHV, *tensors))
    if chosen == "native":
        return chunked_rule_native(
            *(q_BTHK, k_BTHK, v_BTHV, log_decay),
            beta_BTH=None,
            initial_SHKV=initial,
            cu_seqlens=cu_seqlens,
            scale=scale,
            normalize_qk=False,
        )
    if chosen == "triton":
        from triton_kernels.linear.decayed_linear_attention_launch import (
            decayed_linear_attention_triton as implementation,
        )
    else:
        from triton_kernels.linear.linear_attention_torch import decayed_linear_attention_torch as implementation
    return implementation(
        q_BTHK, k_BTHK, v_BTHV, log_decay, initial, scale=scale, cu_seqlens=cu_seqlens, chunk_size=chunk_size
    )

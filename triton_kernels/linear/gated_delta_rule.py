"""The gated delta rule (gated DeltaNet), or the plain delta rule where there is no decay.

    S_t = e^{g_t} (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T        o_t = scale * S_t^T q_t

Letters: B batch, T tokens, G query/key heads, H value heads (a multiple of G), K key width, V value width, S sequences
(B of them, or those packed by `cu_seqlens`).
"""

from itertools import islice
from typing import Any

import torch
from torch import Tensor

from triton_kernels.common.checks import check_backend, check_cu_seqlens, check_dtype, check_tensors
from triton_kernels.linear.linear_attention_torch import delta_rule_torch

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

    q, k [B, T, G, K] and v [B, T, H, V] in one dtype, H a multiple of G (value head h reads query head h // (H / G)).
    `log_decay_BTH` (nats per token, <= 0 and finite) or None for the plain delta rule; `beta_BTH` in [0, 2] (above 1
    the transition has negative eigenvalues; k must then have unit length for stability: `normalize_qk` divides q and k
    by their length over K). `scale` is K^-1/2 unless given. `cu_seqlens` (int64 [S+1], with B = 1) packs S sequences,
    empty ones allowed; the states are then [S, H, K, V]. Returns o [B, T, H, V] in v's dtype and the final state in
    fp32 (fp64 for fp64 inputs); gradients flow to every tensor, states included.

    Raises ValueError for shapes, dtypes or offsets that do not fit. Sources: arXiv 2412.06464 (gate), 2406.06484 (WY
    form), 2411.12537 (beta to 2).
    """
    sizes = check_delta_inputs(
        OP, q_BTGK=q_BTGK, k_BTGK=k_BTGK, v_BTHV=v_BTHV, log_decay_BTH=log_decay_BTH, beta_BTH=beta_BTH
    )
    inputs = (q_BTGK, k_BTGK, v_BTHV, log_decay_BTH, beta_BTH)
    return run_delta_rule(OP, sizes, *inputs, initial_state_BHKV, scale, normalize_qk, cu_seqlens, chunk_size, backend)


def check_delta_inputs(op: str, **tensors: Tensor | None) -> dict[str, int]:
    """What both delta rules refuse. q, k and v come first: the heads of all others follow from theirs. Returns the
    sizes by letter."""
    q_k_v: dict[str, Any] = dict(islice(tensors.items(), 3))
    sizes = check_tensors(op, **q_k_v)
    if sizes["G"] == 0 or sizes["H"] % sizes["G"]:
        raise ValueError(f"{op}: {sizes['H']} value heads are not a multiple of {sizes['G']} query/key heads")
    check_dtype(op, {name[0]: x for name, x in q_k_v.items()})
    return check_tensors(op, sizes, **tensors)


def check_sequences(
    op: str, sizes: dict[str, int], dtype: torch.dtype, cu_seqlens: Tensor | None, initial_state_BHKV: Any
) -> Tensor | None:
    """The offsets, and the initial state, one per sequence, which is returned in the state's dtype: fp32, or fp64 for
    fp64 inputs."""
    check_cu_seqlens(op, cu_seqlens, sizes["B"], sizes["T"])
    n_states = sizes["B"] if cu_seqlens is None else cu_seqlens.numel() - 1
    check_tensors(op, {**sizes, "B": n_states}, initial_state_BHKV=initial_state_BHKV)
    return None if initial_state_BHKV is None else initial_state_BHKV.to(torch.promote_types(dtype, torch.float32))


def run_delta_rule(
    op: str,
    sizes: dict[str, int],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor,
    initial: Tensor | None,
    scale: float | None,
    normalize_qk: bool,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Either delta rule on the backend that is asked for; `sizes` are those of the shapes by letter."""
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"{op}: chunk_size={chunk_size}, must be a power of two")
    initial = check_sequences(op, sizes, q.dtype, cu_seqlens, initial)
    scale = sizes["K"] ** -0.5 if scale is None else scale
    options: dict[str, Any] = {
        "scale": scale,
        "normalize_qk": normalize_qk,
        "cu_seqlens": cu_seqlens,
        "chunk_size": chunk_size,
    }
    if check_backend(backend, q) == "triton":
        # Imported here: Triton exists on Linux only, and its interpreter must be chosen before a kernel is defined.
        from triton_kernels.linear.delta_rule_launch import delta_rule_triton

        return delta_rule_triton(op, q, k, v, log_decay, beta, initial, **options)
    return delta_rule_torch(q, k, v, log_decay, beta, initial, **options)

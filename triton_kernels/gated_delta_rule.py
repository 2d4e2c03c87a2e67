"""The gated delta rule (gated DeltaNet), or the plain delta rule where there is no decay.

    S_t = e^{g_t} (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T        o_t = scale * S_t^T q_t

Letters: B batch, T tokens, G query/key heads, H value heads (a multiple of G), K key width, V value width, S sequences (B of them, or those packed
by `cu_seqlens`).
"""

from typing import Any

import torch
from torch import Tensor

from triton_kernels.checks import check_backend, check_cu_seqlens, check_dtype, check_shape
from triton_kernels.chunk_rule import inverse_length
from triton_kernels.gated_delta_rule_torch import gated_delta_rule_torch

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
    """Chunked gated delta rule: the state forgets by e^{log_decay}, then the part that k reads is moved toward v by beta.

    q, k [B, T, G, K] and v [B, T, H, V] in one dtype, H a multiple of G (value head h reads query head h // (H / G)). `log_decay_BTH` (nats per
    token, <= 0 and finite) or None for the plain delta rule; `beta_BTH` in [0, 2] (above 1 the transition has negative eigenvalues; k must then have
    unit length for stability: `normalize_qk` divides q and k by their length over K). `scale` is K^-1/2 unless given. `cu_seqlens` (int64 [S+1],
    with B = 1) packs S sequences, empty ones allowed; the states are then [S, H, K, V]. Returns o [B, T, H, V] in v's dtype and the final state in
    fp32 (fp64 for fp64 inputs); gradients flow to every tensor, states included.

    Raises ValueError for shapes, dtypes or offsets that do not fit. Sources: arXiv 2412.06464 (gate), 2406.06484 (WY form), 2411.12537 (beta to 2).
    """
    check_delta_inputs(OP, q_BTGK, k_BTGK, v_BTHV, beta_BTH, cu_seqlens, chunk_size)
    batch, tokens, heads, _ = v_BTHV.shape
    key_width = q_BTGK.shape[3]
    if log_decay_BTH is not None:
        check_shape(OP, "log_decay_BTH", log_decay_BTH, {"B": batch, "T": tokens, "H": heads})
    options: dict[str, Any] = {"scale": key_width**-0.5 if scale is None else scale, "normalize_qk": normalize_qk}
    options |= {"cu_seqlens": cu_seqlens, "chunk_size": chunk_size}
    initial = initial_state(OP, initial_state_BHKV, cu_seqlens, key_width, v_BTHV)
    if check_backend(backend, q_BTGK) == "triton":
        # Imported here: Triton exists on Linux only, and its interpreter must be chosen before a kernel is defined.
        from triton_kernels.delta_triton import delta_rule_triton

        return delta_rule_triton(OP, q_BTGK, k_BTGK, v_BTHV, log_decay_BTH, beta_BTH, initial, **options)
    return gated_delta_rule_torch(q_BTGK, k_BTGK, v_BTHV, log_decay_BTH, beta_BTH, initial, **options)


def gated_delta_rule_step(
    q_BGK: Tensor,
    k_BGK: Tensor,
    v_BHV: Tensor,
    log_decay_BH: Tensor | None,
    beta_BH: Tensor,
    state_BHKV: Tensor,
    *,
    scale: float | None = None,
    normalize_qk: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token of `gated_delta_rule`. Returns o [B, H, V] in v's dtype and the new state [B, H, K, V] in the state's dtype (fp32)."""
    check_delta_step(OP, q_BGK, k_BGK, v_BHV, beta_BH, state_BHKV)
    decay = None
    if log_decay_BH is not None:
        check_shape(OP, "log_decay_BH", log_decay_BH, {"B": v_BHV.shape[0], "H": v_BHV.shape[1]})
        decay = log_decay_BH[..., None]
    return delta_step(q_BGK, k_BGK, v_BHV, decay, beta_BH, state_BHKV, scale=scale, normalize_qk=normalize_qk)


def delta_step(
    q_BGK: Tensor, k_BGK: Tensor, v_BHV: Tensor, log_decay: Tensor | None, beta_BH: Tensor, state: Tensor, *, scale: float | None, normalize_qk: bool
) -> tuple[Tensor, Tensor]:
    """The recurrence itself, for a log_decay of [B, H, 1] or [B, H, K]."""
    dtype = state.dtype
    q, k = q_BGK.to(dtype), k_BGK.to(dtype)
    if normalize_qk:
        q, k = q * inverse_length(q), k * inverse_length(k)
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    group = v_BHV.shape[1] // q.shape[1]
    q, k = (x.repeat_interleave(group, 1) for x in (q, k))
    if log_decay is not None:
        state = state * log_decay.to(dtype).exp()[..., None]
    error_BHV = v_BHV.to(dtype) - (k[..., None, :] @ state).squeeze(-2)
    state = state + k[..., None] * (beta_BH.to(dtype)[..., None] * error_BHV)[..., None, :]
    return (q[..., None, :] @ state).squeeze(-2).to(v_BHV.dtype), state


def check_delta_inputs(op: str, q_BTGK: Tensor, k_BTGK: Tensor, v_BTHV: Tensor, beta_BTH: Tensor, cu_seqlens: Tensor | None, chunk_size: int) -> None:
    """What both delta rules refuse."""
    check_shape(op, "q_BTGK", q_BTGK, {"B": None, "T": None, "G": None, "K": None})
    batch, tokens, groups, key_width = q_BTGK.shape
    check_shape(op, "k_BTGK", k_BTGK, {"B": batch, "T": tokens, "G": groups, "K": key_width})
    check_shape(op, "v_BTHV", v_BTHV, {"B": batch, "T": tokens, "H": None, "V": None})
    heads = v_BTHV.shape[2]
    check_grouping(op, heads, groups)
    check_shape(op, "beta_BTH", beta_BTH, {"B": batch, "T": tokens, "H": heads})
    check_dtype(op, {"q": q_BTGK, "k": k_BTGK, "v": v_BTHV})
    check_cu_seqlens(op, cu_seqlens, batch, tokens)
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"{op}: chunk_size={chunk_size}, must be a power of two")


def check_delta_step(op: str, q_BGK: Tensor, k_BGK: Tensor, v_BHV: Tensor, beta_BH: Tensor, state_BHKV: Tensor) -> None:
    check_shape(op, "q_BGK", q_BGK, {"B": None, "G": None, "K": None})
    batch, groups, key_width = q_BGK.shape
    check_shape(op, "k_BGK", k_BGK, {"B": batch, "G": groups, "K": key_width})
    check_shape(op, "v_BHV", v_BHV, {"B": batch, "H": None, "V": None})
    heads = v_BHV.shape[1]
    check_grouping(op, heads, groups)
    check_shape(op, "beta_BH", beta_BH, {"B": batch, "H": heads})
    check_shape(op, "state_BHKV", state_BHKV, {"B": batch, "H": heads, "K": key_width, "V": v_BHV.shape[2]})
    check_dtype(op, {"q": q_BGK, "k": k_BGK, "v": v_BHV})


def check_grouping(op: str, heads: int, groups: int) -> None:
    if groups == 0 or heads % groups:
        raise ValueError(f"{op}: {heads} value heads are not a multiple of {groups} query/key heads")


def initial_state(op: str, state_BHKV: Tensor | None, cu_seqlens: Tensor | None, key_width: int, v_BTHV: Tensor) -> Tensor | None:
    """The given initial state in the state's dtype: fp32, or fp64 for fp64 inputs."""
    if state_BHKV is None:
        return None
    batch, _, heads, value_width = v_BTHV.shape
    n_states = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    check_shape(op, "initial_state_BHKV", state_BHKV, {"B": n_states, "H": heads, "K": key_width, "V": value_width})
    return state_BHKV.to(torch.promote_types(v_BTHV.dtype, torch.float32))

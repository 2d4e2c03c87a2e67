"""What the delta rules share besides their kernels: checks, and the choice of the backend.

Legend: B batch, T tokens, G query/key heads, H value heads (a multiple of G), K key width, V value width, S sequences
(B of them, or those packed by `cu_seqlens`).
"""

import math
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_kernels.common.checks import (
    check_backend,
    check_cu_seqlens,
    check_dtype,
    check_number,
    check_placed,
    check_range,
    check_tensors,
)
from triton_kernels.linear.linear_attention_torch import delta_rule_torch
from triton_kernels.linear.native import chunked_rule_native, takes_rule


class DeltaTensors(NamedTuple):
    """The tensors of one call: q, k [B, T, G, K], v [B, T, H, V], log_decay None, [B, T, H] or [B, T, H, K], beta
    [B, T, H], initial [S, H, K, V] or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    beta: Tensor
    initial: Tensor | None


def check_delta_inputs(op: str, **tensors: Tensor | None) -> dict[str, int]:
    """What both delta rules refuse. q, k and v come first: the heads of all others follow from theirs. Returns the
    sizes by letter."""
    q_k_v: dict[str, Any] = dict(islice(tensors.items(), 3))
    sizes = check_tensors(op, **q_k_v)
    if sizes["G"] == 0 or sizes["H"] % sizes["G"]:
        raise ValueError(f"{op}: {sizes['H']} value heads are not a multiple of {sizes['G']} query/key heads")
    check_dtype(op, {name[0]: x for name, x in q_k_v.items()})
    check_placed(op, **tensors)
    return check_tensors(op, sizes, **tensors)


def check_sequences(
    op: str, sizes: dict[str, int], q: Tensor, cu_seqlens: Tensor | None, initial_state_BHKV: Any
) -> Tensor | None:
    """The offsets, and the initial state, one per sequence, which is returned in the state's dtype: fp32, or fp64 for
    fp64 inputs."""
    check_placed(op, q=q, cu_seqlens=cu_seqlens, initial_state_BHKV=initial_state_BHKV)
    check_cu_seqlens(op, cu_seqlens, sizes["B"], sizes["T"])
    n_states = sizes["B"] if cu_seqlens is None else cu_seqlens.numel() - 1
    check_tensors(op, {**sizes, "B": n_states}, initial_state_BHKV=initial_state_BHKV)
    return None if initial_state_BHKV is None else initial_state_BHKV.to(torch.promote_types(q.dtype, torch.float32))


def run_delta_rule(
    op: str,
    sizes: dict[str, int],
    tensors: DeltaTensors,
    *,
    scale: float | None,
    normalize_qk: bool,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Either delta rule on the backend that is asked for.

    Args:
        op: the public op's name, for its errors.
        sizes: those of the shapes by letter.
        scale: of the queries; K^-1/2 where it is None.

    Returns:
        o [B, T, H, V] and the final state [S, H, K, V].

    Raises:
        ValueError: for chunks, offsets or an initial state that do not fit, or not into the kernels.
    """
    check_number(op, "scale", scale)
    if tensors.log_decay is not None:
        check_range(op, "log_decay", tensors.log_decay, -math.inf, 0)
    check_range(op, "beta_BTH", tensors.beta, 0, 2)
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"{op}: chunk_size={chunk_size}, must be a power of two")
    tensors = tensors._replace(initial=check_sequences(op, sizes, tensors.q, cu_seqlens, tensors.initial))
    factor = float(sizes["K"] ** -0.5 if scale is None else scale)
    chosen = check_backend(backend, tensors.q, native=takes_rule(tensors.v, *tensors))
    if chosen == "native":
        return chunked_rule_native(
            *(tensors.q, tensors.k, tensors.v, tensors.log_decay),
            beta_BTH=tensors.beta,
            initial_SHKV=tensors.initial,
            cu_seqlens=cu_seqlens,
            scale=factor,
            normalize_qk=normalize_qk,
        )
    if chosen == "triton":
        # Imported here: Triton exists on Linux only, and its interpreter must be chosen before a kernel is defined.
        from triton_kernels.linear.delta_rule_launch import check_kernels_take, delta_rule_triton

        check_kernels_take(op, tensors.q, tensors.v, chunk_size)
        implementation = delta_rule_triton
    else:
        implementation = delta_rule_torch
    return implementation(
        *tensors,
        scale=factor,
        normalize_qk=normalize_qk,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
    )

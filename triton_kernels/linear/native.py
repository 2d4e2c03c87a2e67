"""Linear attention in C on a CPU: one token of a layer, `delta_decode` and `lightning_decode` in one call each; and of
many tokens the chunked rules, with gradients.

Legend: B batch rows, T tokens, H value heads, G heads of queries and keys, K key width, V value width, X channels, W
convolution width, S sequences, N chunks of all.
"""

import ctypes
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from triton_kernels.native.library import UP_TO_FP32, call, takes_many_rows, threads, wide

# As in chunked_rule.c.
CHUNK = 32


def delta_decode_native(
    *projections: Tensor,
    conv_XW: Tensor,
    A_log_H: Tensor,
    dt_bias: Tensor,
    norm_V: Tensor,
    state_BHKV: Tensor,
    tail_BXW: Tensor,
    eps: float,
    silu: bool,
) -> Tensor:
    """`delta_decode` on checked arguments; the projections are qkv, gate, a and b."""
    B, H, K, V = state_BHKV.shape
    y_BHV = torch.empty(B, H, V)
    rows = [x.flatten(1).to(torch.float32) for x in projections]
    rows = [x if x.stride(1) == 1 else x.contiguous() for x in rows]
    call(
        "delta_decode",
        *(*rows, *(x.stride(0) for x in rows)),
        *(conv_XW, A_log_H, dt_bias, norm_V, state_BHKV, tail_BXW),
        *(tail_BXW.dtype == torch.bfloat16, dt_bias.numel() == H * K, silu),
        *(eps, B, H, K, V, conv_XW.shape[1], y_BHV, threads()),
    )
    return y_BHV.to(projections[0].dtype)


def lightning_decode_native(qkv_BX: Tensor, log_decay_H: Tensor, *, state_BHKV: Tensor) -> Tensor:
    """`lightning_decode` on checked arguments."""
    B, H, K, V = state_BHKV.shape
    o_BHV, x_BX = torch.empty(B, H, V), qkv_BX.to(torch.float32)
    x_BX = x_BX if x_BX.stride(1) == 1 else x_BX.contiguous()
    call("lightning_decode", x_BX, x_BX.stride(0), log_decay_H, state_BHKV, o_BHV, B, H, K, V)
    return o_BHV.to(qkv_BX.dtype)


def takes_rule(v_BTHV: Tensor, *others: Tensor | None) -> bool:
    """Whether `chunked_rule_native` takes the tensors of a call."""
    given = (x for x in (v_BTHV, *others) if x is not None)
    return v_BTHV.numel() > 0 and takes_many_rows(*given, dtypes=UP_TO_FP32)


class _Rule(NamedTuple):
    """What a call is besides its tensors."""

    sequences_S4: Tensor
    n_chunks: int
    scale: float
    normalize_qk: bool


def chunked_rule_native(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    log_decay: Tensor | None,
    *,
    beta_BTH: Tensor | None,
    initial_SHKV: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    normalize_qk: bool,
) -> tuple[Tensor, Tensor]:
    """The chunked forms behind `gated_delta_rule`, `kimi_delta_attention` and, without beta, `decayed_linear_attention`
    on checked arguments that `takes_rule` lets pass; log_decay is None, [H], [B, T, H] or [B, T, H, K].

    Returns:
        o_BTHV and the states after the last tokens [S, H, K, V].
    """
    dtype, (B, T, H, _) = v_BTHV.dtype, v_BTHV.shape
    if log_decay is None or log_decay.dim() < 4:
        log_decay = (torch.zeros(()) if log_decay is None else log_decay).expand(B, T, H)
    # Of each sequence: batch row, first token, tokens, chunks before it.
    spans = [(b, 0, T) for b in range(B)]
    if cu_seqlens is not None:
        spans = [(0, first, last - first) for first, last in pairwise(cu_seqlens.tolist())]
    *before, n_chunks = accumulate((-(-n // CHUNK) for _, _, n in spans), initial=0)
    sequences_S4 = torch.tensor([(*span, n) for span, n in zip(spans, before)], dtype=torch.int64)
    rule = _Rule(sequences_S4, n_chunks, scale, normalize_qk)
    tensors = (q_BTGK, k_BTGK, v_BTHV, log_decay, beta_BTH, initial_SHKV)
    o_BTHV, final_SHKV = _ChunkedRule.apply(rule, *(None if x is None else x.float() for x in tensors))  # pyright: ignore[reportGeneralTypeIssues]
    return o_BTHV.to(dtype), final_SHKV


class _ChunkedRule(torch.autograd.Function):
    """Keeps the state before every chunk, and of a correction the errors, beside the inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        rule: _Rule,
        q_BTGK: Tensor,
        k_BTGK: Tensor,
        v_BTHV: Tensor,
        log_decay: Tensor,
        beta_BTH: Tensor | None,
        initial_SHKV: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        (B, T, G, K), (H, V), S = q_BTGK.shape, v_BTHV.shape[2:], len(rule.sequences_S4)
        q_BTGK, k_BTGK, v_BTHV = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_BTGK, k_BTGK, v_BTHV))
        if log_decay.dim() == 4 and log_decay.stride(-1) != 1:
            log_decay = log_decay.contiguous()
        inputs = q_BTGK, k_BTGK, v_BTHV, log_decay, beta_BTH
        ctx.rule, ctx.sizes = rule, (S, T, H, G, K, V, int(log_decay.dim() == 4), int(rule.normalize_qk))
        states_NHKV = errors_BTHV = None
        if any(ctx.needs_input_grad):
            states_NHKV = torch.empty(rule.n_chunks, H, K, V)
            errors_BTHV = None if beta_BTH is None else torch.empty(B, T, H, V)
        final_SHKV, o_BTHV = torch.empty(S, H, K, V), torch.empty(B, T, H, V)
        call(
            "rule_forward",
            *_described(ctx, inputs, states_NHKV, errors_BTHV),
            *(None if initial_SHKV is None else wide(initial_SHKV), final_SHKV, o_BTHV, threads()),
        )
        ctx.save_for_backward(*inputs, states_NHKV, errors_BTHV)
        return o_BTHV, final_SHKV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        *inputs, states_NHKV, errors_BTHV = ctx.saved_tensors
        gradients = [None if x is None else torch.empty(x.shape) for x in inputs]
        if not ctx.needs_input_grad[4]:
            gradients[3] = None
        d_initial_SHKV = torch.empty(d_final.shape)
        call(
            "rule_backward",
            *_described(ctx, inputs, states_NHKV, errors_BTHV),
            *(wide(d_o), wide(d_final), *gradients, d_initial_SHKV, threads()),
        )
        return None, *gradients, d_initial_SHKV if ctx.needs_input_grad[6] else None


def _described(
    ctx: Any, inputs: Sequence[Tensor | None], states_NHKV: Tensor | None, errors_BTHV: Tensor | None
) -> tuple[Any, ...]:
    """The arguments that both directions share."""
    strides = [0 if x is None else x.stride(axis) for x in inputs for axis in range(3)]
    arrays = (ctypes.c_long * len(strides))(*strides), ctx.rule.sequences_S4, (ctypes.c_long * 8)(*ctx.sizes)
    return *inputs, *arrays, ctx.rule.scale, states_NHKV, errors_BTHV

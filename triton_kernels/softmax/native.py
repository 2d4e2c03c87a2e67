"""Softmax attention in C on a CPU: of one token of a layer, between its projections, and of many queries, forward and
backward.

Legend: B sequences, T queries, S keys or rows of the cache, H query heads, G key/value heads, K head width, V value
width, P half of the rotated channels, X = H K or G K.
"""

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from triton_kernels.native.library import call, rounded, rounds_products, threads, wide
from triton_kernels.softmax.rotary import Rotary, rotary_tables


@functools.lru_cache(maxsize=16)
def rotary_at(position: int, rotary_dim: int, base: float) -> Rotary:
    """Cosine and sine [rotary_dim / 2] of one position, fp32: all layers of a decode step turn by the same."""
    cosine_1P, sine_1P = rotary_tables(torch.tensor([position]), rotary_dim=rotary_dim, base=base)
    return cosine_1P[0].float(), sine_1P[0].float()


def softmax_decode_native(
    q_BX: Tensor,
    new_kv: tuple[Tensor, Tensor] | None,
    cache: tuple[Tensor, Tensor],
    *,
    row: int,
    q_norm_K: Tensor | None,
    k_norm_K: Tensor | None,
    eps: float,
    rotary: Rotary,
    sinks_H: Tensor | None,
) -> Tensor:
    """Attention of the newest token over the rows of the cache, in the projections' dtype.

    Args:
        q_BX: the projected queries, before norm and rotation.
        new_kv: projected key and value, before norm and rotation, to be written into the cache; None where another
            layer has written them.
        cache: k_BSGK and v_BSGV, the S rows in use (in any order: a ring), fp32 or bf16, dense but for the first axis.
        row: where in S the new token goes.
        rotary: see `rotary_at`.

    Raises:
        ValueError: for a cache of other heads.
    """
    (B, X), (_, S, G, K) = q_BX.shape, cache[0].shape
    for name, x_BX, legal in (
        ("q_BX", q_BX, X % (G * K) == 0 and len(cache[0]) == B and cache[1].shape == cache[0].shape),
        *(("new_kv", x_BX, x_BX.shape == (B, G * K)) for x_BX in new_kv or ()),
    ):
        if not legal:
            raise ValueError(
                f"softmax_decode: {name} has shape {list(x_BX.shape)}, which does not fit a cache [B, S, G, K] of"
                f" {list(cache[0].shape)}"
            )
    dtype, q_BX = q_BX.dtype, wide(q_BX)
    k_BX, v_BX = (None, None) if new_kv is None else (wide(x_BX) for x_BX in new_kv)
    o_BX = torch.empty(B, X)
    call(
        "softmax_decode",
        *(q_BX, k_BX, v_BX, X, G * K),
        *(*cache, cache[0].stride(0), row, S, cache[0].dtype == torch.bfloat16),
        *(q_norm_K, k_norm_K, *rotary, sinks_H),
        *(eps, K**-0.5, B, X // K, G, K, rotary[0].shape[0], o_BX, threads()),
    )
    return o_BX.to(dtype)


def flash_attention_native(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    *,
    rotary: Rotary | None,
    sinks_H: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> Tensor:
    """`flash_attention` on checked arguments, without packed sequences; sums are fp32, see `rounds_products`."""
    sinks_H = None if sinks_H is None else sinks_H.float()
    o_BTHV = _ManyQueries.apply(q_BTHK, k_BSGK, v_BSGV, sinks_H, rotary, causal, window, scale)
    assert isinstance(o_BTHV, Tensor)
    return o_BTHV


class _ManyQueries(torch.autograd.Function):
    """Keeps the logarithm of each row's sum for backward, beside what autograd has anyway."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BTHK: Tensor,
        k_BSGK: Tensor,
        v_BSGV: Tensor,
        sinks_H: Tensor | None,
        rotary: Rotary | None,
        causal: bool,
        window: int | None,
        scale: float,
    ) -> Tensor:
        given = q_BTHK, k_BSGK, v_BSGV
        q_BTHK, k_BSGK, v_BSGV = heads = _readable(given)
        (B, T, H, K), (_, S, G, V) = q_BTHK.shape, v_BSGV.shape
        cosine_TP, sine_TP = (None, None) if rotary is None else (wide(table_TP) for table_TP in rotary)
        half = 0 if cosine_TP is None else cosine_TP.shape[1]
        sinks_H = None if sinks_H is None else wide(sinks_H)
        ctx.sizes = (B, T, S, H, G, K, V, half, int(causal), window or 0)
        ctx.strides = tuple(x.stride(axis) for x in (q_BTHK, k_BSGK, v_BSGV) for axis in range(3))
        ctx.scale, ctx.bf16 = scale, rounds_products(given[0].dtype)
        o_BTHV, log_sum_BHT = torch.empty(B, T, H, V), torch.empty(B, H, T)
        vectors = cosine_TP, sine_TP, sinks_H
        call("softmax_forward", *_described(ctx, heads, vectors), o_BTHV, log_sum_BHT, ctx.bf16, False, threads())
        ctx.save_for_backward(*given, *vectors, o_BTHV, log_sum_BHT)
        return rounded(o_BTHV, given[0].dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        *inputs, o_BTHV, log_sum_BHT = ctx.saved_tensors
        B, T, S, H, G, K, V = ctx.sizes[:7]
        dq_BTHK, dk_BSGK, dv_BSGV = torch.empty(B, T, H, K), torch.empty(B, S, G, K), torch.empty(B, S, G, V)
        d_sinks_BH = None if inputs[5] is None else torch.empty(B, H)
        call(
            "softmax_backward",
            *_described(ctx, _readable(inputs[:3]), inputs[3:]),
            *(o_BTHV, log_sum_BHT, wide(d_o), dq_BTHK, dk_BSGK, dv_BSGV, d_sinks_BH, ctx.bf16, threads()),
        )
        d_sinks_H = None if d_sinks_BH is None else d_sinks_BH.sum(0)
        gradients = (rounded(dx, x.dtype) for dx, x in zip((dq_BTHK, dk_BSGK, dv_BSGV), inputs))
        return *gradients, d_sinks_H, None, None, None, None


def _readable(heads: Sequence[Tensor]) -> list[Tensor]:
    """Queries, keys and values in fp32, channels side by side; where they lie if they are so."""
    return [x if x.dtype == torch.float32 and x.stride(-1) == 1 else wide(x) for x in heads]


def _described(ctx: Any, heads: Sequence[Tensor], vectors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """The arguments that both directions share."""
    strides, sizes = (ctypes.c_long * 9)(*ctx.strides), (ctypes.c_long * 10)(*ctx.sizes)
    return *heads, strides, sizes, *vectors, ctx.scale

"""flash_attention on its Triton kernels, as operators that torch.compile and CUDA graphs see as one node each.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, K key width, V value width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from triton_kernels.common.launch_tables import Tables
from triton_kernels.common.registration import has_work, kernel_op
from triton_kernels.common.sizes import padded
from triton_kernels.common.tiles import dense_channels, rows
from triton_kernels.softmax.flash_attention_kernels import (
    LOG2E,
    Call,
    Form,
    forward_kernel,
    key_value_gradient_kernel,
    query_gradient_kernel,
)
from triton_kernels.softmax.launch_tables import FORWARD, KEY_VALUE_GRADIENT, QUERY_GRADIENT


@dataclass(frozen=True, kw_only=True)
class Visibility:
    """Which keys a query sees, and the scale of its logits."""

    causal: bool
    window: int | None
    scale: float


class AttentionCall:
    """What the kernels of one call have in common; rotary: the tables [T, P], or None."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens: Tensor | None,
        rotary: tuple[Tensor, Tensor] | None,
        visibility: Visibility,
    ):
        self.q, self.k, self.v = dense_channels(q), dense_channels(k), dense_channels(v)
        self.cu_seqlens, self.scale = cu_seqlens, visibility.scale
        self.n_sequences = 0 if cu_seqlens is None else cu_seqlens.numel() - 1
        self.tables = (None, None) if rotary is None else tuple(table.float() for table in rotary)
        # A window as long as the keys hides nothing.
        window = visibility.window
        self.window = window if window is not None and window < k.shape[1] else 0
        (H, K), (G, V) = q.shape[2:], v.shape[2:]
        self.form = Form(
            K=K,
            V=V,
            BLOCK_K=padded(K),
            BLOCK_V=padded(V),
            GROUP=H // G,
            ROTARY=0 if rotary is None else 2 * rotary[0].shape[1],
            CAUSAL=visibility.causal,
            WINDOW=self.window > 0,
        )

    def arguments(self, length: int, block: int) -> tuple[int, Call]:
        """(blocks of each head, what the kernels are given) for a launch over `length` rows in blocks of `block`."""
        # Packed sequences may need one more block each, see `locate`.
        n_blocks = length // block + self.n_sequences if self.n_sequences else -(-length // block)
        return n_blocks, Call(
            q=rows(self.q),
            k=rows(self.k),
            v=rows(self.v),
            cu_seqlens=self.cu_seqlens,
            cos=self.tables[0],
            sin=self.tables[1],
            T=self.q.shape[1],
            S=self.k.shape[1],
            H=self.q.shape[2],
            n_sequences=self.n_sequences,
            n_blocks=n_blocks,
            window=self.window,
            scale=self.scale,
            scale_log2=self.scale * LOG2E.value,
        )

    def launch(self, kernel: Any, tables: Tables, block: str, **tensors: Any) -> None:
        """Over all blocks of queries, or all of keys: `block` names the constant that says how many rows a block has,
        `tensors` are what this kernel reads and writes besides the call's own, by its parameters' names."""
        T, S = self.q.shape[1], self.k.shape[1]
        # Packed sequences, rotary queries and odd lengths, of whose offsets the compiler knows less, have a table of
        # their own: they take a few more registers.
        unknown = self.n_sequences or self.form.ROTARY or T % 16 > 0 or S % 16 > 0
        options = tables[1 if self.q.dtype == torch.float32 else 2 if unknown else 0].options(
            max(self.form.K, self.form.V)
        )[0]
        length, heads = (self.q if block == "BLOCK_M" else self.k).shape[1:3]
        n_blocks, call = self.arguments(length, options.blocks[block])
        kernel[(n_blocks * heads * self.q.shape[0],)](call=call, **tensors, FORM=self.form, **options.keywords)


@kernel_op("flash_attention", strided="q k v")
def forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(o [B, T, H, V], lse [B, H, T] in log2); the arguments are those of `flash_attention`, already checked."""
    B, T, H = q.shape[:3]
    o, lse = q.new_empty(B, T, H, v.shape[3]), q.new_empty(B, H, T, dtype=torch.float32)
    if has_work(o):
        call = AttentionCall(
            q,
            k,
            v,
            cu_seqlens=cu_seqlens,
            rotary=None if cos is None or sin is None else (cos, sin),
            visibility=Visibility(causal=causal, window=window, scale=scale),
        )
        call.launch(forward_kernel, FORWARD, "BLOCK_M", sinks_ptr=sinks, o=rows(o), lse_ptr=lse)
    return o, lse


@kernel_op("flash_attention_backward", strided="do q k v")
def backward_op(
    do: Tensor,
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, delta [B, H, T]): all contiguous."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    delta = torch.empty_like(lse)
    visibility = Visibility(causal=causal, window=window, scale=scale)
    do = dense_channels(do)
    if has_work(dq):
        # The first kernel turns the queries once and leaves them for the second, where every block of keys would have
        # to turn them again.
        turned_q = None if cos is None else torch.empty_like(dq)
        rotary = None if cos is None or sin is None else (cos, sin)
        call = AttentionCall(q, k, v, cu_seqlens=cu_seqlens, rotary=rotary, visibility=visibility)
        call.launch(
            query_gradient_kernel,
            QUERY_GRADIENT,
            "BLOCK_M",
            o=rows(o),
            do=rows(do),
            lse_ptr=lse,
            delta_ptr=delta,
            dq=rows(dq),
            turned_q=rows(turned_q),
        )
        q = q if turned_q is None else turned_q
    if has_work(dk):
        call = AttentionCall(q, k, v, cu_seqlens=cu_seqlens, rotary=None, visibility=visibility)
        call.launch(
            key_value_gradient_kernel,
            KEY_VALUE_GRADIENT,
            "BLOCK_N",
            do=rows(do),
            lse_ptr=lse,
            delta_ptr=delta,
            dk=rows(dk),
            dv=rows(dv),
        )
    return dq, dk, dv, delta


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.causal, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, do: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, sinks, o, lse = ctx.saved_tensors
    dq, dk, dv, delta = backward_op(do, o, lse, *inputs, causal=ctx.causal, window=ctx.window, scale=ctx.scale)
    return dq, dk, dv, None, None, None, sink_gradient(sinks, lse, delta), None, None, None


def sink_gradient(sinks_H: Tensor | None, lse_BHT: Tensor, delta_BHT: Tensor) -> Tensor | None:
    """The sink's weight in row t is e^{sink - lse}; its value is zero, so its dP is zero too."""
    if sinks_H is None:
        return None
    weight_BHT = torch.exp2(sinks_H.float()[:, None] * LOG2E.value - lse_BHT)
    return -(weight_BHT * delta_BHT).sum((0, 2)).to(sinks_H.dtype)


forward_op.register_autograd(_backward, setup_context=_save)

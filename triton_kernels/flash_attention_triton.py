"""flash_attention on its Triton kernels, as operators that torch.compile and CUDA graphs see as one node each.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, K key width, V value width, P2 half of the rotated channels.
"""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from triton_kernels.configurations import Tables
from triton_kernels.flash_attention_backward import key_value_gradient_kernel, query_gradient_kernel
from triton_kernels.flash_attention_configurations import FORWARD, KEY_VALUE_GRADIENT, QUERY_GRADIENT
from triton_kernels.flash_attention_forward import forward_kernel
from triton_kernels.rotary_triton import kernel_tables

LOG2E = math.log2(math.e)
MAX_ROW_STRIDE = 2**23


@torch.library.custom_op("hybrid_attention::flash_attention", mutates_args=())
def forward_op(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, cos: Tensor | None, sin: Tensor | None, sinks: Tensor | None,
    causal: bool, window: int | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(o [B, T, H, V], lse [B, H, T] in log2); the arguments are those of `flash_attention`, already checked."""
    B, T, H = q.shape[:3]
    o, lse = q.new_empty(B, T, H, v.shape[-1]), q.new_empty(B, H, T, dtype=torch.float32)
    if o.numel() > 0:
        tables = (None, None) if cos is None or sin is None else kernel_tables(cos, sin)
        call = AttentionCall(q, k, v, cu_seqlens, causal, window, scale)
        call.launch(forward_kernel, FORWARD, "BLOCK_M", T, H, (*tables, sinks, o, lse), ROTARY=_rotary_width(cos))
    return o, lse


@forward_op.register_fake
def _(q, k, v, cu_seqlens, cos, sin, sinks, causal, window, scale):
    B, T, H = q.shape[:3]
    return q.new_empty(B, T, H, v.shape[-1]), q.new_empty(B, H, T, dtype=torch.float32)


@torch.library.custom_op("hybrid_attention::flash_attention_backward", mutates_args=())
def backward_op(
    do: Tensor, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    causal: bool, window: int | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv, delta [B, H, T]): all contiguous."""
    (T, H), (S, G) = q.shape[1:3], k.shape[1:3]
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    delta = torch.empty_like(lse)
    call = AttentionCall(q, k, v, cu_seqlens, causal, window, scale)
    do = do.contiguous()
    if T * H > 0:
        # The first kernel turns the queries once and leaves them for the second, where every block of keys would have to turn them again.
        tables = (None, None) if cos is None or sin is None else kernel_tables(cos, sin)
        turned_q = None if cos is None else torch.empty_like(dq)
        tensors = (*tables, o, do, lse, dq, delta, turned_q)
        call.launch(query_gradient_kernel, QUERY_GRADIENT, "BLOCK_M", T, H, tensors, ROTARY=_rotary_width(cos))
        call = call if turned_q is None else AttentionCall(turned_q, k, v, cu_seqlens, causal, window, scale)
    if S * G > 0:
        call.launch(key_value_gradient_kernel, KEY_VALUE_GRADIENT, "BLOCK_N", S, G, (do, lse, delta, dk, dv))
    return dq, dk, dv, delta


@backward_op.register_fake
def _(do, o, lse, q, k, v, cu_seqlens, cos, sin, causal, window, scale):
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv, torch.empty_like(lse)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.causal, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, do: Tensor, _lse_gradient: Tensor | None):
    *inputs, sinks, o, lse = ctx.saved_tensors
    dq, dk, dv, delta_BHT = backward_op(do, o, lse, *inputs, ctx.causal, ctx.window, ctx.scale)
    dsinks = None if sinks is None else sink_gradient(sinks, lse, delta_BHT)
    return dq, dk, dv, None, None, None, dsinks, None, None, None


def sink_gradient(sinks: Tensor, lse_BHT: Tensor, delta_BHT: Tensor) -> Tensor:
    """The sink's weight in row t is e^{sink - lse}; its value is zero, so its dP is zero too."""
    weight_BHT = torch.exp2(sinks.float()[:, None] * LOG2E - lse_BHT)
    return -(weight_BHT * delta_BHT).sum((0, 2)).to(sinks.dtype)


forward_op.register_autograd(_backward, setup_context=_save)


def _rotary_width(cos: Tensor | None) -> int:
    return 0 if cos is None else 2 * cos.shape[1]


class AttentionCall:
    """What the three kernels of one call have in common."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, causal: bool, window: int | None, scale: float):
        # Any layout whose channels lie side by side is read where it is; offsets within a block of rows are int32.
        self.qkv = [x if x.stride(-1) == 1 and x.stride(1) < MAX_ROW_STRIDE else x.contiguous() for x in (q, k, v)]
        self.cu_seqlens, self.scale = cu_seqlens, scale
        # A window as long as the keys hides nothing.
        self.window = window if window is not None and window < k.shape[1] else 0
        K, V = q.shape[-1], v.shape[-1]
        self.constants = {
            "KEY_WIDTH": K,
            "VALUE_WIDTH": V,
            "BLOCK_K": max(16, triton.next_power_of_2(K)),
            "BLOCK_V": max(16, triton.next_power_of_2(V)),
            "GROUP": q.shape[2] // k.shape[2],
            "CAUSAL": causal,
            "WINDOW": self.window > 0,
        }

    def launch(self, kernel: Any, tables: Tables, block: str, length: int, heads: int, tensors: tuple[Tensor | None, ...], **constants: int) -> None:
        """Over the blocks of `length` rows of each of `heads` heads; `block` names the constant that says how many rows a block has."""
        q, k, v = self.qkv
        n_sequences = 0 if self.cu_seqlens is None else self.cu_seqlens.numel() - 1
        # Packed sequences, rotary queries and odd lengths, of whose offsets the compiler knows less, have a table of their own: they take a few more
        # registers.
        is_odd = q.shape[1] % 16 > 0 or k.shape[1] % 16 > 0
        table = tables[1 if q.dtype == torch.float32 else 2 if n_sequences or constants.get("ROTARY") or is_odd else 0]
        options = table.options(max(q.shape[-1], v.shape[-1]))[0]
        # Packed sequences may need one more block each, see `locate`.
        size = options.blocks[block]
        n_blocks = length // size + n_sequences if n_sequences else -(-length // size)
        strides = [x.stride(axis) for x in self.qkv for axis in range(3)]
        sizes = (q.shape[1], k.shape[1], heads, n_sequences, n_blocks, self.window, self.scale, self.scale * LOG2E)
        kernel[(n_blocks * heads * q.shape[0],)](
            *self.qkv, self.cu_seqlens, *tensors, *strides, *sizes, **self.constants, **constants, **options.blocks,
            num_warps=options.num_warps, num_stages=options.num_stages,
        )  # fmt: skip

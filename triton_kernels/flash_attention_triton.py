"""flash_attention on its Triton kernels, as operators that torch.compile and CUDA graphs see as one node each.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, K key width, V value width.
"""

import math

import torch
import triton
from torch import Tensor

from triton_kernels.flash_attention_backward import key_value_gradient_kernel, query_gradient_kernel
from triton_kernels.flash_attention_configurations import FORWARD, KEY_VALUE_GRADIENT, MAX_WIDTH, QUERY_GRADIENT, Tables
from triton_kernels.flash_attention_forward import forward_kernel

LOG2E = math.log2(math.e)
MAX_ROW_STRIDE = 2**23


def flash_attention_triton(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
    sinks_H: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """o_BTHV; the arguments are those of `flash_attention`, already checked."""
    width = max(q_BTHK.shape[-1], v_BSGV.shape[-1])
    if width > MAX_WIDTH or q_BTHK.dtype == torch.float64:
        raise ValueError(
            f"flash_attention: {q_BTHK.dtype} heads of width {width}; the Triton kernels take float32, float16 and bfloat16 up to {MAX_WIDTH}"
        )
    return torch.ops.hybrid_attention.flash_attention(q_BTHK, k_BSGK, v_BSGV, sinks_H, cu_seqlens, causal, window, scale)[0]


@torch.library.custom_op("hybrid_attention::flash_attention", mutates_args=())
def forward_op(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, cu_seqlens: Tensor | None, causal: bool, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(o [B, T, H, V], lse [B, H, T] in log2)."""
    B, T, H = q.shape[:3]
    o, lse = q.new_empty(B, T, H, v.shape[-1]), q.new_empty(B, H, T, dtype=torch.float32)
    if o.numel() > 0:
        call = _Call(q, k, v, cu_seqlens, causal, window, scale)
        grid, n_blocks, options = call.launch(FORWARD, "BLOCK_M", T, H)
        sizes = (*call.strides, T, k.shape[1], H, call.n_sequences, n_blocks, call.window, scale * LOG2E)
        forward_kernel[grid](call.q, call.k, call.v, sinks, cu_seqlens, o, lse, *sizes, SINKS=sinks is not None, **call.constants, **options)
    return o, lse


@forward_op.register_fake
def _(q, k, v, sinks, cu_seqlens, causal, window, scale):
    B, T, H = q.shape[:3]
    return q.new_empty(B, T, H, v.shape[-1]), q.new_empty(B, H, T, dtype=torch.float32)


@torch.library.custom_op("hybrid_attention::flash_attention_backward", mutates_args=())
def backward_op(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, cu_seqlens: Tensor | None, causal: bool, window: int | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, delta [B, H, T]): all contiguous."""
    (T, H), (S, G) = q.shape[1:3], k.shape[1:3]
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    delta = torch.empty_like(lse)
    call = _Call(q, k, v, cu_seqlens, causal, window, scale)
    do = do.contiguous()
    if T * H > 0:
        grid, n_blocks, options = call.launch(QUERY_GRADIENT, "BLOCK_M", T, H)
        sizes = (*call.strides, T, S, H, call.n_sequences, n_blocks, call.window, scale, scale * LOG2E)
        query_gradient_kernel[grid](call.q, call.k, call.v, o, do, lse, cu_seqlens, dq, delta, *sizes, **call.constants, **options)
    if S * G > 0:
        grid, n_blocks, options = call.launch(KEY_VALUE_GRADIENT, "BLOCK_N", S, G)
        sizes = (*call.strides, T, S, G, call.n_sequences, n_blocks, call.window, scale, scale * LOG2E)
        key_value_gradient_kernel[grid](call.q, call.k, call.v, do, lse, delta, cu_seqlens, dk, dv, *sizes, **call.constants, **options)
    return dq, dk, dv, delta


@backward_op.register_fake
def _(do, q, k, v, o, lse, cu_seqlens, causal, window, scale):
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv, torch.empty_like(lse)


def _save(ctx, inputs, output) -> None:
    q, k, v, sinks, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, sinks, cu_seqlens, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, do: Tensor, _lse_gradient: Tensor | None):
    q, k, v, sinks, cu_seqlens, o, lse = ctx.saved_tensors
    dq, dk, dv, delta_BHT = torch.ops.hybrid_attention.flash_attention_backward(do, q, k, v, o, lse, cu_seqlens, *ctx.options)
    dsinks = None
    if sinks is not None:
        # The sink's weight in row t is e^{sink - lse}; its value is zero, so its dP is zero too.
        weight_BHT = torch.exp2(sinks.float()[:, None] * LOG2E - lse)
        dsinks = -(weight_BHT * delta_BHT).sum((0, 2)).to(sinks.dtype)
    return dq, dk, dv, dsinks, None, None, None, None


forward_op.register_autograd(_backward, setup_context=_save)


class _Call:
    """What the three kernels of one call have in common."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, causal: bool, window: int | None, scale: float):
        # Any layout whose channels lie side by side is read where it is; offsets within a block of rows are int32.
        self.q, self.k, self.v = (x if x.stride(-1) == 1 and x.stride(1) < MAX_ROW_STRIDE else x.contiguous() for x in (q, k, v))
        self.batch_size = q.shape[0]
        self.strides = tuple(x.stride(i) for x in (self.q, self.k, self.v) for i in range(3))
        self.n_sequences = 0 if cu_seqlens is None else cu_seqlens.numel() - 1
        # A window as long as the keys hides nothing.
        windowed = window is not None and window < k.shape[1]
        self.window = window if windowed else 0
        K, V = q.shape[-1], v.shape[-1]
        self.width = max(K, V)
        self.is_single = q.dtype == torch.float32
        self.constants = {
            "KEY_WIDTH": K,
            "VALUE_WIDTH": V,
            "BLOCK_K": max(16, triton.next_power_of_2(K)),
            "BLOCK_V": max(16, triton.next_power_of_2(V)),
            "GROUP": q.shape[2] // k.shape[2],
            "CAUSAL": causal,
            "WINDOW": windowed,
            "PACKED": cu_seqlens is not None,
        }

    def launch(self, tables: Tables, block: str, length: int, heads: int) -> tuple[tuple[int], int, dict[str, int]]:
        """(grid, blocks of one head, launch options); packed sequences may need one more block each, see `locate`."""
        # A line's last option is for packed sequences, whose bookkeeping takes a few more registers.
        options = tables[self.is_single].options(self.width)[-1 if self.n_sequences else 0]
        size = options.blocks[block]
        n_blocks = length // size + self.n_sequences if self.n_sequences else -(-length // size)
        return (n_blocks * heads * self.batch_size,), n_blocks, {**options.blocks, "num_warps": options.num_warps, "num_stages": options.num_stages}

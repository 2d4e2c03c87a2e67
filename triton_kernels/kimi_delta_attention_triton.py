"""kimi_delta_attention on its Triton kernels, as operators that torch.compile and CUDA graphs see as one node each.

Forward: prepare (chunks in parallel), scan. Backward: both scans in one launch, the gradients (chunks and blocks of
channels in parallel), and their row sums.
Letters: B batch, T tokens, G query/key heads, H value heads, K key width, V value width, S sequences, C chunk length.
"""

from typing import Any

import torch

from triton_kernels.delta_launch import DeltaCall, addressable, block_of, check_triton_call, token_strides
from triton_kernels.delta_scan import scan_kernel
from triton_kernels.kimi_delta_attention_configurations import CHANNELS, FINISH_ROWS, GRADIENTS, PREPARE, SCAN_BACKWARD, SCAN_FORWARD
from triton_kernels.kimi_delta_attention_gradients import finish_kernel, gradient_kernel
from triton_kernels.kimi_delta_attention_prepare import prepare_kernel

Tensor = torch.Tensor
Saved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("triton_kernels::kimi_delta_attention", mutates_args=())
def forward_op(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None, scale: float,
    normalize_qk: bool, chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(o, final state, attention [H, B T, C], inverse [H, B T, C], read_q, read_k and write [3, B, T, H, K], whole-chunk decays [H, slots, K])."""
    outputs = forward_op_fake(q, k, v, g, beta, initial, cu_seqlens, scale, normalize_qk, chunk_size)
    o, final, attention, inverse, decayed, whole = outputs
    call = DeltaCall(q, v, cu_seqlens, chunk_size)
    if call.empty:
        return outputs[0], torch.zeros_like(final) if initial is None else initial.clone(), *outputs[2:]
    q, k, v = addressable(q), addressable(k), addressable(v)
    grid, options = call.chunk_launch(PREPARE, call.H)
    prepare_kernel[grid](
        q, k, g, beta, attention, inverse, *decayed, whole, cu_seqlens, *call.scan_sizes[:4], call.S, call.H, *token_strides(q, k), scale,
        NORMALIZE=normalize_qk, LEVELS=chunk_size.bit_length() - 1, **options,
    )  # fmt: skip
    grid, options = call.scan_launch(SCAN_FORWARD, 1)
    scan_kernel[grid](
        *decayed, v, None, attention, inverse, None, None, None, whole, initial, None, o, final, None, None, None, None, None, cu_seqlens,
        *call.scan_sizes, *token_strides(*decayed, v, None),
        CHANNEL=True, FORWARD=True, HAS_INITIAL=initial is not None, HAS_DFINAL=False, **options,
    )  # fmt: skip
    return outputs


@forward_op.register_fake
def forward_op_fake(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None, scale: float,
    normalize_qk: bool, chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    call = DeltaCall(q, v, cu_seqlens, chunk_size)
    rows = call.B * call.T
    return (
        v.new_empty(v.shape),
        v.new_empty(call.S, call.H, call.K, call.V, dtype=torch.float32),
        v.new_empty(call.H, rows, chunk_size),
        v.new_empty(call.H, rows, chunk_size),
        v.new_empty(3, *v.shape[:3], call.K),
        v.new_empty(call.H, call.slots, call.K, dtype=torch.float32),
    )


@torch.library.custom_op("triton_kernels::kimi_delta_attention_backward", mutates_args=())
def backward_op(
    do: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial: Tensor | None,
    cu_seqlens: Tensor | None, attention: Tensor, inverse: Tensor, decayed: Tensor, whole: Tensor, scale: float, normalize_qk: bool, chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv, dg, dbeta, dinitial); dinitial is empty where there is no initial state."""
    outputs = backward_op_fake(do, dfinal, q, k, v, g, beta, initial, cu_seqlens, attention, inverse, decayed, whole, scale, normalize_qk, chunk_size)
    call = DeltaCall(q, v, cu_seqlens, chunk_size)
    dq, dk, dv, dg, dbeta, dinitial = outputs
    if call.empty:
        return *outputs[:5], torch.zeros_like(dinitial) if dfinal is None else dfinal.clone()
    do, q, k, v = addressable(do), addressable(q), addressable(k), addressable(v)
    errors = torch.empty_like(dv)
    n_blocks = -(-call.K // CHANNELS)
    head_dq, head_dk = v.new_empty(2, *v.shape[:3], call.K, dtype=torch.float32)
    block_dbeta = v.new_empty(n_blocks, *v.shape[:3], dtype=torch.float32)
    states, dstates = (v.new_empty(call.H, call.slots, call.K, call.V) for _ in range(2))
    grid, options = call.scan_launch(SCAN_BACKWARD, 2)
    scan_kernel[grid](
        *decayed, v, do, attention, inverse, None, None, None, whole, initial, dfinal, None, None, errors, states, dv, dstates, dinitial, cu_seqlens,
        *call.scan_sizes, *token_strides(*decayed, v, do),
        CHANNEL=True, FORWARD=False, HAS_INITIAL=initial is not None, HAS_DFINAL=dfinal is not None, **options,
    )  # fmt: skip
    grid, options = call.chunk_launch(GRADIENTS, call.H * n_blocks)
    gradient_kernel[grid](
        q, k, g, beta, do, errors, dv, states, dstates, head_dq, head_dk, dg, block_dbeta, cu_seqlens, *call.scan_sizes[:4], call.S, call.H,
        *token_strides(q, k, do), scale, NORMALIZE=normalize_qk, LEVELS=chunk_size.bit_length() - 1, V=call.V, CHANNELS=CHANNELS, **options,
    )  # fmt: skip
    finish_kernel[(-(-call.B * call.T // FINISH_ROWS) * call.G,)](
        q, k, head_dq, head_dk, block_dbeta, dq, dk, dbeta, call.B * call.T, call.H, *token_strides(q, k), K=call.K, BLOCK_K=block_of(call.K),
        N_BLOCKS=n_blocks, ROWS=FINISH_ROWS, GROUP=call.H // call.G, NORMALIZE=normalize_qk, num_warps=4,
    )  # fmt: skip
    return outputs


@backward_op.register_fake
def backward_op_fake(
    do: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial: Tensor | None,
    cu_seqlens: Tensor | None, attention: Tensor, inverse: Tensor, decayed: Tensor, whole: Tensor, scale: float, normalize_qk: bool, chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        g.new_empty(g.shape),
        beta.new_empty(beta.shape),
        beta.new_empty((0,) if initial is None else initial.shape, dtype=torch.float32),
    )


def setup_context(ctx: Any, inputs: tuple, output: Saved) -> None:
    *tensors, cu_seqlens, scale, normalize_qk, chunk_size = inputs
    ctx.save_for_backward(*tensors, cu_seqlens, *output[2:])
    ctx.options = (scale, normalize_qk, chunk_size)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, v, g, beta, initial, *rest = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do
    dfinal = None if dfinal is None else dfinal.contiguous()
    dq, dk, dv, dg, dbeta, dinitial = backward_op(do, dfinal, q, k, v, g, beta, initial, *rest, *ctx.options)
    return dq, dk, dv, dg, dbeta, None if initial is None else dinitial, None, None, None, None


forward_op.register_autograd(backward, setup_context=setup_context)


def kimi_delta_attention_triton(
    q_BTGK: Tensor, k_BTGK: Tensor, v_BTHV: Tensor, log_decay_BTHK: Tensor, beta_BTH: Tensor, initial_SHKV: Tensor | None, *,
    scale: float, normalize_qk: bool, cu_seqlens: Tensor | None, chunk_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The kernels behind `kimi_delta_attention`, whose arguments these are."""
    check_triton_call("kimi_delta_attention", q_BTGK, v_BTHV, chunk_size)
    initial_SHKV = None if initial_SHKV is None else initial_SHKV.contiguous()
    o, final, *_ = forward_op(
        q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK.contiguous(), beta_BTH.contiguous(), initial_SHKV, cu_seqlens, scale, normalize_qk, chunk_size
    )
    return o, final

"""The delta rules on their Triton kernels, as operators that torch.compile and CUDA graphs see as one node each.

Forward: prepare (chunks in parallel), scan. Backward: both scans in one launch, then the gradients (chunks in parallel; with a decay per key channel
also blocks of channels, and a launch for their row sums). The gate, none, [B, T, H] or [B, T, H, K], chooses the kernels around the scan.
Letters: B batch, T tokens, G query/key heads, H value heads, K key width, V value width, S sequences, C chunk length.
"""

# A launch's options are keywords that no kernel lists, and the two kernels of a choice differ in them, which a type checker cannot know.
# pyright: reportCallIssue=false, reportArgumentType=false
from typing import Any

import torch

from triton_kernels import gated_delta_rule_configurations as scalar_tables
from triton_kernels import gated_delta_rule_gradients as scalar_gradients
from triton_kernels import gated_delta_rule_prepare as scalar_prepare
from triton_kernels import kimi_delta_attention_configurations as channel_tables
from triton_kernels import kimi_delta_attention_gradients as channel_gradients
from triton_kernels import kimi_delta_attention_prepare as channel_prepare
from triton_kernels.delta_launch import SINGLE_CHUNK, DeltaCall, addressable, block_of, cdiv, check_triton_call, token_strides
from triton_kernels.delta_scan import scan_kernel

Tensor = torch.Tensor
Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def is_channel(g: Tensor | None) -> bool:
    return g is not None and g.dim() == 4


def scan_operands(q: Tensor, k: Tensor, factors: Tensor, channel: bool) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """What reads and writes the state: matrices (read_q, read_k, write), or q and k with a factor per row for each of the three."""
    read_q, read_k, write = factors
    return ((read_q, read_k, write), (None, None, None)) if channel else ((q, k, None), (read_q, read_k, write))


@torch.library.custom_op("triton_kernels::delta_rule", mutates_args=())
def forward_op(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None, scale: float,
    normalize_qk: bool, chunk_size: int,
) -> Six:  # fmt: skip
    """(o, final state, attention [H, B T, C], inverse [H, B T, C], row factors [3, H, B T], decays of whole chunks [H, slots]); with a decay per
    channel the factors are matrices [3, B, T, H, K] and the last is [H, slots, K]."""
    outputs = forward_op_fake(q, k, v, g, beta, initial, cu_seqlens, scale, normalize_qk, chunk_size)
    o, final, attention, inverse, factors, whole = outputs
    call, channel = DeltaCall(q, v, cu_seqlens, chunk_size), is_channel(g)
    if call.empty:
        return o, torch.zeros_like(final) if initial is None else initial.clone(), attention, inverse, factors, whole
    q, k, v = addressable(q), addressable(k), addressable(v)
    tables = channel_tables if channel else scalar_tables
    grid, options = call.chunk_launch(tables.PREPARE, call.H)
    options |= {"LEVELS": chunk_size.bit_length() - 1} if channel else {"HAS_GATE": g is not None}
    (channel_prepare if channel else scalar_prepare).prepare_kernel[grid](
        q, k, g, beta, attention, inverse, *factors, whole, cu_seqlens, *call.scan_sizes[:4], call.S, call.H, *token_strides(q, k), scale,
        NORMALIZE=normalize_qk, **options,
    )  # fmt: skip
    matrices, row_factors = scan_operands(q, k, factors, channel)
    grid, options = call.scan_launch(tables.SCAN_FORWARD, 1)
    scan_kernel[grid](
        *matrices, v, None, attention, inverse, *row_factors, whole, initial, None, o, final, None, None, None, None, None, cu_seqlens,
        *call.scan_sizes, *token_strides(*matrices, v, None),
        CHANNEL=channel, FORWARD=True, HAS_INITIAL=initial is not None, HAS_DFINAL=False, **options,
    )  # fmt: skip
    return outputs


@forward_op.register_fake
def forward_op_fake(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None, scale: float,
    normalize_qk: bool, chunk_size: int,
) -> Six:  # fmt: skip
    call, channel = DeltaCall(q, v, cu_seqlens, chunk_size), is_channel(g)
    rows = call.B * call.T
    return (
        v.new_empty(v.shape),
        v.new_empty(call.S, call.H, call.K, call.V, dtype=torch.float32),
        v.new_empty(call.H, rows, chunk_size),
        v.new_empty(call.H, rows, chunk_size),
        v.new_empty(3, *v.shape[:3], call.K) if channel else v.new_empty(3, call.H, rows, dtype=torch.float32),
        v.new_empty((call.H, call.slots, call.K) if channel else (call.H, call.slots), dtype=torch.float32),
    )


@torch.library.custom_op("triton_kernels::delta_rule_backward", mutates_args=())
def backward_op(
    do: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, initial: Tensor | None,
    cu_seqlens: Tensor | None, attention: Tensor, inverse: Tensor, factors: Tensor, whole: Tensor, scale: float, normalize_qk: bool, chunk_size: int,
) -> Six:  # fmt: skip
    """(dq, dk, dv, dg, dbeta, dinitial); dg and dinitial are empty where there is no gate or no initial state."""
    outputs = backward_op_fake(do, dfinal, q, k, v, g, beta, initial, cu_seqlens, attention, inverse, factors, whole, scale, normalize_qk, chunk_size)
    dq, dk, dv, dg, dbeta, dinitial = outputs
    call, channel = DeltaCall(q, v, cu_seqlens, chunk_size), is_channel(g)
    if call.empty:
        return dq, dk, dv, dg, dbeta, torch.zeros_like(dinitial) if dfinal is None else dfinal.clone()
    do, q, k, v = addressable(do), addressable(q), addressable(k), addressable(v)
    tables = channel_tables if channel else scalar_tables
    errors = torch.empty_like(dv)
    states, dstates = (v.new_empty(call.H, call.slots, call.K, call.V) for _ in range(2))
    matrices, row_factors = scan_operands(q, k, factors, channel)
    grid, options = call.scan_launch(tables.SCAN_BACKWARD, 2)
    scan_kernel[grid](
        *matrices, v, do, attention, inverse, *row_factors, whole, initial, dfinal, None, None, errors, states, dv, dstates, dinitial, cu_seqlens,
        *call.scan_sizes, *token_strides(*matrices, v, do),
        CHANNEL=channel, FORWARD=False, HAS_INITIAL=initial is not None, HAS_DFINAL=dfinal is not None, **options,
    )  # fmt: skip
    # Per value head; with a decay per channel also before the sums over the channels, and therefore in fp32.
    blocks = cdiv(call.K, channel_tables.CHANNELS) if channel else 1
    head_dq, head_dk = (v.new_empty(*v.shape[:3], call.K, dtype=torch.float32 if channel else v.dtype) for _ in range(2))
    block_dbeta = v.new_empty(blocks, *v.shape[:3], dtype=torch.float32) if channel else dbeta
    grid, options = call.chunk_launch(tables.GRADIENTS, call.H * blocks)
    options |= {"LEVELS": chunk_size.bit_length() - 1, "CHANNELS": channel_tables.CHANNELS} if channel else {"HAS_GATE": g is not None}
    (channel_gradients if channel else scalar_gradients).gradient_kernel[grid](
        q, k, g, beta, do, errors, dv, states, dstates, head_dq, head_dk, dg, block_dbeta, cu_seqlens, *call.scan_sizes[:4], call.S, call.H,
        *token_strides(q, k, do), scale, NORMALIZE=normalize_qk, V=call.V, **options,
    )  # fmt: skip
    if not channel:
        return call.sum_groups(head_dq), call.sum_groups(head_dk), dv, dg, dbeta, dinitial
    channel_gradients.finish_kernel[(cdiv(call.B * call.T, channel_tables.FINISH_ROWS) * call.G,)](
        q, k, head_dq, head_dk, block_dbeta, dq, dk, dbeta, call.B * call.T, call.H, *token_strides(q, k), K=call.K, BLOCK_K=block_of(call.K),
        N_BLOCKS=blocks, ROWS=channel_tables.FINISH_ROWS, GROUP=call.H // call.G, NORMALIZE=normalize_qk, num_warps=4,
    )  # fmt: skip
    return outputs


@backward_op.register_fake
def backward_op_fake(
    do: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, initial: Tensor | None,
    cu_seqlens: Tensor | None, attention: Tensor, inverse: Tensor, factors: Tensor, whole: Tensor, scale: float, normalize_qk: bool, chunk_size: int,
) -> Six:  # fmt: skip
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        beta.new_empty((0,)) if g is None else g.new_empty(g.shape),
        beta.new_empty(beta.shape),
        beta.new_empty((0,) if initial is None else initial.shape, dtype=torch.float32),
    )


def setup_context(ctx: Any, inputs: tuple, output: Six) -> None:
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
    return dq, dk, dv, None if g is None else dg, dbeta, None if initial is None else dinitial, None, None, None, None


forward_op.register_autograd(backward, setup_context=setup_context)


def delta_rule_triton(
    op: str, q_BTGK: Tensor, k_BTGK: Tensor, v_BTHV: Tensor, log_decay: Tensor | None, beta_BTH: Tensor, initial_SHKV: Tensor | None, *,
    scale: float, normalize_qk: bool, cu_seqlens: Tensor | None, chunk_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The kernels behind `gated_delta_rule` (log_decay None or [B, T, H]) and `kimi_delta_attention` ([B, T, H, K]), whose arguments these are."""
    check_triton_call(op, q_BTGK, v_BTHV, chunk_size)
    chunk_size = min(chunk_size, SINGLE_CHUNK) if q_BTGK.dtype == torch.float32 else chunk_size
    log_decay, initial_SHKV = (None if x is None else x.contiguous() for x in (log_decay, initial_SHKV))
    o, final, *_ = forward_op(q_BTGK, k_BTGK, v_BTHV, log_decay, beta_BTH.contiguous(), initial_SHKV, cu_seqlens, scale, normalize_qk, chunk_size)
    return o, final

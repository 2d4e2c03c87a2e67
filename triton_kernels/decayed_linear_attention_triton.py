"""Launching the decayed-linear-attention scan, and its registration with torch: fake implementations and autograd, so that torch.compile sees one op.

Letters: B batch, T tokens, H heads, K key width, V value width, S sequences.
"""

# The launches' constexpr parameters are plain values to the caller, which a type checker cannot know.
# pyright: reportArgumentType=false
from typing import Any

import torch

from triton_kernels.decayed_linear_attention_configurations import ANCHOR, LAUNCHES, MIN_PROGRAMS, MIN_SEGMENT
from triton_kernels.decayed_linear_attention_gate_kernel import gate_gradient_kernel
from triton_kernels.decayed_linear_attention_kernels import backward_kernel, forward_kernel
from triton_kernels.delta_launch import addressable, block_of, cdiv, token_strides, warps_and_stages

Tensor = torch.Tensor


class Scan:
    """Sizes and launch options shared by the launches of one call: `roles` scans over the same heads, each with its own slices."""

    def __init__(self, q: Tensor, v: Tensor, cu_seqlens: Tensor | None, chunk_size: int, roles_of_k: int, roles_of_v: int):
        self.batch, self.tokens, self.heads, self.K = q.shape
        self.V = v.shape[3]
        self.n_sequences = self.batch if cu_seqlens is None else cu_seqlens.numel() - 1
        self.head_rows = self.n_sequences * self.heads
        if chunk_size < 16 or chunk_size & (chunk_size - 1):
            raise ValueError(f"decayed_linear_attention: chunk_size={chunk_size}, the kernels take powers of two from 16 on")
        # The widest slices that still fill the device; if none does, the narrowest, and the sequence in segments.
        table = LAUNCHES.options(max(self.K, self.V))
        options = table[-1]
        for options in table:
            self.block, self.chunk = options.blocks["BLOCK"], min(chunk_size, options.blocks["CHUNK"])
            self.slices = roles_of_k * cdiv(self.K, self.block) + roles_of_v * cdiv(self.V, self.block)
            if self.head_rows * self.slices >= MIN_PROGRAMS:
                break
        programs = max(1, self.head_rows * self.slices)
        self.segments = max(1, min(cdiv(MIN_PROGRAMS, programs), self.batch * self.tokens // (self.n_sequences * MIN_SEGMENT)))
        self.common = {"CHUNK": self.chunk, "BLOCK": self.block, "PACKED": cu_seqlens is not None, "K": self.K, "V": self.V}
        self.common |= {"PRECISION": "ieee" if q.dtype == torch.float32 else "tf32"} | warps_and_stages(options)

    def segment_buffers(self, q: Tensor, roles: int) -> tuple[Tensor, Tensor]:
        """Room for the state and the decay of every segment but the last, per role."""
        rows = roles * (self.segments - 1) * self.head_rows
        return q.new_empty(rows, self.K, self.V, dtype=torch.float32), q.new_empty(rows, dtype=torch.float32)

    def grid(self, segments: int) -> tuple[int]:
        return (self.head_rows * segments * self.slices,)


@torch.library.custom_op("triton_kernels::decayed_linear_attention", mutates_args=())
def forward_op(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial: Tensor | None, cu_seqlens: Tensor | None, scale: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] and the final state [S, H, K, V] fp32; log_decay [B, T, H] or None."""
    q, k, v = addressable(q), addressable(k), addressable(v)
    gate = None if log_decay is None else addressable(log_decay)
    scan = Scan(q, v, cu_seqlens, chunk_size, 0, 1)
    o, final = forward_op_fake(q, k, v, log_decay, initial, cu_seqlens, scale, chunk_size)
    segment_states, segment_decays = scan.segment_buffers(q, 1)

    def launch(k: Tensor, v: Tensor, gate: Tensor | None, output: bool) -> None:
        segments = scan.segments if output else scan.segments - 1
        forward_kernel[scan.grid(segments)](
            q if output else None, k, v, gate, o if output else None, initial, final, segment_states, segment_decays, cu_seqlens,
            scan.tokens, scan.heads, scan.head_rows, scan.segments, segments * scan.slices,
            *token_strides(q), *token_strides(k), *token_strides(v), *token_strides(gate), scale,
            BLOCK_IN=block_of(scan.K), OUTPUT=output, HAS_GATE=gate is not None, HAS_INITIAL=initial is not None, **scan.common,
        )  # fmt: skip

    if scan.segments > 1:
        # The last segment's own state is never needed, so the first launch does not read its rows (in a single sequence, the tail of the tensor).
        rows = scan.tokens if scan.n_sequences > 1 else cdiv(cdiv(scan.tokens, chunk_size), scan.segments) * (scan.segments - 1) * chunk_size
        launch(k[:, :rows], v[:, :rows], None if gate is None else gate[:, :rows], False)
    launch(k, v, gate, True)
    return o, final


@forward_op.register_fake
def forward_op_fake(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial: Tensor | None, cu_seqlens: Tensor | None, scale: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    n_sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return v.new_empty(v.shape), q.new_empty(n_sequences, q.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)


@torch.library.custom_op("triton_kernels::decayed_linear_attention_backward", mutates_args=())
def backward_op(
    do: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial: Tensor | None, final: Tensor,
    cu_seqlens: Tensor | None, scale: float, chunk_size: int, gate_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv, dlog_decay, dinitial); the last two are empty where they are not asked for."""
    do, q, k, v = addressable(do), addressable(q), addressable(k), addressable(v)
    gate = None if log_decay is None else addressable(log_decay)
    dfinal = None if dfinal is None else dfinal.contiguous()
    scan = Scan(q, v, cu_seqlens, chunk_size, 2, 1)
    dq, dk, dv, dgate, dinitial = backward_op_fake(do, dfinal, q, k, v, log_decay, initial, final, cu_seqlens, scale, chunk_size, gate_gradient)
    segment_states, segment_decays = scan.segment_buffers(q, 3)
    all_tokens, slot_rows, k_slices = scan.batch * scan.tokens, ANCHOR * scan.chunk, cdiv(scan.K, scan.block)
    n_slots = all_tokens // slot_rows + scan.n_sequences
    # The kernel picks one of the two by role and reads neither where it does not exist.
    initial_, dfinal_ = initial if initial is not None else dfinal, dfinal if dfinal is not None else initial
    dots = anchors = None
    if gate_gradient:
        dots = q.new_empty(2, k_slices, scan.heads, all_tokens, dtype=torch.float32)
        # bf16 has the range of fp32; fp16 has not.
        anchor_dtype = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
        anchors = q.new_empty(2, scan.heads, n_slots, scan.V, scan.K, dtype=anchor_dtype)
    for output in (False, True) if scan.segments > 1 else (True,):
        segments = scan.segments if output else scan.segments - 1
        backward_kernel[scan.grid(segments)](
            q, k, v, gate, do, dq, dk, dv, dots, anchors, initial_, dfinal_, dinitial, segment_states, segment_decays, cu_seqlens,
            scan.tokens, all_tokens, n_slots, scan.heads, scan.head_rows, scan.segments, segments * scan.slices,
            *token_strides(q), *token_strides(k), *token_strides(v), *token_strides(do), *token_strides(gate), scale,
            int(initial is not None), int(dfinal is not None),
            BLOCK_IN=block_of(max(scan.K, scan.V)), ANCHOR=ANCHOR, OUTPUT=output, HAS_GATE=gate is not None,
            HAS_STATE=initial_ is not None, DOTS=gate_gradient and output, **scan.common,
        )  # fmt: skip
    if gate_gradient:
        gate_gradient_kernel[(n_slots, scan.heads)](
            dots, anchors, final, dfinal, dgate, cu_seqlens, scan.tokens, all_tokens, n_slots, scan.heads, scan.n_sequences,
            SIZE=scan.K * scan.V, BLOCK_SIZE=min(2048, block_of(scan.K * scan.V)), K_SLICES=k_slices, ROWS=slot_rows,
            BLOCK_S=block_of(scan.n_sequences), PACKED=cu_seqlens is not None, HAS_DFINAL=dfinal is not None,
        )  # fmt: skip
    return dq, dk, dv, dgate, dinitial


@backward_op.register_fake
def backward_op_fake(
    do: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial: Tensor | None, final: Tensor,
    cu_seqlens: Tensor | None, scale: float, chunk_size: int, gate_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        q.new_empty(q.shape[:3] if gate_gradient else (0,), dtype=torch.float32),
        q.new_empty(initial.shape if initial is not None else (0,), dtype=torch.float32),
    )


def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, log_decay, initial, cu_seqlens, scale, chunk_size = inputs
    ctx.save_for_backward(q, k, v, log_decay, initial, output[1], cu_seqlens)
    ctx.scale, ctx.chunk_size = scale, chunk_size
    ctx.set_materialize_grads(False)


def backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, log_decay, initial, final, cu_seqlens = ctx.saved_tensors
    gate_gradient = log_decay is not None and ctx.needs_input_grad[3]
    do = torch.zeros_like(v) if do is None else do
    dq, dk, dv, dgate, dinitial = backward_op(do, dfinal, q, k, v, log_decay, initial, final, cu_seqlens, ctx.scale, ctx.chunk_size, gate_gradient)
    return dq, dk, dv, dgate if gate_gradient else None, dinitial if initial is not None else None, None, None, None


forward_op.register_autograd(backward, setup_context=setup_context)


def decayed_linear_attention_triton(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, log_decay: Tensor | None, initial_SHKV: Tensor | None, *,
    scale: float, cu_seqlens: Tensor | None, chunk_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The kernels behind `decayed_linear_attention`; log_decay is None, [H] or [B, T, H]."""
    if log_decay is not None:
        log_decay = log_decay.float().expand(q_BTHK.shape[:3])
    return forward_op(q_BTHK, k_BTHK, v_BTHV, log_decay, initial_SHKV, cu_seqlens, scale, chunk_size)

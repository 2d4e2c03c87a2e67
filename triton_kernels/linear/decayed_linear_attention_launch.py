"""Decayed linear attention on its Triton kernels, as operators that torch.compile and CUDA graphs see as one node each.

Legend: B batch, T tokens, H heads, K key width, V value width, S sequences.
"""

# The launches' constexpr parameters are plain values to the caller, which a type checker cannot know.
# pyright: reportArgumentType=false
from typing import Any

import torch
from torch import Tensor

from triton_kernels.common.registration import has_work, kernel_op
from triton_kernels.common.sizes import cdiv, padded
from triton_kernels.linear.decayed_linear_attention_kernels import (
    BackwardStrides,
    BackwardTensors,
    ForwardStrides,
    ForwardTensors,
    GateForm,
    GateTensors,
    ScanForm,
    ScanSizes,
    Segments,
    backward_kernel,
    forward_kernel,
    gate_gradient_kernel,
)
from triton_kernels.linear.launch_tables import ANCHOR, DECAYED
from triton_kernels.linear.linear_attention_launch import (
    LinearCall,
    addressable,
    choose_segments,
    token_strides,
)
from triton_kernels.linear.tiles import SlotSizes

# Starting from a segment's state costs a step of adding it, a quarter of a chunk's.
FOLD = 0.25


class Scan(LinearCall):
    """Launch options shared by the launches of one call: scans over the same heads, so many of slices of K and of
    slices of V."""

    def __init__(self, q: Tensor, v: Tensor, cu_seqlens: Tensor | None, *, chunk_size: int, of_k: int, of_v: int):
        super().__init__(q, v, cu_seqlens)
        if chunk_size < 16 or chunk_size & (chunk_size - 1):
            raise ValueError(
                f"decayed_linear_attention: chunk_size={chunk_size}, the kernels take powers of two from 16 on"
            )
        options, self.slices = self.widest_slices(DECAYED[self.is_single].options(self.width), of_k=of_k, of_v=of_v)
        self.chunk = min(chunk_size, options.blocks["CHUNK"])
        self.k_slices = cdiv(self.K, options.blocks["BLOCK"])
        self.segments = choose_segments(self.head_rows * self.slices, self.chunks(self.chunk), FOLD)
        self.options = {**options.keywords, "CHUNK": self.chunk}
        # A first launch for the segments but the last on their own, where there are any, then everything.
        self.passes = [(False, self.segments - 1), (True, self.segments)] if self.segments > 1 else [(True, 1)]

    def form(self, block_in: int, gate: Tensor | None, initial: Tensor | None) -> ScanForm:
        """The constants of a scan whose query and key are padded to block_in columns."""
        return ScanForm(
            K=self.K,
            V=self.V,
            BLOCK_IN=block_in,
            ANCHOR=ANCHOR,
            HAS_GATE=gate is not None,
            HAS_INITIAL=initial is not None,
            PACKED=self.is_packed,
            PRECISION=self.precision,
        )

    def sizes(self, segments: int) -> ScanSizes:
        """Those of a launch over so many segments of each sequence."""
        return ScanSizes(
            n_heads=self.H,
            n_head_rows=self.head_rows,
            n_segments=self.segments,
            n_programs=segments * self.slices,
        )

    def segment_buffers(self, q: Tensor, roles: int) -> Segments:
        """Room for the state and the decay of every segment but the last, per role."""
        rows = roles * (self.segments - 1) * self.head_rows
        return Segments(
            states=q.new_empty(rows, self.K, self.V, dtype=torch.float32),
            decays=q.new_empty(rows, dtype=torch.float32),
        )


@kernel_op("decayed_linear_attention", strided="q k v log_decay")
def forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] and the final state [S, H, K, V] fp32; log_decay [B, T, H] or None."""
    n_sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    o, final = v.new_empty(v.shape), q.new_empty(n_sequences, *q.shape[2:], v.shape[3], dtype=torch.float32)
    if not has_work(final):
        return o, final
    q, k, v = addressable(q), addressable(k), addressable(v)
    gate = None if log_decay is None else addressable(log_decay)
    scan = Scan(q, v, cu_seqlens, chunk_size=chunk_size, of_k=0, of_v=1)
    segment_buffers = scan.segment_buffers(q, roles=1)
    for output, segments in scan.passes:
        # The last segment's own state is never needed, so the first launch does not read its rows (in a single
        # sequence, the tail of the tensor).
        rows = (
            scan.T
            if output or scan.S > 1
            else cdiv(cdiv(scan.T, scan.chunk), scan.segments) * (scan.segments - 1) * scan.chunk
        )
        forward_kernel[(scan.head_rows * segments * scan.slices,)](
            tensors=ForwardTensors(
                q=q if output else None,
                k=k[:, :rows],
                v=v[:, :rows],
                gate=None if gate is None else gate[:, :rows],
                o=o if output else None,
                initial=initial,
                final=final,
            ),
            segments=segment_buffers,
            cu_seqlens=cu_seqlens,
            n_tokens=scan.T,
            sizes=scan.sizes(segments),
            strides=ForwardStrides(*token_strides(q, k, v, gate)),
            scale=scale,
            FORM=scan.form(padded(scan.K), gate, initial),
            OUTPUT=output,
            **scan.options,
        )
    return o, final


@kernel_op("decayed_linear_attention_backward", strided="do q k v log_decay")
def backward_op(
    do: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial: Tensor | None,
    final: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
    gate_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dlog_decay, dinitial); the last two are empty where they are not asked for."""
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    dgate = q.new_empty(q.shape[:3] if gate_gradient else (0,), dtype=torch.float32)
    dinitial = q.new_empty((0,) if initial is None else initial.shape, dtype=torch.float32)
    if not has_work(final):
        return dq, dk, dv, dgate, dinitial
    do, q, k, v = addressable(do), addressable(q), addressable(k), addressable(v)
    gate = None if log_decay is None else addressable(log_decay)
    scan = Scan(q, v, cu_seqlens, chunk_size=chunk_size, of_k=2, of_v=1)
    segment_buffers = scan.segment_buffers(q, roles=3)
    all_tokens, slot_rows = scan.B * scan.T, ANCHOR * scan.chunk
    n_slots = scan.slots(slot_rows)
    dots = anchors = None
    if gate_gradient:
        dots = q.new_empty(2, scan.k_slices, scan.H, all_tokens, dtype=torch.float32)
        # bf16 has the range of fp32; fp16 has not.
        anchors = q.new_empty(
            2, scan.H, n_slots, scan.V, scan.K, dtype=torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
        )
    for output, segments in scan.passes:
        backward_kernel[(scan.head_rows * segments * scan.slices,)](
            tensors=BackwardTensors(
                q=q,
                k=k,
                v=v,
                gate=gate,
                do=do,
                dq=dq,
                dk=dk,
                dv=dv,
                dots=dots if output else None,
                anchors=anchors,
                # The kernel picks initial or dfinal by role and reads neither where it does not exist.
                start=dfinal if initial is None else initial,
                dinitial=None if initial is None else dinitial,
                dfinal=initial if dfinal is None else dfinal,
            ),
            segments=segment_buffers,
            cu_seqlens=cu_seqlens,
            n_tokens=scan.T,
            n_all_tokens=all_tokens,
            n_slots=n_slots,
            sizes=scan.sizes(segments),
            strides=BackwardStrides(*token_strides(q, k, v, do, gate)),
            scale=scale,
            with_initial=int(initial is not None),
            with_dfinal=int(dfinal is not None),
            FORM=scan.form(padded(scan.width), gate, initial),
            OUTPUT=output,
            **scan.options,
        )
    if gate_gradient and dgate.numel() > 0:
        size = scan.K * scan.V
        gate_gradient_kernel[(n_slots * scan.H,)](
            tensors=GateTensors(
                dots=dots, anchors=anchors, final=final, dfinal=dfinal, dgate=dgate, cu_seqlens=cu_seqlens
            ),
            n_tokens=scan.T,
            n_all_tokens=all_tokens,
            sizes=SlotSizes(n_slots=n_slots, n_heads=scan.H, n_sequences=scan.S),
            FORM=GateForm(
                SIZE=size,
                BLOCK_SIZE=min(2048, padded(size)),
                K_SLICES=scan.k_slices,
                ROWS=slot_rows,
                BLOCK_S=scan.block_s,
                PACKED=scan.is_packed,
            ),
        )
    return dq, dk, dv, dgate, dinitial


def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, cu_seqlens, ctx.scale, ctx.chunk_size = inputs
    ctx.save_for_backward(*tensors, output[1], cu_seqlens)
    ctx.set_materialize_grads(False)


def backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, log_decay, initial, final, cu_seqlens = ctx.saved_tensors
    gate_gradient = log_decay is not None and ctx.needs_input_grad[3]
    do = torch.zeros_like(v) if do is None else do
    dq, dk, dv, dgate, dinitial = backward_op(
        do=do,
        dfinal=dfinal,
        q=q,
        k=k,
        v=v,
        log_decay=log_decay,
        initial=initial,
        final=final,
        cu_seqlens=cu_seqlens,
        scale=ctx.scale,
        chunk_size=ctx.chunk_size,
        gate_gradient=gate_gradient,
    )
    return dq, dk, dv, dgate if gate_gradient else None, dinitial if initial is not None else None, None, None, None


forward_op.register_autograd(backward, setup_context=setup_context)


def decayed_linear_attention_triton(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay: Tensor | None,
    initial_SHKV: Tensor | None,
    *,
    scale: float,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """The kernels behind `decayed_linear_attention`; log_decay is None, [H] or [B, T, H]."""
    if log_decay is not None:
        log_decay = log_decay.float().expand(q_BTHK.shape[:3])
    return forward_op(
        q=q_BTHK,
        k=k_BTHK,
        v=v_BTHV,
        log_decay=log_decay,
        initial=initial_SHKV,
        cu_seqlens=cu_seqlens,
        scale=scale,
        chunk_size=chunk_size,
    )

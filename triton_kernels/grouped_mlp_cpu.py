"""Grouped gated MLP for the CPU: batched products over blocks of experts of similar load, with backward written by hand.

What it is built around, in the order it matters on a CPU:
- Calls are slow: 80 small bf16 products one by one take three to five times as long as one batched product. Experts are sorted by load and cut
  into blocks; within a block all are padded to the same number of rows, of weight zero, and every operation runs once per block.
- New shapes are slow: oneDNN builds a program per shape of a bf16 product and keeps 1,024 of them, and the numbers of rows per expert never repeat.
  Rounded up to a multiple of `ROW_QUANTUM`, in blocks of one size, they do.
- Fresh memory is slow: the kernel clears every new page. Apart from what backward needs (the pre-activations) and what a caller receives,
  everything lives in scratch buffers of one block, sized to stay in cache, so that gather, SwiGLU and casts run on warm data.
- Weights of another dtype than the activations (fp32 masters under bf16 activations) are cast per block, never as a whole; experts without rows,
  which are most of them when one token is decoded, are not even read.
- Each token's rows are added by `embedding_bag`, a segment sum in a fixed order that accumulates in fp32.

Backward: with A the activation and dA' = W_down dy (not yet weighted), the gradient of a row's weight is <dA', A>; expert outputs are never kept.

Legend: T tokens, D model width, E experts, F expert width, N assigned rows, P padded rows, G experts of a block, M rows of each of them.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Scratch of one block: large enough to amortise the calls, small enough for a core's share of the cache.
BLOCK_BYTES = 2**21
MOST_EXPERTS = 8
# Half a quantum per expert is wasted; below the least rows that is too much, and the numbers of rows repeat anyway.
ROW_QUANTUM = 16
LEAST_ROWS = 64


class Block(NamedTuple):
    """Experts of similar load: `experts` are G expert numbers, `rows` their G * `height` padded rows."""

    experts: list[int]
    rows: slice
    height: int


def expert_blocks(rows_E: list[int], row_bytes: int) -> list[Block]:
    """The experts that have rows, by falling load, in blocks of one number of experts (the last may hold fewer)."""
    order = sorted((e for e, rows in enumerate(rows_E) if rows), key=lambda e: -rows_E[e])
    if not order:
        return []
    mean_bytes = sum(rows_E) / len(order) * row_bytes
    # A power of two, so that small changes of the mean do not change the shapes.
    size = 1
    while 2 * size <= MOST_EXPERTS and 2 * size * mean_bytes <= BLOCK_BYTES:
        size *= 2
    blocks, start = [], 0
    for first in range(0, len(order), size):
        experts = order[first : first + size]
        most = rows_E[experts[0]]
        height = most if most < LEAST_ROWS else -(-most // ROW_QUANTUM) * ROW_QUANTUM
        blocks.append(Block(experts, slice(start, start + len(experts) * height), height))
        start += len(experts) * height
    return blocks


def grouped_mlp_cpu(
    x_TD: Tensor,
    w_gate_up_EDF2: Tensor,
    w_down_EFD: Tensor,
    token_N: Tensor,
    weight_N: Tensor,
    expert_offsets: Tensor,
    token_offsets: Tensor,
    row_of_slot_N: Tensor,
) -> Tensor:
    """`grouped_mlp` on the CPU; arguments and result as there."""
    rows_E = expert_offsets.diff()
    d_expert, d_model = w_down_EFD.shape[1:]
    blocks = expert_blocks(rows_E.tolist(), (d_model + 3 * d_expert) * x_TD.element_size())
    place_N = padded_places(blocks, rows_E)
    n_rows, n_padded = place_N.shape[0], blocks[-1].rows.stop if blocks else 0
    token_P = token_N.new_zeros(n_padded).index_copy_(0, place_N, token_N[:n_rows])
    weight_P = weight_N.new_zeros(n_padded).index_copy(0, place_N, weight_N[:n_rows])
    y_TD = GroupedMlpCpu.apply(x_TD, w_gate_up_EDF2, w_down_EFD, token_P, weight_P, token_offsets, place_N[row_of_slot_N[:n_rows]], blocks)
    assert isinstance(y_TD, Tensor)
    return y_TD


def padded_places(blocks: list[Block], rows_E: Tensor) -> Tensor:
    """The padded row of each assigned row, int64 [N]."""
    start_E = torch.zeros_like(rows_E)
    for experts, rows, height in blocks:
        start_E[experts] = torch.arange(rows.start, rows.stop, height)
    n_rows = int(rows_E.sum())
    return torch.arange(n_rows) + torch.repeat_interleave(start_E - (rows_E.cumsum(0) - rows_E), rows_E, output_size=n_rows)


def segment_sum(rows_PD: Tensor, row_of_slot_N: Tensor, token_offsets: Tensor, weight_N: Tensor) -> Tensor:
    """y_t = sum over the slots of token t of weight * row, in slot order."""
    if rows_PD.shape[0] == 0:
        return rows_PD.new_zeros(token_offsets.shape[0] - 1, rows_PD.shape[1])
    return F.embedding_bag(row_of_slot_N, rows_PD, token_offsets, mode="sum", include_last_offset=True, per_sample_weights=weight_N)


def block_weights(packed_EIO: Tensor, experts: list[int], dtype: torch.dtype) -> Tensor:
    """The weights of a block in the dtype of the activations, [G, I, O]; the packed ones themselves where nothing has to be gathered or cast."""
    weights = packed_EIO[experts[0] : experts[0] + 1] if len(experts) == 1 else packed_EIO[experts]
    return weights.to(dtype)


class GroupedMlpCpu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        w_gate_up_EDF2: Tensor,
        w_down_EFD: Tensor,
        token_P: Tensor,
        weight_P: Tensor,
        token_offsets: Tensor,
        row_of_slot_N: Tensor,
        blocks: list[Block],
    ) -> Tensor:
        x_TD = x_TD.contiguous()
        dtype, (d_expert, d_model) = x_TD.dtype, w_down_EFD.shape[1:]
        most_rows = max((block.rows.stop - block.rows.start for block in blocks), default=0)
        x_buffer, a_buffer = x_TD.new_empty(most_rows, d_model), x_TD.new_empty(most_rows, d_expert)
        h_PF2, out_PD = x_TD.new_empty(token_P.shape[0], 2 * d_expert), x_TD.new_empty(token_P.shape[0], d_model)
        for experts, rows, height in blocks:
            n, shape = rows.stop - rows.start, (len(experts), height, -1)
            x_n, a_n, h_n = x_buffer[:n], a_buffer[:n], h_PF2[rows]
            torch.index_select(x_TD, 0, token_P[rows], out=x_n)
            torch.bmm(x_n.view(shape), block_weights(w_gate_up_EDF2, experts, dtype), out=h_n.view(shape))
            # SiLU is several times faster on rows that lie close together.
            a_n.copy_(h_n[:, :d_expert])
            torch.ops.aten.silu.out(a_n, out=a_n)
            a_n.mul_(h_n[:, d_expert:])
            torch.bmm(a_n.view(shape), block_weights(w_down_EFD, experts, dtype), out=out_PD[rows].view(shape))
        ctx.save_for_backward(x_TD, w_gate_up_EDF2, w_down_EFD, token_P, weight_P, token_offsets, row_of_slot_N, h_PF2)
        ctx.blocks = blocks
        return segment_sum(out_PD, row_of_slot_N, token_offsets, weight_P.to(dtype)[row_of_slot_N])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TD, w_gate_up_EDF2, w_down_EFD, token_P, weight_P, token_offsets, row_of_slot_N, h_PF2 = ctx.saved_tensors
        dy_TD, blocks = dy_TD.contiguous(), ctx.blocks
        dtype, (d_expert, d_model) = x_TD.dtype, w_down_EFD.shape[1:]
        most_rows = max((block.rows.stop - block.rows.start for block in blocks), default=0)
        wide, narrow = x_TD.new_empty(2, most_rows, d_model), x_TD.new_empty(6, most_rows, d_expert)
        d_gate_up, d_down = torch.empty_like(w_gate_up_EDF2), torch.empty_like(w_down_EFD)
        dx_PD, d_weight_P = x_TD.new_empty(token_P.shape[0], d_model), torch.empty_like(weight_P, dtype=dtype)
        row_weight_P1 = weight_P.to(dtype)[:, None]
        for experts, rows, height in blocks:
            n, shape = rows.stop - rows.start, (len(experts), height, -1)
            x_n, dy_n = wide[0, :n], wide[1, :n]
            da_n, silu_n, a_n, gate_n = narrow[0, :n], narrow[1, :n], narrow[2, :n], narrow[3, :n]
            dh_n = narrow[4:].view(-1)[: n * 2 * d_expert].view(n, 2 * d_expert)
            up_n = h_PF2[rows, d_expert:]
            torch.index_select(dy_TD, 0, token_P[rows], out=dy_n)
            torch.index_select(x_TD, 0, token_P[rows], out=x_n)
            torch.bmm(dy_n.view(shape), block_weights(w_down_EFD, experts, dtype).mT, out=da_n.view(shape))
            gate_n.copy_(h_PF2[rows, :d_expert])
            torch.ops.aten.silu.out(gate_n, out=silu_n)
            torch.mul(silu_n, up_n, out=a_n)
            torch.linalg.vecdot(da_n, a_n, out=d_weight_P[rows])
            # Padding rows have weight zero, so nothing of them reaches the gradients of the experts.
            a_n.mul_(row_weight_P1[rows])
            da_n.mul_(row_weight_P1[rows])
            torch.mul(da_n, silu_n, out=dh_n[:, d_expert:])
            da_n.mul_(up_n)
            torch.ops.aten.silu_backward.grad_input(da_n, gate_n, grad_input=da_n)
            dh_n[:, :d_expert].copy_(da_n)
            torch.bmm(dh_n.view(shape), block_weights(w_gate_up_EDF2, experts, dtype).mT, out=dx_PD[rows].view(shape))
            d_down[experts] = torch.bmm(a_n.view(shape).mT, dy_n.view(shape)).to(d_down.dtype)
            d_gate_up[experts] = torch.bmm(x_n.view(shape).mT, dh_n.view(shape)).to(d_gate_up.dtype)
        used = {e for block in blocks for e in block.experts}
        if idle := [e for e in range(d_down.shape[0]) if e not in used]:
            d_down[idle], d_gate_up[idle] = 0, 0
        # Weights of one: without them torch 2.13's fp32 embedding_bag takes a path an order of magnitude slower.
        dx_TD = segment_sum(dx_PD, row_of_slot_N, token_offsets, dx_PD.new_ones(row_of_slot_N.shape[0]))
        return dx_TD, d_gate_up, d_down, None, d_weight_P.to(weight_P.dtype), None, None, None

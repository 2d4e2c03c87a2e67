"""Grouped gated MLP for the CPU: dense products per expert on buffers that stay in cache, with backward written by hand.

What it is built around, in the order it matters on a CPU:
- Fresh memory is slow: the kernel clears every new page. Apart from what backward needs (the pre-activations) and what a caller receives,
  everything lives in scratch buffers of one group of experts, sized to stay in cache, so that gather, SwiGLU and casts run on warm data.
- Calls are slow: per expert only the products remain. Experts are grouped so that all other operations run once per group, all slices come
  from one `split`, and autograd sees one node.
- Weights of another dtype than the activations (fp32 masters under bf16 activations) are cast per group, never as a whole.
- New shapes are slow: oneDNN builds a program per shape of a bf16 product and keeps 1,024 of them, and the numbers of rows per expert never repeat.
  Rounded up to a multiple of `ROW_QUANTUM` they do; the rows in between have weight zero. (fp32 products go elsewhere and don't care.)
- Each token's rows are added by `embedding_bag`, a segment sum in a fixed order that accumulates in fp32.

Backward: with A the activation and dA' = W_down dy (not yet weighted), the gradient of a row's weight is <dA', A>; expert outputs are never kept.

Legend: T tokens, D model width, E experts, F expert width, N assigned rows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Scratch of one group of experts: large enough to amortise the calls, small enough for a core's share of the cache.
GROUP_BYTES = 2**21
# Half a row quantum per expert is wasted, so experts with few rows are left as they are.
ROW_QUANTUM = 16
LEAST_MEAN_ROWS = 4 * ROW_QUANTUM


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
    n_rows, n_experts = int(expert_offsets[-1]), w_down_EFD.shape[0]
    if 0 < n_rows < n_experts and not torch.is_grad_enabled():
        # Decoding: look at the few experts in use, not at all of them.
        used = expert_offsets.diff().nonzero().flatten()
        w_gate_up_EDF2, w_down_EFD = w_gate_up_EDF2[used], w_down_EFD[used]
        expert_offsets = F.pad(expert_offsets[1:][used], (1, 0))
    elif x_TD.dtype in (torch.bfloat16, torch.float16) and n_rows >= LEAST_MEAN_ROWS * n_experts:
        token_N, weight_N, expert_offsets, row_of_slot_N = quantised_rows(token_N, weight_N, expert_offsets, row_of_slot_N)
    y_TD = GroupedMlpCpu.apply(x_TD, w_gate_up_EDF2, w_down_EFD, token_N, weight_N, expert_offsets, token_offsets, row_of_slot_N)
    assert isinstance(y_TD, Tensor)
    return y_TD


def quantised_rows(token_N: Tensor, weight_N: Tensor, expert_offsets: Tensor, row_of_slot_N: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same assignments with each expert's rows followed by rows of weight zero (of token 0) up to a multiple of `ROW_QUANTUM`."""
    rows_E = expert_offsets.diff()
    offsets = F.pad(((rows_E + ROW_QUANTUM - 1) // ROW_QUANTUM * ROW_QUANTUM).cumsum(0), (1, 0))
    n_rows, n_quantised = int(expert_offsets[-1]), int(offsets[-1])
    place_N = torch.arange(n_rows) + torch.repeat_interleave((offsets - expert_offsets)[:-1], rows_E)
    token_P = token_N.new_zeros(n_quantised).index_copy_(0, place_N, token_N[:n_rows])
    weight_P = weight_N.new_zeros(n_quantised).index_copy(0, place_N, weight_N[:n_rows])
    return token_P, weight_P, offsets, place_N[row_of_slot_N[:n_rows]]


def expert_groups(bounds: list[int], row_bytes: int) -> list[tuple[int, int]]:
    """Consecutive experts [first, last) whose rows together fill about GROUP_BYTES; always at least one expert."""
    groups, first = [], 0
    for last in range(1, len(bounds)):
        if last == len(bounds) - 1 or (bounds[last + 1] - bounds[first]) * row_bytes > GROUP_BYTES:
            groups.append((first, last))
            first = last
    return groups


class Weights:
    """The packed weights of a group of experts in the dtype of the activations, as one matrix per expert."""

    def __init__(self, packed_EIO: Tensor, dtype: torch.dtype, n_scratch: int):
        self.packed_EIO = packed_EIO
        self.scratch = None if packed_EIO.dtype == dtype else packed_EIO.new_empty(n_scratch, *packed_EIO.shape[1:], dtype=dtype)

    def __getitem__(self, experts: slice) -> tuple[Tensor, ...]:
        group = self.packed_EIO[experts]
        if self.scratch is not None:
            group = self.scratch[: group.shape[0]].copy_(group)
        return group.unbind()


class WeightGradient:
    """The packed gradient, in the weights' dtype; products are written in the activations' dtype and cast per group."""

    def __init__(self, packed_EIO: Tensor, dtype: torch.dtype, n_scratch: int):
        self.packed_EIO = torch.empty_like(packed_EIO)
        self.scratch = None if packed_EIO.dtype == dtype else packed_EIO.new_empty(n_scratch, *packed_EIO.shape[1:], dtype=dtype)

    def write(self, experts: slice, left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> None:
        """gradient_e = left_e^T @ right_e for the experts of the group; zero for those without rows."""
        group = self.packed_EIO[experts]
        target = group if self.scratch is None else self.scratch[: group.shape[0]]
        for out_IO, left_NI, right_NO in zip(target.unbind(), left, right):
            if left_NI.shape[0]:
                torch.mm(left_NI.t(), right_NO, out=out_IO)
            else:
                out_IO.zero_()
        if self.scratch is not None:
            group.copy_(target)


def segment_sum(rows_ND: Tensor, row_of_slot_N: Tensor, token_offsets: Tensor, weight_N: Tensor) -> Tensor:
    """y_t = sum over the slots of token t of weight * row, in slot order."""
    if rows_ND.shape[0] == 0:
        return rows_ND.new_zeros(token_offsets.shape[0] - 1, rows_ND.shape[1])
    return F.embedding_bag(row_of_slot_N, rows_ND, token_offsets, mode="sum", include_last_offset=True, per_sample_weights=weight_N)


class GroupedMlpCpu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        w_gate_up_EDF2: Tensor,
        w_down_EFD: Tensor,
        token_N: Tensor,
        weight_N: Tensor,
        expert_offsets: Tensor,
        token_offsets: Tensor,
        row_of_slot_N: Tensor,
    ) -> Tensor:
        x_TD = x_TD.contiguous()
        bounds, dtype = expert_offsets.tolist(), x_TD.dtype
        n_rows, (d_expert, d_model) = bounds[-1], w_down_EFD.shape[1:]
        groups = expert_groups(bounds, (d_model + 3 * d_expert) * x_TD.element_size())
        n_experts = max(last - first for first, last in groups)
        most_rows = max(bounds[last] - bounds[first] for first, last in groups)
        gate_up = Weights(w_gate_up_EDF2, dtype, n_experts)
        down = Weights(w_down_EFD, dtype, n_experts)
        x_buffer, a_buffer = x_TD.new_empty(most_rows, d_model), x_TD.new_empty(most_rows, d_expert)
        h_NF2, out_ND = x_TD.new_empty(n_rows, 2 * d_expert), x_TD.new_empty(n_rows, d_model)
        for first, last in groups:
            start, stop = bounds[first], bounds[last]
            if start == stop:
                continue
            sizes = [bounds[e + 1] - bounds[e] for e in range(first, last)]
            experts, rows = slice(first, last), slice(start, stop)
            x_ND, a_NF, h_group = x_buffer[: stop - start], a_buffer[: stop - start], h_NF2[rows]
            torch.index_select(x_TD, 0, token_N[rows], out=x_ND)
            for x_e, w_e, h_e in zip(x_ND.split(sizes), gate_up[experts], h_group.split(sizes)):
                torch.mm(x_e, w_e, out=h_e)
            # Copied first: torch's SiLU falls back to scalar code on the ends of strided rows, which is most of a narrow expert.
            a_NF.copy_(h_group[:, :d_expert])
            torch.ops.aten.silu.out(a_NF, out=a_NF)
            a_NF.mul_(h_group[:, d_expert:])
            for a_e, w_e, out_e in zip(a_NF.split(sizes), down[experts], out_ND[rows].split(sizes)):
                torch.mm(a_e, w_e, out=out_e)
        row_of_slot_N = row_of_slot_N[: int(token_offsets[-1])]
        ctx.save_for_backward(x_TD, w_gate_up_EDF2, w_down_EFD, token_N, weight_N, token_offsets, row_of_slot_N, h_NF2)
        ctx.bounds = bounds
        return segment_sum(out_ND, row_of_slot_N, token_offsets, weight_N.to(dtype)[row_of_slot_N])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TD, w_gate_up_EDF2, w_down_EFD, token_N, weight_N, token_offsets, row_of_slot_N, h_NF2 = ctx.saved_tensors
        dy_TD = dy_TD.contiguous()
        bounds, dtype = ctx.bounds, x_TD.dtype
        n_rows, (d_expert, d_model) = bounds[-1], w_down_EFD.shape[1:]
        groups = expert_groups(bounds, 2 * (d_model + 3 * d_expert) * x_TD.element_size())
        n_experts = max(last - first for first, last in groups)
        most_rows = max(bounds[last] - bounds[first] for first, last in groups)
        gate_up, d_gate_up = Weights(w_gate_up_EDF2, dtype, n_experts), WeightGradient(w_gate_up_EDF2, dtype, n_experts)
        down, d_down = Weights(w_down_EFD, dtype, n_experts), WeightGradient(w_down_EFD, dtype, n_experts)
        wide = x_TD.new_empty(2, most_rows, d_model)
        narrow = x_TD.new_empty(6, most_rows, d_expert)
        dx_ND = x_TD.new_empty(n_rows, d_model)
        # Padding rows behind the last expert keep a gradient of zero.
        d_weight_N = torch.zeros_like(weight_N, dtype=dtype)
        row_weight_N1 = weight_N.to(dtype)[:, None]
        for first, last in groups:
            start, stop = bounds[first], bounds[last]
            experts, rows, n = slice(first, last), slice(start, stop), stop - start
            sizes = [bounds[e + 1] - bounds[e] for e in range(first, last)]
            x_ND, dy_ND = wide[0, :n], wide[1, :n]
            da_NF, silu_NF, a_NF, gate_NF = narrow[0, :n], narrow[1, :n], narrow[2, :n], narrow[3, :n]
            dh_NF2 = narrow[4:].view(-1)[: n * 2 * d_expert].view(n, 2 * d_expert)
            up_NF = h_NF2[rows, d_expert:]
            if n:
                torch.index_select(dy_TD, 0, token_N[rows], out=dy_ND)
                torch.index_select(x_TD, 0, token_N[rows], out=x_ND)
                for dy_e, w_e, da_e in zip(dy_ND.split(sizes), down[experts], da_NF.split(sizes)):
                    torch.mm(dy_e, w_e.t(), out=da_e)
                gate_NF.copy_(h_NF2[rows, :d_expert])
                torch.ops.aten.silu.out(gate_NF, out=silu_NF)
                torch.mul(silu_NF, up_NF, out=a_NF)
                torch.linalg.vecdot(da_NF, a_NF, out=d_weight_N[rows])
                a_NF.mul_(row_weight_N1[rows])
                da_NF.mul_(row_weight_N1[rows])
                torch.mul(da_NF, silu_NF, out=dh_NF2[:, d_expert:])
                da_NF.mul_(up_NF)
                torch.ops.aten.silu_backward.grad_input(da_NF, gate_NF, grad_input=da_NF)
                dh_NF2[:, :d_expert].copy_(da_NF)
                for dh_e, w_e, dx_e in zip(dh_NF2.split(sizes), gate_up[experts], dx_ND[rows].split(sizes)):
                    torch.mm(dh_e, w_e.t(), out=dx_e)
            d_down.write(experts, a_NF.split(sizes), dy_ND.split(sizes))
            d_gate_up.write(experts, x_ND.split(sizes), dh_NF2.split(sizes))
        # Weights of one: without them torch 2.13's fp32 embedding_bag takes a path an order of magnitude slower.
        dx_TD = segment_sum(dx_ND, row_of_slot_N, token_offsets, dx_ND.new_ones(row_of_slot_N.shape[0]))
        return dx_TD, d_gate_up.packed_EIO, d_down.packed_EIO, None, d_weight_N.to(weight_N.dtype), None, None, None
